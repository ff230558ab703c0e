"""Whether a backend computes a kind of call right on the device at hand: against the formula in plain PyTorch.

Run before a backend is used on a GPU (``tools.calibrate``). A result is wrong where its error against the formula in
fp64 exceeds ``verify``'s limit and twice plain PyTorch's own error in the same dtype: over all of a tensor, or five
times that in any square of 64 x 64 of it, so that one wrong tile shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch, ops
from ..core.dropout import keep_mask, new_seed
from ..core.operands import TENSORS, Operands, Problem
from . import verify

PLAIN_FACTOR = 2.0
ROWS = (13, 101, 16389)
SQUARE, SQUARE_FACTOR = 64, 5.0
EXACT = 1 << 34  # M·N·K up to which the reference is in fp64; above it, for 16-bit calls, in fp32
NORM_LIMIT = 1e-3  # of a norm that is summed in fp32 from what the weight's dtype holds
FP64_LIMIT = 1e-6  # in the interpreter, where scalars reach a kernel in fp32


def draw(p: Problem, device: torch.device, seed: int = 0) -> tuple[Operands, Tensor]:
    """Operands of the problem's sizes and dtypes, and a gradient dy (M, N)."""
    rng = torch.Generator(device).manual_seed(seed)
    wide = p.adapter_dtype or p.dtype

    def normal(*shape: int, scale: float = 1.0, plus: float = 0.0, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device).mul_(scale).add_(plus).to(dtype)

    made: dict[str, Callable[[], Tensor]] = {
        "x": lambda: normal(p.M, p.K, dtype=p.dtype),
        "w": lambda: normal(p.N, p.K, scale=p.K**-0.5, dtype=p.dtype),
        "c": lambda: normal(p.M, p.N, dtype=p.dtype),
        "bias": lambda: normal(p.N),
        "d_in": lambda: normal(p.K, scale=0.1, plus=1.0),
        "d_out": lambda: normal(p.N, scale=0.1, plus=1.0),
        "A": lambda: normal(p.r, p.K, scale=p.K**-0.5),
        "a": lambda: normal(p.r, scale=0.1),
        "G": lambda: normal(p.r, *(p.r,) * (p.G == "matrix")),
        "B": lambda: normal(p.N, p.r, scale=p.r**-0.5),
    }
    o = Operands(**{name: make() for name, make in made.items() if name in p.present})
    scalars = {"s": 0.5, "p": p.p, "h": p.h, "scale_bias": p.scale_bias, "drop_base": p.drop_base}
    return o._replace(**scalars, hadamard=p.hadamard, seed=new_seed(device) if p.p else None), normal(
        p.M, p.N, dtype=p.dtype
    )


def trained(o: Operands, bias: bool = False) -> list[str]:
    """The operands whose gradients training asks for: all but the frozen weight, and the bias where it is frozen too.
    Which kernels run depends on it."""
    names = ("x", "c", *(["bias"] if bias else []), "d_in", "d_out", "A", "a", "G", "B")
    return [n for n in names if getattr(o, n) is not None]


def _of_backend(backend: dispatch.Backend, o: Operands, dy: Tensor, names: list[str]) -> dict[str, Tensor]:
    y, T, z = backend.forward(o, o.d_out is not None)
    grads = backend.backward(dy, o, T, z, tuple(n in names for n in Operands._fields[:TENSORS]))
    given = {n: g for n, g in zip(Operands._fields, grads, strict=False) if g is not None}
    return {"y": y, **{f"d{n}": given.get(n, torch.zeros_like(getattr(o, n))) for n in names}}


