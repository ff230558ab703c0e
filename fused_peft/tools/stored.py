"""Whether frozen weights in parts are decoded right on the device at hand, and what is fastest for few rows.

A form is tested before its first weight is decoded by a kernel, and then each bit has to be PyTorch's. The product that
decodes in its loop is tested, and timed beside decoding first, by ``tools.calibrate``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import decode
from ..backends.triton import kernels
from ..core import frozen
from ..core.frozen import Coded, Form, Frozen
from ..core.operands import Problem
from ..model.plain import packed_kind
from . import selftest, verify

# N, K of weights that are decoded: the first by the machine code of any whose sizes are multiples of 32, the last where
# a row may begin inside a byte
WEIGHTS = ((160, 544), (37, 130), (7, 9))
ROWS = (1, 16)  # that products are measured for: with those a factor of four away, all that a kernel takes


def draw(form: Form, N: int, K: int, device: torch.device) -> Coded:
    """Random codes and scales of a form for a weight (N, K)."""
    rng = torch.Generator(device).manual_seed(N)
    random = lambda shape, low, high: torch.randint(low, high, shape, generator=rng, device=device)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=rng, device=device)  # noqa: E731
    block = form.block
    if isinstance(block, int):
        places = (-(-N * K // block),)
    else:
        block = tuple(b or n for b, n in zip(block, (N, K), strict=True))
        places = tuple(-(-n // b) for n, b in zip((N, K), block, strict=True))
    codes = random(((N * K + 1) // 2,) if form.table else (N, K), 0, 256).to(torch.uint8)
    if form.scales.itemsize > 1:
        scales = uniform(places).to(form.scales)
    else:
        scales = random(places, 0, 256 if form.nested else 140).to(torch.uint8)
        scales.view(-1)[0] = 0  # of e8m0, the one that is subnormal
        scales = scales.view(form.scales)
    nested = None
    if form.nested:
        nested = uniform(256) - 0.5, uniform(-(-places[0] // form.nested)), uniform(1), form.nested
    zeros = None if form.zeros is None else random(places, 0, 16).to(form.zeros)
    table = uniform(16) - 0.5 if form.table else None
    return Coded(
        codes if form.table else codes.view(form.codes), scales, (N, K), block, table, form.high_first, zeros, nested,
        1 / 127,
    )  # fmt: skip


def plainly(w: Coded, dtype: torch.dtype) -> Tensor:
    """W (N, K) by its formula, a value at a time."""
    (N, K), device = w.shape, w.codes.device
    if w.table is None:
        values = w.codes.float().flatten()
    else:
        byte = w.codes.view(torch.uint8).flatten().int()
        halves = (byte >> 4, byte & 15) if w.high_first else (byte & 15, byte >> 4)
        values = w.table[torch.stack(halves, 1).flatten()[: N * K]]
    at = torch.arange(N * K, device=device)
    if isinstance(w.block, int):
        at = at // w.block
    else:
        rows, columns = w.block
        at = at // K // rows * -(-K // columns) + at % K // columns
    scales = w.scales.flatten()
    if w.nested is not None:
        table, own, offset, block = w.nested
        scale = table[scales.int()] * own.repeat_interleave(block)[: scales.numel()] + offset
    elif scales.dtype.itemsize == 1:  # in fp64, where no power of two is subnormal
        scale = torch.exp2(scales.view(torch.uint8).double() - 127).float()
    else:
        scale = scales.float() * w.by
    zero = 0 if w.zeros is None else w.zeros.flatten().float()[at]
    return ((values - zero) * scale[at]).to(dtype).view(N, K)


def decoding(w: Coded, dtype: torch.dtype) -> str | None:
    """Why ``kernels.decode`` must not decode weights of w's form to a dtype on w's device: what it gets wrong, or what
    it raises; None when each bit of random ones, of odd sizes too, is PyTorch's."""
    odd = w.table is None or isinstance(w.block, int)
    for N, K in WEIGHTS if odd else WEIGHTS[:-1]:
        drawn = draw(w.form, N, K, w.codes.device)
        try:
            got, want = kernels().decode.decoded(*drawn, dtype=dtype), plainly(drawn, dtype)
            wrong = int(((got != want) & ~(got.isnan() & want.isnan())).sum())
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            return f"{type(e).__name__}: {e}".splitlines()[0][:300]
        if wrong:
            return f"{wrong} of {N * K} values of a {N} x {K} weight are not PyTorch's"
    return None


# Products of few rows


def problems(model: nn.Module, dtype: torch.dtype | None) -> list[Problem]:
    """Those with the model's weights in parts that the kernel can take, each once; dtype: of the activations."""
    found = {}
    for m in model.modules():
        kind = packed_kind(m)
        if not isinstance(kind, Frozen):
            continue
        W = kind.matrix(m)
        w, read = frozen.coded(W.spec, W.parts, whole=False), W.compute or dtype or W.dtype
        for M in ROWS if w is not None and decode.multiplies(w, max(ROWS), read) else ():
            found[decode.product_of(w, M, read)] = None
    return [*found]


def _rows(M: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random ones, whatever was drawn before."""
    rng = torch.Generator(device).manual_seed(M)
    return torch.randn(M, n, generator=rng, device=device).to(dtype)


def _exactly(w: Coded, x: Tensor, back: bool) -> Tensor:
    W = plainly(w, x.dtype).double()
    return x.double() @ (W if back else W.mT)


def failure(p: Problem, device: torch.device) -> str | None:
    """Why products like p must not decode in their loop: the first that is wrong, by how much, or what it raises; None
    where all are right, on p's sizes and on odd ones."""
    flat = p.stored.block if isinstance(p.stored.block, int) else 2
    for M, N, K in ((p.M, p.N, p.K), (1, 37, 3 * flat), (13, 130, max(flat, 136 // flat * flat)), (64, 257, 4 * flat)):
        try:
            w, limit = draw(p.stored, N, K, device), verify.LIMITS[p.dtype]
            for back in (False, True):
                x = _rows(M, N if back else K, p.dtype, device)
                exact = _exactly(w, x, back).nan_to_num()
                got = kernels().coded.multiplied(x, back, *w).nan_to_num()
                error, worst = selftest.errors(got, exact)
                if error > limit or worst > selftest.SQUARE_FACTOR * limit:
                    what = "dz W" if back else "x W^T"
                    return f"{what} is off by {max(error, worst / selftest.SQUARE_FACTOR):.1e}, on {M} x {K} x {N}"
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            return f"{type(e).__name__}: {e}".splitlines()[0][:300]
    return None


def step_of(p: Problem, device: torch.device) -> Callable[[], object]:
    """The product and its gradient in x; whether W is decoded in their loops follows from ``dispatch.set_backend``."""
    w = draw(p.stored, p.N, p.K, device)
    x, dz = (_rows(p.M, n, p.dtype, device) for n in (p.K, p.N))

    def product(x: Tensor, back: bool) -> Tensor:
        if (found := frozen.in_loop(w, x, back)) is not None:
            return found
        W = frozen.in_one_launch(w, p.dtype)
        W = plainly(w, p.dtype) if W is None else W
        return torch.mm(x, W if back else W.mT)

    return lambda: (product(x, False), product(dz, True))


def nbytes(p: Problem) -> int:
    """Of what a product reads and writes, scales left out."""
    return p.N * p.K // (2 if p.stored.table else 1) + p.dtype.itemsize * p.M * (p.N + p.K)
