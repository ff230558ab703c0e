"""row_norm: ‖W + s·B A‖ per row from ‖W‖², W Aᵀ and A Aᵀ; W + s·B A is never made. One read of W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .tile import dot, matrix, vector

MAX_RANK = 128  # one rank tile


@triton.jit
def row_norm(
    w_ptr, squared_ptr, a_ptr, b_ptr, aa_ptr, out_ptr, scale, N, K, R, w_n, w_k, a_r, a_k, b_n, b_r,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out (N,) = sqrt(max(0, squared + scale Σ_r (2 W Aᵀ + scale·B A Aᵀ) ⊙ B)); aa (R, R) contiguous."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    n = tl.program_id(0) * BN
    rows = n + tl.arange(0, BN)
    wa = tl.zeros((BN, BR), ACC)
    for k0 in range(0, K, BK):
        w = matrix(w_ptr, n, k0, N, K, w_n, w_k, BN, BK)
        wa = dot(w, matrix(a_ptr, k0, 0, K, R, a_k, a_r, BK, BR).to(DTYPE), wa, PRECISION)
    baa = tl.zeros((BN, BR), ACC)
    for r0 in tl.range(0, R, 16, num_stages=1):
        part = matrix(b_ptr, n, r0, N, R, b_n, b_r, BN, 16).to(ACC)
        baa = dot(part, matrix(aa_ptr, r0, 0, R, R, R, 1, 16, BR).to(ACC), baa, "ieee")
    b = matrix(b_ptr, n, 0, N, R, b_n, b_r, BN, BR).to(ACC)
    total = vector(squared_ptr, rows, N).to(ACC) + scale * tl.sum((2 * wa + scale * baa) * b, 1)
    tl.store(out_ptr + rows, tl.sqrt(tl.maximum(total, 0.0)), mask=rows < N)


@configs.closed_form("row_norm")
def config_of_row_norm(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    wide = bits > 16
    return Config(16, 0, 32 if wide else 64 if r > 64 else 128, 4, 2 if wide or r > 64 else 3)


def norm(w: Tensor, squared: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """(N,) in squared's dtype; w (N, K), squared (N,) = ‖W‖² per row, A (R, K), B (N, R)."""
    (N, K), R = w.shape, A.shape[0]
    wide = A.to(squared.dtype)
    out = torch.empty_like(squared)
    config = configs.choose("row_norm", launch.arch_of(w.device), 8 * w.element_size(), N, R, K, R)
    args = {
        "w_ptr": w, "squared_ptr": squared, "a_ptr": A, "b_ptr": B, "aa_ptr": wide @ wide.t(), "out_ptr": out,
        "scale": scale, "N": N, "K": K, "R": R, "w_n": w.stride(0), "w_k": w.stride(1), "a_r": A.stride(0),
        "a_k": A.stride(1), "b_n": B.stride(0), "b_r": B.stride(1),
        "PRECISION": launch.precision(w.dtype), "ACC": launch.acc(squared.dtype),
        "BN": config.BM, "BK": config.BK, "BR": configs.rank_tile(R),
    }  # fmt: skip
    launch.submit(row_norm, (configs.tiles(N, config.BM),), args, config, w.device)
    return out
