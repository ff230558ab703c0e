"""hadamard: y = x (W ⊙ (1 + s·B A))ᵀ + bias with the weight formed tile by tile, and the gradients of A and B. (LieRA.)

Up to FEW_ROWS rows the tiles are formed inside the GEMM, which reads W once; above, where every row tile would form
them anew, ``form`` writes the weight once and one plain GEMM follows. With E = W ⊙ (dyᵀ x), of which only tiles exist:
dA = s·Bᵀ E, dB = s·E Aᵀ, in two stages of fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .outer import added_up
from .tile import dot, matrix, place, put, vector

FEW_ROWS = 128


@triton.jit
def _formed(
    w_ptr, left_ptr, right_ptr, row, col, N, K, R, w_n, w_k, left_n, left_r, right_r, right_k, scale,
    DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The tile of (W ⊙ (1 + scale·left right))ᵀ at (row of K, column of N)."""
    factor = tl.zeros((BK, BN), ACC)
    for r0 in tl.range(0, R, BR, num_stages=1):
        right = matrix(right_ptr, row, r0, K, R, right_k, right_r, BK, BR).to(DTYPE)
        left = matrix(left_ptr, r0, col, R, N, left_r, left_n, BR, BN).to(DTYPE)
        factor = dot(right, left, factor, PRECISION)
    w = matrix(w_ptr, row, col, K, N, w_k, w_n, BK, BN)
    return (w.to(ACC) * (1 + scale * factor)).to(DTYPE)


