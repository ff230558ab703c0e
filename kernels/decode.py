"""decode: W (N, K) = (value of the code − zero) · scale, of a quantised weight: in fp32, rounded once.

    codes    (N, K) int8 or e4m3, or two to a byte, each a place in a table of 16
    scales   one for each block of rows × columns: floats, e8m0 bytes (2^(byte − 127)), or nested: places in a table of
             256, times a scale of their own, plus an offset

What is blocked in runs of its elements whatever the rows, as bitsandbytes does it, is a matrix with a run in a row.
Products and sums are not fused, so that the bits are PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .tile import place

ELEMENTS, COLUMNS = 4096, 256  # of a tile; at most
ALL = 1 << 30  # rows or columns of a block that holds them all, however many they are
E4M3 = torch.float8_e4m3fn
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCALES = (*DTYPES, torch.uint8, torch.float8_e8m0fnu)


@triton.jit
def _e4m3(byte):
    """The value of an e4m3 byte, fp32: its exponent and mantissa as fp32's, whose bias is 120 above its own. By hand
    since the conversion is missing below sm_89."""
    bits = byte.to(tl.int32)
    low = bits & 0x7F
    value = (low << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(low == 0x7F, float("nan"), value)


@triton.jit
def _scales(scales_ptr, table2_ptr, scales2_ptr, offset_ptr, by, at, inside, BLOCK2: tl.constexpr):
    """The scales at these places, fp32."""
    s = tl.load(scales_ptr + at, mask=inside, other=0)
    if table2_ptr is not None:
        own = tl.load(scales2_ptr + at // BLOCK2, mask=inside, other=0.0)
        return tl.load(table2_ptr + s.to(tl.int32)) * own + tl.load(offset_ptr)
    elif s.dtype == tl.uint8:
        return tl.where(s == 0, 0x400000, s.to(tl.int32) << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    else:
        return s.to(tl.float32) * by


@triton.jit
def _spread(s, GROUP: tl.constexpr):
    """Each column GROUP times side by side."""
    if s.shape[1] == 1 or GROUP == 1:
        return s
    else:
        wide = s[:, :, None].broadcast_to([s.shape[0], s.shape[1], GROUP])
        return wide.reshape([s.shape[0], s.shape[1] * GROUP])


@triton.jit
def values(
    codes_ptr, table_ptr, scales_ptr, zeros_ptr, table2_ptr, scales2_ptr, offset_ptr, by, i_n, i_k,
    N, K, half, elements,
    E4M3: tl.constexpr, HIGH_FIRST: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK2: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The i_n-th, i_k-th tile (BN, BK) of W in fp32, finite outside of W where W is; which places lie inside; and where
    it starts. half = K // 2. RAGGED: the last row ends after ``elements`` in all. GROUP columns have one scale."""
    n, k = i_n * BN, i_k * BK
    i, j = tl.arange(0, BN), tl.arange(0, BK)
    start = (tl.full((), 0, tl.int64) + n) * K + k
    inside = (n + i < N)[:, None] & (k + j < K)[None, :]
    if RAGGED:
        inside &= i[:, None] * K + j[None, :] < elements - start
    if table_ptr is not None:
        first = (tl.full((), 0, tl.int64) + n) * half + i_k * (BK // 2)
        byte = tl.arange(0, BK // 2)
        there = (n + i < N)[:, None] & (i_k * (BK // 2) + byte < half)[None, :]
        if RAGGED:
            there &= i[:, None] * half + byte[None, :] < (elements + 1) // 2 - first
        codes = tl.load(codes_ptr + first + i[:, None] * half + byte[None, :], mask=there, other=0).to(tl.int32)
        high, low = tl.load(table_ptr + (codes >> 4)), tl.load(table_ptr + (codes & 15))
        value = tl.interleave(high, low) if HIGH_FIRST else tl.interleave(low, high)
    else:
        codes = tl.load(codes_ptr + start + i[:, None] * K + j[None, :], mask=inside, other=0)
        value = _e4m3(codes) if E4M3 else codes.to(tl.float32)
    column = k + GROUP * tl.arange(0, BK // GROUP)
    band = ((n + i) // BLOCK_ROWS).to(tl.int64) * tl.cdiv(K, BLOCK_COLUMNS)
    block = band[:, None] + (column // BLOCK_COLUMNS)[None, :]
    known = (n + i < N)[:, None] & (column < K)[None, :]
    if zeros_ptr is not None:
        value -= _spread(tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32), GROUP)
    scale = _scales(scales_ptr, table2_ptr, scales2_ptr, offset_ptr, by, block, known, BLOCK2)
    return value * _spread(scale, GROUP), inside, start


@triton.jit
def decode(
    codes_ptr, table_ptr, scales_ptr, zeros_ptr, table2_ptr, scales2_ptr, offset_ptr, out_ptr, by,
    N, K, half, elements,
    E4M3: tl.constexpr, HIGH_FIRST: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK2: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (N, K)."""
    i_n, i_k = place(tl.program_id(0), N, K, BN, BK, 1)
    value, inside, start = values(
        codes_ptr, table_ptr, scales_ptr, zeros_ptr, table2_ptr, scales2_ptr, offset_ptr, by, i_n, i_k,
        N, K, half, elements, E4M3, HIGH_FIRST, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK2, GROUP, BN, BK,
    )  # fmt: skip
    at = tl.arange(0, BN)[:, None] * K + tl.arange(0, BK)[None, :]
    tl.store(out_ptr + start + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def read_as(
    codes: Tensor, scales: Tensor, shape: tuple[int, int], block: tuple[int, int] | int, table: Tensor | None,
    high_first: bool, zeros: Tensor | None, nested: tuple[Tensor, Tensor, Tensor, int] | None, by: float,
    BN: int, BK: int,
) -> dict:  # fmt: skip
    """The arguments by which ``values`` reads tiles (BN, BK)."""
    (N, K), block = shape, tuple(ALL if size >= n else size for size, n in zip(block, shape, strict=True))
    table2, scales2, offset, block2 = (None, None, None, 1) if nested is None else nested
    byte = lambda t: t.view(torch.uint8) if t.dtype.itemsize == 1 and t.dtype != torch.int8 else t  # noqa: E731
    return {
        "codes_ptr": codes.view(torch.uint8) if table is not None else byte(codes), "table_ptr": table,
        "scales_ptr": byte(scales), "zeros_ptr": zeros, "table2_ptr": table2, "scales2_ptr": scales2,
        "offset_ptr": offset, "by": by, "N": N, "K": K, "half": K // 2, "E4M3": codes.dtype == E4M3,
        "HIGH_FIRST": high_first, "BLOCK_ROWS": block[0], "BLOCK_COLUMNS": block[1], "BLOCK2": block2,
        "GROUP": min(BK, block[1] & -block[1]), "BN": BN, "BK": BK,
    }  # fmt: skip


def decoded(
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int] | int,
    table: Tensor | None = None,
    high_first: bool = True,
    zeros: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
    by: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W (N, K) in one of DTYPES, of contiguous tensors: ``core.frozen.Coded`` says what they are."""
    N, K = shape
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    if isinstance(block, int):
        rows, columns = configs.tiles(N * K, block), block
        block = 1, block
    else:
        rows, columns = shape
    BK = min(COLUMNS, max(16, 1 << (columns - 1).bit_length()))
    BN = ELEMENTS // BK
    args = read_as(codes, scales, (rows, columns), block, table, high_first, zeros, nested, by, BN, BK)
    args |= {"out_ptr": out, "elements": N * K, "RAGGED": rows * columns > N * K}
    grid = (configs.tiles(rows, BN) * configs.tiles(columns, BK),)
    launch.submit(decode, grid, args, Config(BN, BK, 0, 4, 1, fuse=False), out.device)
    return out