def _of_formula(o: Operands, dy: Tensor, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The expression of ``core.factors`` and autograd, every tensor in one dtype."""
    cast = {n: t.detach().to(dtype) for n, t in zip(o._fields, o, strict=True) if isinstance(t, Tensor) and n != "seed"}
    leaves = {n: cast[n].requires_grad_() for n in names}
    f = o._replace(**cast).factors()
    keep = keep_mask(o.seed, o.x.shape, o.p) if o.p else None
    with torch.enable_grad():
        y = f.expression(cast["x"], cast.get("w"), cast.get("bias"), cast.get("c"), keep)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype), allow_unused=True)
    found = {f"d{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
    return {"y": y.detach(), **found}


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative Frobenius error, and the largest of a square's rms error over the whole tensor's rms."""
    value, exact = value.to(exact.dtype), exact.reshape(value.shape)
    if not exact.numel():
        return 0.0, 0.0
    off = (value - exact).square().reshape(1, 1, *(exact.shape if exact.dim() == 2 else (1, -1)))
    rms = exact.square().mean().clamp_min(1e-300 if exact.dtype == torch.float64 else 1e-30)
    worst = F.avg_pool2d(off, [min(SQUARE, n) for n in off.shape[2:]], ceil_mode=True, count_include_pad=False).max()
    found = (off.mean() / rms).sqrt().item(), (worst / rms).sqrt().item()
    return tuple(e if e == e else float("inf") for e in found)


def disagreement(backend: dispatch.Backend, o: Operands, dy: Tensor, bias: bool = False) -> str | None:
    """The first tensor that a backend gets wrong on these operands, and by how much; None when all are right. bias:
    whether its gradient is asked for too."""
    names = trained(o, bias)
    got = _of_backend(backend, o, dy, names)
    wide = torch.float64 if o.x.dtype.itemsize > 2 or dy.numel() * o.x.shape[-1] <= EXACT else torch.float32
    before = torch.backends.cuda.matmul.fp32_precision
    if wide == torch.float32:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        exact = _of_formula(o, dy, names, wide)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    plain = _of_formula(o, dy, names, o.x.dtype)
    for name, reference in exact.items():
        found, plains = errors(got[name], reference), errors(plain[name], reference)
        limit = verify.LIMITS.get(o.x.dtype, FP64_LIMIT)
        for error, own, allowed, where in zip(
            found, plains, (limit, SQUARE_FACTOR * limit), ("", f" in one square of {SQUARE}"), strict=True
        ):
            if error > max(allowed, PLAIN_FACTOR * own):
                return f"{name} is off by {error:.1e}{where} (plain PyTorch: {own:.1e})"
    return None


def _norms(backend: dispatch.Backend, p: Problem, device: torch.device) -> str | None:
    """‖W + s·B A‖ per row, which DoRA's scale is divided by."""
    o, _ = draw(replace(p, present=frozenset({"w", "A", "B"})), device)
    got = backend.row_norm(o.w, o.w.double().square().sum(1).float(), o.A, o.B, o.s).double()
    exact = (o.w.double() + o.s * (o.B.double() @ o.A.double())).norm(dim=1)
    error, worst = errors(got, exact)
    return None if worst <= NORM_LIMIT else f"the norm of rows is off by {error:.1e}"


def _replayed(p: Problem, device: torch.device) -> str | None:
    """Where a call that is replayed differs, in any bit, from the same one through Python, whichever backend it is
    computed by; None also where nothing is replayed."""
    o, dy = draw(p, device)
    leaves = [getattr(o, n).requires_grad_() for n in trained(o)]

    def step() -> list[Tensor]:
        y = ops.linear(o.x, o.w, o.factors(), o.bias, o.c, seed=o.seed)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for name, backend in dispatch.backends().items():
        with dispatch.forcing(name):
            if backend.available() or backend.reasons(p):
                continue
            first = step()
            for _ in range(3):  # seen, made a plan of, replayed
                for what, got, right in zip(("y", *trained(o)), step(), first, strict=True):
                    if not torch.equal(got, right):
                        return f"{what} replayed is not {what} through Python ({name})"
    return None


def shapes(p: Problem, many: bool) -> list[Problem]:
    """The problem itself, then sizes at which no tile is full, on few rows and on more, since which kernels run depends
    on the rows; ``many``: on as many as only a GPU computes in no time, too."""
    odd = lambda n, most: max(1, min(n, most) // 8 * 8 - 3)  # noqa: E731
    smaller = replace(p, M=ROWS[1], N=odd(p.N, 344), K=odd(p.K, 280))
    aligned = replace(p, N=min(p.N, 328), K=min(p.K, 264))
    rows = ROWS if many else ROWS[:2]
    return list(dict.fromkeys([p, smaller, *(replace(aligned, M=M) for M in rows)]))


def failure(name: str, p: Problem, device: torch.device) -> str | None:
    """Why backend ``name`` must not compute calls like p on this device; None when every result is right, on p's sizes
    and on odd ones. What a kernel raises is a failure too; OutOfMemoryError is raised, since it says nothing about it.
    """
    if name == "replay":
        return _replayed(p, device)
    backend = dispatch.backends()[name]
    for number, shape in enumerate(shapes(p, device.type == "cuda")):
        with dispatch.forcing(name):  # that it was not tested yet is no reason here
            if shape != p and backend.reasons(shape):
                continue  # a size that it never gets
        try:
            wrong = disagreement(backend, *draw(shape, device), bias=number % 2 == 1)
            if not wrong and shape.r and "d_out" in shape.present:
                wrong = _norms(backend, shape, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            wrong = f"{type(e).__name__}: {e}".splitlines()[0][:300]
        if wrong:
            return f"{wrong}, on {shape.M} x {shape.K} x {shape.N}, r={shape.r}"
    return None