@triton.jit
def form(
    w_ptr, left_ptr, right_ptr, out_ptr, scale, N, K, R, w_n, w_k, left_n, left_r, right_r, right_k,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out (N, K) = W ⊙ (1 + scale·left right), left (N, R), right (R, K)."""
    n, k = tl.program_id(0) * BN, tl.program_id(1) * BK
    w = _formed(
        w_ptr, left_ptr, right_ptr, k, n, N, K, R, w_n, w_k, left_n, left_r, right_r, right_k, scale,
        w_ptr.dtype.element_ty, ACC, PRECISION, BK, BN, BR,
    )  # fmt: skip
    put(out_ptr, w, k, n, K, N, 1, K, BK, BN)


@triton.jit(do_not_specialize=["M"])
def hadamard(
    x_ptr, w_ptr, left_ptr, right_ptr, bias_ptr, y_ptr, scale,
    M, N, K, R, x_m, x_k, w_n, w_k, left_n, left_r, right_r, right_k,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (W ⊙ (1 + scale·left right))ᵀ + bias; left (N, R), right (R, K): B and A, or their transposes for dx."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    i_m, i_n = place(tl.program_id(0), M, N, BM, BN, GROUP)
    m, n = i_m * BM, i_n * BN
    acc = tl.zeros((BM, BN), ACC)
    for k0 in range(0, K, BK):
        w = _formed(
            w_ptr, left_ptr, right_ptr, k0, n, N, K, R, w_n, w_k, left_n, left_r, right_r, right_k, scale,
            DTYPE, ACC, PRECISION, BK, BN, BR,
        )  # fmt: skip
        acc = dot(matrix(x_ptr, m, k0, M, K, x_m, x_k, BM, BK), w, acc, PRECISION)
    if bias_ptr is not None:
        acc += vector(bias_ptr, n + tl.arange(0, BN), N).to(ACC)[None, :]
    put(y_ptr, acc.to(DTYPE), m, n, M, N, N, 1, BM, BN)


@triton.jit(do_not_specialize=["M"])
def hadamard_grads(
    dy_ptr, x_ptr, w_ptr, a_ptr, b_ptr, da_ptr, db_ptr, scale,
    M, N, K, R, dy_m, dy_n, x_m, x_k, w_n, w_k, a_r, a_k, b_n, b_r,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of E, and its parts: da (tiles of N, R, K), db (tiles of K, N, R)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    i_n, i_k = place(tl.program_id(0), N, K, BN, BK, GROUP)
    n, k = i_n * BN, i_k * BK
    acc = tl.zeros((BN, BK), ACC)
    for m0 in range(0, M, BM):
        dy = matrix(dy_ptr, m0, n, M, N, dy_m, dy_n, BM, BN)
        acc = dot(tl.trans(dy), matrix(x_ptr, m0, k, M, K, x_m, x_k, BM, BK), acc, PRECISION)
    e = (acc * matrix(w_ptr, n, k, N, K, w_n, w_k, BN, BK).to(ACC)).to(DTYPE)
    wide = tl.full((), 0, tl.int64)
    for r0 in range(0, R, BR):
        b = matrix(b_ptr, r0, n, R, N, b_r, b_n, BR, BN).to(DTYPE)
        da = dot(b, e, tl.zeros((BR, BK), ACC), PRECISION) * scale
        put(da_ptr + (wide + i_n) * R * K, da, r0, k, R, K, K, 1, BR, BK)
        a = matrix(a_ptr, k, r0, K, R, a_k, a_r, BK, BR).to(DTYPE)
        db = dot(e, a, tl.zeros((BN, BR), ACC), PRECISION) * scale
        put(db_ptr + (wide + i_k) * N * R, db, n, r0, N, R, R, 1, BN, BR)


@configs.closed_form("hadamard")
def config_of_hadamard(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    return Config(min(configs.bucket(M), 64), 64, 32, 4, 2)


@configs.closed_form("form")
def config_of_form(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    return Config(0, 32 if bits > 16 else 64, 64, 8 if arch >= (12, 0) else 4, 1)


@configs.closed_form("hadamard_grads")
def config_of_grads(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """BM: rows summed over."""
    if bits > 16 or arch[0] not in (9, 10):
        return Config(64, 64, 32 if bits > 16 else 64, 8, 2)
    return Config(64, 128, 128, 8, 3)


def _common(x: Tensor, w: Tensor, scale: float, M: int, R: int, kind: str):
    N, K = w.shape
    config = configs.choose(kind, launch.arch_of(x.device), 8 * x.element_size(), M, N, K, R)
    args = {
        "x_ptr": x, "w_ptr": w, "scale": scale, "M": M, "N": N, "K": K, "R": R, "x_m": x.stride(0),
        "x_k": x.stride(1), "w_n": w.stride(0), "w_k": w.stride(1),
        "PRECISION": launch.precision(x.dtype), "ACC": launch.acc(x.dtype),
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "BR": configs.rank_tile(R, 64), "GROUP": config.group,
    }  # fmt: skip
    return config, args


def _two(left: Tensor, right: Tensor) -> dict:
    """The arguments of the two factors."""
    (left_n, left_r), (right_r, right_k) = left.stride(), right.stride()
    return {
        "left_ptr": left, "right_ptr": right,
        "left_n": left_n, "left_r": left_r, "right_r": right_r, "right_k": right_k,
    }  # fmt: skip


def product(x: Tensor, w: Tensor, left: Tensor, right: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """x (M, K) times (w ⊙ (1 + scale·left right))ᵀ, w (N, K) in any strides, left (N, R), right (R, K) -> (M, N)."""
    (M, _), N = x.shape, w.shape[0]
    if M > FEW_ROWS:
        return F.linear(x, formed(w, left, right, scale), bias if bias is None else bias.to(x.dtype))
    y = x.new_empty(M, N)
    if M:
        config, args = _common(x, w, scale, M, left.shape[1], "hadamard")
        args |= _two(left, right) | {"bias_ptr": bias, "y_ptr": y}
        grid = (configs.tiles(M, config.BM) * configs.tiles(N, config.BN),)
        launch.submit(hadamard, grid, args, config, x.device)
    return y


def formed(w: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """w ⊙ (1 + scale·left right) in w's dtype and layout; w (N, K), left (N, R), right (R, K)."""
    if w.stride(1) != 1 and w.stride(0) == 1:
        return formed(w.t(), right.t(), left.t(), scale).t()
    (N, K), R = w.shape, left.shape[1]
    out = w.new_empty(N, K)
    config, args = _common(w, w, scale, N, R, "form")
    args |= _two(left, right) | {"out_ptr": out}
    launch.submit(form, (configs.tiles(N, config.BN), configs.tiles(K, config.BK)), args, config, w.device)
    return out


def gradients(dy: Tensor, x: Tensor, w: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dA (R, K), dB (N, R)) in fp32; dy (M, N), x (M, K), w (N, K)."""
    (N, K), R, M = w.shape, A.shape[0], x.shape[0]
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    if not M:
        return torch.zeros(R, K, **wide), torch.zeros(N, R, **wide)
    config, args = _common(x, w, scale, M, R, "hadamard_grads")
    tiles_n, tiles_k = configs.tiles(N, config.BN), configs.tiles(K, config.BK)
    da, db = torch.empty(tiles_n, R * K, **wide), torch.empty(tiles_k, N * R, **wide)
    args |= {
        "dy_ptr": dy, "a_ptr": A, "b_ptr": B, "da_ptr": da, "db_ptr": db, "dy_m": dy.stride(0), "dy_n": dy.stride(1),
        "a_r": A.stride(0), "a_k": A.stride(1), "b_n": B.stride(0), "b_r": B.stride(1),
    }  # fmt: skip
    grid = (tiles_n * tiles_k,)
    launch.submit(hadamard_grads, grid, args, config, x.device)
    dA, dB = added_up(da, db)
    return dA.view(R, K), dB.view(N, R)
