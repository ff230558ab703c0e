"""coded: z = x Wᵀ or dx = dz W of few rows, W (N, K) decoded tile by tile in the loop instead of written and read back.

W's values are those of ``decode``, in x's dtype. Programs are few, so the loop is split among them, and ``finish`` adds
up their sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, decode, launch
from .configs import Config, tiles
from .decode import values
from .down import finish, shares_of
from .tile import dot, matrix, put

ROWS = 64  # at most
ADD_UP = 16, 64  # rows and columns of a tile of ``finish``
PROGRAMS = 4  # a processor: decoding is bound by issue, and one program leaves it waiting


@triton.jit(do_not_specialize=["M", "steps"])
def coded(
    x_ptr, codes_ptr, table_ptr, scales_ptr, zeros_ptr, table2_ptr, scales2_ptr, offset_ptr, out_ptr, part_ptr, by,
    M, N, K, half, steps, x_m, x_k,
    BACK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, E4M3: tl.constexpr, HIGH_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK2: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (M, N) of x (M, K); BACK: out (M, K) of x (M, N). A program takes a tile's width of out, and ``steps`` tiles
    of what is summed over; where others take the rest, its sums go to part (shares, M, width of out)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    at, share = tl.program_id(0), tl.program_id(1)
    first = share * steps
    if part_ptr is not None:
        out_ptr = part_ptr + share * M * (K if BACK else N)
    # forward W's rows fill the tensor cores' rows, which few of x's would not
    acc = tl.zeros((BM, BK), ACC) if BACK else tl.zeros((BN, BM), ACC)
    for step in range(first, min(first + steps, tl.cdiv(N, BN) if BACK else tl.cdiv(K, BK))):
        w, _, _ = values(
            codes_ptr, table_ptr, scales_ptr, zeros_ptr, table2_ptr, scales2_ptr, offset_ptr, by,
            step if BACK else at, at if BACK else step, N, K, half, 0,
            E4M3, HIGH_FIRST, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK2, GROUP, BN, BK,
        )  # fmt: skip
        if BACK:
            acc = dot(matrix(x_ptr, 0, step * BN, M, N, x_m, x_k, BM, BN), w.to(DTYPE), acc, PRECISION)
        else:
            acc = dot(w.to(DTYPE), matrix(x_ptr, step * BK, 0, K, M, x_k, x_m, BK, BM), acc, PRECISION)
    if BACK:
        put(out_ptr, acc.to(out_ptr.dtype.element_ty), 0, at * BK, M, K, K, 1, BM, BK)
    else:
        put(out_ptr, acc.to(out_ptr.dtype.element_ty), at * BN, 0, N, M, 1, N, BN, BM)


@configs.closed_form("coded")
def config_of_coded(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """Tiles of W of 8192 values, 64 a thread; half as many beside 64 rows, and on sm_120, whose registers spill. No
    product and sum of a value's fused, or its bits are not PyTorch's."""
    BM, spills = configs.bucket(M), arch >= (12, 0)
    return Config(BM, 64, 64 if spills or BM == 64 else 128, *((8, 3) if spills else (4, 2)), fuse=False)


def multiplied(
    x: Tensor, back: bool, codes: Tensor, scales: Tensor, shape: tuple[int, int], block: tuple[int, int] | int,
    table: Tensor | None = None, high_first: bool = True, zeros: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None, by: float = 1.0,
) -> Tensor:  # fmt: skip
    """x Wᵀ (M, N), or ``back`` x W (M, K), in x's dtype, fp16 or bf16, of at most ROWS rows; the rest as
    ``core.frozen.Coded`` says, a block that is a number a divisor of K, and K even where a byte holds two."""
    (N, K), M = shape, x.shape[0]
    width, depth = (K, N) if back else (N, K)
    out = x.new_empty(M, width)
    if not M:
        return out
    config = configs.choose("coded", launch.arch_of(x.device), 8 * x.element_size(), M, N, K, 0)
    over, along = (config.BN, config.BK) if back else (config.BK, config.BN)
    grid, blocks = tiles(width, along), max(1, tiles(depth, over))
    steps = tiles(blocks, shares_of(grid, blocks, PROGRAMS * launch.processors(x.device)))
    shares = tiles(blocks, steps)
    part = x.new_empty(shares, M, width, dtype=torch.float32) if shares > 1 else None
    block = (1, block) if isinstance(block, int) else block
    args = decode.read_as(codes, scales, shape, block, table, high_first, zeros, nested, by, config.BN, config.BK)
    args |= {
        "x_ptr": x, "out_ptr": out, "part_ptr": part, "M": M, "steps": steps, "x_m": x.stride(0), "x_k": x.stride(1),
        "BACK": back, "ACC": launch.acc(x.dtype), "PRECISION": launch.precision(x.dtype), "BM": config.BM,
    }  # fmt: skip
    launch.submit(coded, (grid, shares), args, config, x.device)
    if shares > 1:
        rows, columns = ADD_UP
        args = {
            "part_ptr": part, "bias_ptr": None, "g_ptr": None, "t_ptr": out, "out_ptr": None, "scale": 1.0, "M": M,
            "R": width, "shares": shares, "g_in": 0, "g_out": 0, "H": "identity", "GATE": 0, "BACKWARD": False,
            "PRECISION": args["PRECISION"], "ACC": args["ACC"], "DTYPE": launch.TL[x.dtype], "TRIGGER": False,
            "BM": rows, "BR": columns, "DEEP": 128 // columns,
        }  # fmt: skip
        launch.submit(finish, (tiles(M, rows), tiles(width, columns)), args, Config(rows, 0, 0, 4, 1), x.device)
    return out
