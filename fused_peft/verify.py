"""How exact every method is on this machine: relative Frobenius error of y, dx and each gradient against fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dropout import keep_mask, new_seed
from .linear import PeftLinear
from .methods import METHODS, PeftConfig

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
        return LIMITS[self.dtype]

    @property
    def ok(self) -> bool:
        return self.error <= min(self.limit, EAGER_FACTOR * self.plain)


def configs() -> dict[str, PeftConfig]:
    """A config of every method, and the variants that take another path through the kernels."""
    found = {name: method.config() for name, method in METHODS.items()}
    found["lora"] = replace(found["lora"], r=16, lora_alpha=32)
    found["lora+dropout"] = replace(found["lora"], lora_dropout=0.1)
    found["ia3 (input)"] = replace(found["ia3"], feedforward_modules=".*")
    return found


def relative(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in fp64."""
    return ((value.double() - reference).norm() / reference.norm()).item()


def _gradients(run, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    y = run()
    return {"y": y.detach(), **dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))}


def _written_out(layer: PeftLinear, x: Tensor, dtype: torch.dtype, keep: Tensor | None) -> Tensor:
    """The expression in plain PyTorch, every tensor in one dtype."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer.factors().to(dtype).expression(x, layer.weight.to(dtype), bias, keep=keep)


def measure(
    config: PeftConfig,
    dtype: torch.dtype,
    device: str = "cpu",
    adapter_dtype: torch.dtype | None = None,
    shape: tuple[int, int, int] = (256, 512, 384),
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """{tensor: (error, plain PyTorch's error)} of one layer with (tokens, in, out) = shape.

    Inputs, weights and adapter are rounded to ``dtype`` first, so only the computation is judged. With dropout, the
    reference applies the mask that the layer's own seed gives.
    """
    M, K, N = shape
    torch.manual_seed(seed)
    layer = PeftLinear(K, N, config=config, device=device, dtype=dtype, adapter_dtype=adapter_dtype)
    with torch.no_grad():
        for name in layer.adapter_names:
            p = getattr(layer, name)
            p.add_(torch.randn_like(p) * 0.1)
            p.copy_(p.to(dtype))
    x = torch.randn(M, K, device=device).to(dtype)
    dy = torch.randn(M, N, device=device).to(dtype)

    torch.manual_seed(seed + 1)
    p = layer.factors().p
    keep = keep_mask(new_seed(x.device), x.shape, p) if p else None
    torch.manual_seed(seed + 1)
    results = {}
    for kind, compute in (("fused", dtype), ("plain", dtype), ("exact", torch.float64)):
        twin = copy.deepcopy(layer)
        if kind == "exact":
            twin = twin.double()
        leaf = x.detach().to(compute).requires_grad_()
        tensors = {"dx": leaf, **{f"d{name}": getattr(twin, name) for name in twin.adapter_names}}
        if kind == "fused":
            results[kind] = _gradients(lambda t=twin, i=leaf: t(i), tensors, dy)
        else:
            results[kind] = _gradients(
                lambda t=twin, i=leaf, c=compute: _written_out(t, i, c, keep), tensors, dy.to(compute)
            )
    exact = results["exact"]
    return {
        name: (relative(results["fused"][name], exact[name]), relative(results["plain"][name], exact[name]))
        for name in exact
    }


def table(device: str = "cpu", dtypes=tuple(LIMITS)) -> Iterator[Row]:
    """One Row a method, dtype and tensor."""
    for name, config in configs().items():
        for dtype in dtypes:
            for tensor, (error, plain) in measure(config, dtype, device).items():
                yield Row(name, dtype, tensor, error, plain)
