"""down: S = h(drop(x ⊙ d) Aᵀ·scale + a) Gᵀ in one read of x; and in backward dT = (scale·(dy ⊙ d) B G) ⊙ h'(T)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .dropout import keep_tile
from .tile import activate, dot, gate, matrix, put, slope, vector
from .triton_internals import gdc_launch_dependents


@triton.jit
def down(
    x_ptr, d_ptr, a_ptr, bias_ptr, g_ptr, t_ptr, out_ptr, seed_ptr, threshold, scale,
    M, K, R, x_m, x_k, a_r, a_k, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    EVEN: tl.constexpr, TRIGGER: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Forward: t (M, R) is written, and out where h or G follows. Backward: t is read, out written.
    TRIGGER: the launch that follows may begin once every program runs, if it waits itself for what is written here."""
    if TRIGGER:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m, r = tl.program_id(0) * BM, tl.program_id(1) * BR
    acc = tl.zeros((BM, BR), ACC)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = matrix(x_ptr, m, k0, M, K, x_m, x_k, BM, BK)
        if d_ptr is not None:
            x = (x.to(ACC) * vector(d_ptr, k, K).to(ACC)[None, :]).to(DTYPE)
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, m, k0, K, threshold, EVEN, BM, BK), x, 0.0)
        a = matrix(a_ptr, k0, r, K, R, a_k, a_r, BK, BR).to(DTYPE)
        acc = dot(x, a, acc, PRECISION)
    acc *= scale
    if BACKWARD:
        acc = gate(acc, g_ptr, r, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
        if H != "identity":
            acc *= slope(matrix(t_ptr, m, r, M, R, R, 1, BM, BR).to(ACC), H)
        put(out_ptr, acc.to(DTYPE), m, r, M, R, R, 1, BM, BR)
    else:
        if bias_ptr is not None:
            acc += vector(bias_ptr, r + tl.arange(0, BR), R).to(ACC)[None, :]
        put(t_ptr, acc.to(DTYPE), m, r, M, R, R, 1, BM, BR)
        if out_ptr is not None:
            u = gate(activate(acc, H), g_ptr, r, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
            put(out_ptr, u.to(DTYPE), m, r, M, R, R, 1, BM, BR)


@configs.closed_form("down")
def config_of_down(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """The closed form."""
    wide = bits > 16  # fp32 runs without wgmma, or through tf32
    depth = 32 if wide and r > 64 else 64 if wide or r > 32 else 128
    few = M < 4096 or (wide and r > 64)  # short tiles, so that there are programs enough for the memory
    tall = 16 if few else 32 if wide or r > 32 or M < 8192 else 64
    return Config(tall, 0, depth, 8 if wide and r > 64 else 4, 2 if wide or r > 64 else 3)


def _submit(x, d, A, bias, G, T, out, seed, threshold, scale, h, backward, trigger):
    M, K = x.shape
    R = A.shape[0]
    arch = launch.arch_of(x.device)
    config = configs.choose("down", arch, 8 * x.element_size(), M, R, K, R)
    BR = configs.rank_tile(R)
    g_in, g_out = (0, 0) if G is None or G.dim() == 1 else G.stride() if backward else G.stride()[::-1]
    args = {
        "x_ptr": x, "d_ptr": d, "a_ptr": A, "bias_ptr": bias, "g_ptr": G, "t_ptr": T, "out_ptr": out, "seed_ptr": seed,
        "threshold": threshold, "scale": scale, "M": M, "K": K, "R": R,
        "x_m": x.stride(0), "x_k": x.stride(1), "a_r": A.stride(0), "a_k": A.stride(1), "g_in": g_in, "g_out": g_out,
        "EVEN": K % 2 == 0, "TRIGGER": trigger and not launch.interpreting(),
        "H": h, "GATE": 0 if G is None else G.dim(), "BACKWARD": backward,
        "PRECISION": launch.precision(x.dtype), "ACC": launch.acc(x.dtype), "BM": config.BM, "BK": config.BK, "BR": BR,
    }  # fmt: skip
    launch.submit(down, (configs.tiles(M, config.BM), configs.tiles(R, BR)), args, config, x.device)


def project(
    x: Tensor, d: Tensor | None, A: Tensor, a: Tensor | None, G: Tensor | None, h: str,
    seed: Tensor | None, threshold: int, scale: float, trigger: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, S), each (M, R) in x's dtype, T the pre-activation; S is T where nothing follows. x (M, K), A (R, K)."""
    T = x.new_empty(x.shape[0], A.shape[0])
    S = T if h == "identity" and G is None else torch.empty_like(T)
    if x.shape[0]:
        _submit(x, d, A, a, G, T, None if S is T else S, seed, threshold, scale, h, False, trigger)
    return T, S


def project_back(
    dy: Tensor, d: Tensor | None, B: Tensor, G: Tensor | None, h: str, T: Tensor | None, scale: float,
    trigger: bool = False,
) -> Tensor:  # fmt: skip
    """dT (M, R) in dy's dtype; dy (M, N), B (N, R), d (N,) or None, T (M, R) where h is no identity."""
    dT = dy.new_empty(dy.shape[0], B.shape[1])
    if dy.shape[0]:
        _submit(dy, d, B.t(), None, G, T if h != "identity" else None, dT, None, 0, scale, h, True, trigger)
    return dT
