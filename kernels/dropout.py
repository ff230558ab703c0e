"""keep(e) of ``core.dropout`` on the GPU: the same bits, two elements a hash, recomputed where needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch


@triton.jit
def _hash(seed_ptr, word):
    """The 32 bits of a word (uint32)."""
    h = word ^ tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 17)) * 0xED5AD4BB
    h = h ^ tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 11)) * 0xAC4C1B51
    h = (h ^ (h >> 15)) * 0x31848BAB
    return h ^ (h >> 14)


@triton.jit
def keep(seed_ptr, element, threshold):
    """True where the row-major element (any int32 tensor) is kept; seed_ptr: two int32 words."""
    h = _hash(seed_ptr, element.to(tl.uint32) >> 1)
    half = tl.where((element & 1) == 0, h, h >> 16) & 0xFFFF
    return half.to(tl.uint16).to(tl.int16, bitcast=True).to(tl.int32) >= threshold


@triton.jit
def keep_tile(
    seed_ptr, row, col, width, threshold, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """keep() of the ROWS x COLS tile at (row, col) of a matrix of that width; EVEN width: one hash for two elements."""
    rows = (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None] * width
    if EVEN:
        h = _hash(seed_ptr, (rows + (col + 2 * tl.arange(0, COLS // 2)).to(tl.uint32)[None, :]) >> 1)
        half = tl.interleave(h & 0xFFFF, h >> 16)
        return half.to(tl.uint16).to(tl.int16, bitcast=True).to(tl.int32) >= threshold
    else:
        return keep(seed_ptr, rows + (col + tl.arange(0, COLS)).to(tl.uint32)[None, :], threshold)


@triton.jit
def split(x_ptr, kept_ptr, rest_ptr, seed_ptr, threshold, rescale, n, BLOCK: tl.constexpr):
    """kept (n,) = x where it is kept, times rescale; rest = x − kept. n below 2³²; x contiguous."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < n, other=0.0)
    kept = tl.where(keep(seed_ptr, element.to(tl.uint32), threshold), x * rescale, 0.0).to(x.dtype)
    tl.store(kept_ptr + element, kept, mask=element < n)
    tl.store(rest_ptr + element, x - kept, mask=element < n)


@triton.jit
def keep_mask(out_ptr, seed_ptr, n, threshold, BLOCK: tl.constexpr):
    """out (n,) int8: the mask itself. n below 2³²."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + element, keep(seed_ptr, element.to(tl.uint32), threshold).to(tl.int8), mask=element < n)


def parts(x: Tensor, seed: Tensor, threshold: int, rescale: float) -> tuple[Tensor, Tensor]:
    """(drop(x)·rescale, x less that), each like the contiguous x."""
    kept, rest = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        args = {
            "x_ptr": x, "kept_ptr": kept, "rest_ptr": rest, "seed_ptr": seed, "threshold": threshold,
            "rescale": rescale, "n": x.numel(), "BLOCK": 1024,
        }  # fmt: skip
        grid = (configs.tiles(x.numel(), 1024),)
        launch.submit(split, grid, args, configs.Config(0, 0, 0, 4, 1), x.device)
    return kept, rest


def mask(seed: Tensor, n: int, threshold: int) -> Tensor:
    """(n,), True where an element is kept."""
    out = torch.empty(n, dtype=torch.int8, device=seed.device)
    if n:
        args = {"out_ptr": out, "seed_ptr": seed, "n": n, "threshold": threshold, "BLOCK": 1024}
        launch.submit(keep_mask, (configs.tiles(n, 1024),), args, configs.Config(0, 0, 0, 4, 1), seed.device)
    return out.view(torch.bool)
