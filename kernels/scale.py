"""scale: a matrix times a vector along its columns, in one pass. ``absorbed`` makes x ⊙ d or W ⊙ d for x diag(d) Wᵀ."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .tile import matrix, put, vector

TILE = 16, 256


@triton.jit(do_not_specialize=["M"])
def scale(
    x_ptr, d_ptr, out_ptr, M, N, x_m, ROWS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """out (M, N) = x times d (N,), or d (M,) if ROWS; computed in ACC, rows of x contiguous."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    x = matrix(x_ptr, m, n, M, N, x_m, 1, BM, BN)
    if ROWS:
        d = vector(d_ptr, m + tl.arange(0, BM), M).to(ACC)[:, None]
    else:
        d = vector(d_ptr, n + tl.arange(0, BN), N).to(ACC)[None, :]
    put(out_ptr, (x.to(ACC) * d).to(x.dtype), m, n, M, N, N, 1, BM, BN)


def scaled(t: Tensor, d: Tensor) -> Tensor:
    """t ⊙ d in t's dtype: t (M, N) whose rows or columns are contiguous, d (N,) contiguous; stored as t is."""
    across = t.stride(1) != 1
    stored = t.t() if across else t
    out = stored.new_empty(stored.shape)
    if out.numel():
        (M, N), (BM, BN) = out.shape, TILE
        args = {
            "x_ptr": stored, "d_ptr": d, "out_ptr": out, "M": M, "N": N, "x_m": stored.stride(0), "ROWS": across,
            "ACC": launch.acc(t.dtype), "BM": BM, "BN": BN,
        }  # fmt: skip
        grid = (configs.tiles(M, BM), configs.tiles(N, BN))
        launch.submit(scale, grid, args, Config(BM, BN, 0, 4, 1), t.device)
    return out.t() if across else out


def absorbed(x: Tensor, w: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x ⊙ d, w) or (x, w ⊙ d), whichever is the smaller copy; x (M, K), w (N, K), d (K,)."""
    if d is None:
        return x, w
    lies = 1 in w.stride()
    return (x, scaled(w, d)) if lies and w.shape[0] <= x.shape[0] else (scaled(x, d), w)
