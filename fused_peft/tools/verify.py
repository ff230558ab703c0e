"""How exact every method is on this machine: relative Frobenius error of y, dx and each gradient against fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import dispatch
from ..core.dropout import keep_mask, new_seed
from ..methods import METHODS, PeftConfig
from ..model.layer import PeftLinear

# Methods whose formula rounds five times or more in a row, or sends gradients through a norm: 1.4 times the limit in
# half precision, where plain PyTorch is no better.
LONG = {"houlsby", "pfeiffer", "delora"}
LIMITS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
# beside the limit itself: never more than this multiple of plain PyTorch's error in the same dtype
EAGER_FACTOR = 1.25


@dataclass(frozen=True)
class Row:
    """One tensor of one method in one dtype; ``plain`` is the error of unfused PyTorch autograd."""

    method: str
    dtype: torch.dtype
    tensor: str
    error: float
    plain: float

    @property
    def limit(self) -> float:
        longer = self.method in LONG and self.dtype.itemsize == 2
        return LIMITS[self.dtype] * (1.4 if longer else 1.0)

    @property
    def ok(self) -> bool:
        return self.error <= min(self.limit, EAGER_FACTOR * self.plain)


def configs(r: int = 16) -> dict[str, PeftConfig]:
    """A config of every method, and the variants that take another path through the kernels."""
    found = {name: method.example(r) for name, method in METHODS.items()}
    found["lora+dropout"] = replace(found["lora"], lora_dropout=0.1)
    found["ia3 (input)"] = replace(found["ia3"], feedforward_modules=".*")
    return found


def _gradients(run, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    y = run()
    return {"y": y.detach(), **dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))}


def written_out(layer: PeftLinear, x: Tensor, dtype: torch.dtype, keep: Tensor | None, formed: bool) -> Tensor:
    """The layer in plain PyTorch, every tensor in one dtype; formed: with its weight formed."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    weight, method = layer.weight.to(dtype), layer.method
    if method.output is not None:
        z = torch.nn.functional.linear(x, weight, bias)
        return method.output(layer).to(dtype).expression(z, None, None, z, keep)
    if formed:
        return torch.nn.functional.linear(x, layer.formed_weight(*layer.adapter_tensors()).to(dtype), bias)
    c = None if method.residual is None else method.residual(layer).to(dtype).expression(x, weight)
    weight = None if method.replaces_weight else weight
    return layer.factors().to(dtype).expression(x, weight, bias, c, keep)


def measure(
    config: PeftConfig,
    dtype: torch.dtype,
    device: str = "cpu",
    adapter_dtype: torch.dtype | None = None,
    shape: tuple[int, int, int] = (256, 512, 384),
    draws: int = 6,
) -> dict[str, tuple[float, float]]:
    """{tensor: (error, plain PyTorch's error)} of one layer with (tokens, in, out) = shape.

    Inputs, weights and adapter are rounded to ``dtype`` first, so only the computation is judged. With dropout, the
    reference applies the mask that the layer's own seed gives. Errors are pooled over several random draws, since the
    gradient of a vector of rank length is a small sample.
    """
    squares: dict[str, list[float]] = {}
    for seed in range(draws):
        fused, plain, exact = _draw(config, dtype, device, adapter_dtype, shape, seed)
        for name, reference in exact.items():
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, value in enumerate((fused[name].double() - reference, plain[name].double() - reference, reference)):
                sums[i] += value.square().sum().item()
    return {name: ((f / e) ** 0.5, (p / e) ** 0.5) for name, (f, p, e) in squares.items()}


def _draw(config, dtype, device, adapter_dtype, shape, seed) -> list[dict[str, Tensor]]:
    """{tensor: value} of y, dx and every gradient: fused, plain and exact."""
    M, K, N = shape
    torch.manual_seed(seed)
    layer = PeftLinear(K, N, config=config, device=device, dtype=dtype, adapter_dtype=adapter_dtype)
    with torch.no_grad():
        for name in layer.tensor_names:
            p = getattr(layer, name)
            p.add_(torch.randn_like(p) * 0.1)
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.copy_((t if t.any() else torch.randn_like(t) * 0.1).to(dtype))
    x = torch.randn(M, K, device=device).to(dtype)
    dy = torch.randn(M, N, device=device).to(dtype)

    torch.manual_seed(seed + 1)
    p = layer.factors().p if layer.method.form == "factors" else 0.0
    keep = keep_mask(new_seed(x.device), x.shape, p) if p else None
    torch.manual_seed(seed + 1)
    results, formed = {}, layer.forms_weight(M)
    for kind, compute in (("fused", dtype), ("plain", dtype), ("exact", torch.float64)):
        twin = copy.deepcopy(layer)
        if kind == "exact":
            twin = twin.double()
        leaf = x.detach().to(compute).requires_grad_()
        tensors = {"dx": leaf, **{f"d{name}": getattr(twin, name) for name in twin.tensor_names}}
        if kind == "fused":
            results[kind] = _gradients(lambda t=twin, i=leaf: t(i), tensors, dy)
        else:
            written = lambda t=twin, i=leaf, c=compute: written_out(t, i, c, keep, formed)  # noqa: E731
            with dispatch.forcing("eager"):  # a norm in fp64 is not for the backend under test
                results[kind] = _gradients(written, tensors, dy.to(compute))
    return [results[kind] for kind in ("fused", "plain", "exact")]


def table(device: str = "cpu", dtypes=tuple(LIMITS)) -> Iterator[Row]:
    """One Row a method, dtype and tensor."""
    for name, config in configs().items():
        for dtype in dtypes:
            for tensor, (error, plain) in measure(config, dtype, device).items():
                yield Row(name, dtype, tensor, error, plain)
