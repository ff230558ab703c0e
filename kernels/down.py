"""down: S = h(drop(x ⊙ d) Aᵀ·scale + a) Gᵀ in one read of x; and in backward dT = (scale·(dy ⊙ d) B G) ⊙ h'(T).

Where row tiles are few, K is split among programs and a second launch, ``finish``, adds up their sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config, tiles
from .dropout import keep_tile
from .tile import activate, dot, gate, matrix, put, slope, vector
from .triton_internals import gdc_launch_dependents


@triton.jit
def _end(
    acc, scale, bias_ptr, g_ptr, t_ptr, out_ptr, m, r, M, R, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What becomes of the whole sums over K at (m, r)."""
    acc *= scale
    if BACKWARD:
        acc = gate(acc, g_ptr, r, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
        if H != "identity":
            acc *= slope(matrix(t_ptr, m, r, M, R, R, 1, BM, BR).to(acc.dtype), H)
        put(out_ptr, acc.to(DTYPE), m, r, M, R, R, 1, BM, BR)
    else:
        if bias_ptr is not None:
            acc += vector(bias_ptr, r + tl.arange(0, BR), R).to(acc.dtype)[None, :]
        put(t_ptr, acc.to(DTYPE), m, r, M, R, R, 1, BM, BR)
        if out_ptr is not None:
            u = gate(activate(acc, H), g_ptr, r, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
            put(out_ptr, u.to(DTYPE), m, r, M, R, R, 1, BM, BR)


@triton.jit(do_not_specialize=["M", "steps"])
def down(
    x_ptr, d_ptr, a_ptr, bias_ptr, g_ptr, t_ptr, out_ptr, part_ptr, seed_ptr, threshold, scale,
    M, K, R, steps, x_m, x_k, a_r, a_k, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    EVEN: tl.constexpr, TRIGGER: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Forward: t (M, R) is written, and out where h or G follows. Backward: t is read, out written. A program takes
    ``steps`` blocks of K; where others take the rest, its sums go to part (shares, M, R), and ``finish`` follows.
    TRIGGER: the launch that follows may begin once every program runs, if it waits itself for what is written here."""
    if TRIGGER:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m, r, share = tl.program_id(0) * BM, tl.program_id(1) * BR, tl.program_id(2)
    first = share * steps * BK
    acc = tl.zeros((BM, BR), ACC)
    for k0 in range(first, min(first + steps * BK, K), BK):
        k = k0 + tl.arange(0, BK)
        x = matrix(x_ptr, m, k0, M, K, x_m, x_k, BM, BK)
        if d_ptr is not None:
            x = (x.to(ACC) * vector(d_ptr, k, K).to(ACC)[None, :]).to(DTYPE)
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, m, k0, K, threshold, EVEN, BM, BK), x, 0.0)
        a = matrix(a_ptr, k0, r, K, R, a_k, a_r, BK, BR).to(DTYPE)
        acc = dot(x, a, acc, PRECISION)
    if tl.num_programs(2) > 1:
        put(part_ptr + share * M * R, acc, m, r, M, R, R, 1, BM, BR)
    else:
        _end(
            acc, scale, bias_ptr, g_ptr, t_ptr, out_ptr, m, r, M, R, g_in, g_out,
            H, GATE, BACKWARD, DTYPE, PRECISION, BM, BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "shares"])
def finish(
    part_ptr, bias_ptr, g_ptr, t_ptr, out_ptr, scale, M, R, shares, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, TRIGGER: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The shares of ``down`` added up in a fixed order, DEEP loads in flight, and what it does without shares."""
    if TRIGGER:
        gdc_launch_dependents()
    m, r = tl.program_id(0) * BM, tl.program_id(1) * BR
    rows, ranks, deep = m + tl.arange(0, BM), r + tl.arange(0, BR), tl.arange(0, DEEP)[:, None, None]
    at = (deep * M + rows[None, :, None]) * R + ranks[None, None, :]
    inside = ((rows < M)[:, None] & (ranks < R)[None, :])[None, :, :]
    acc = tl.zeros((BM, BR), ACC)
    for first in range(0, shares, DEEP):
        acc += tl.sum(tl.load(part_ptr + first * M * R + at, mask=(first + deep < shares) & inside, other=0.0), 0)
    _end(
        acc, scale, bias_ptr, g_ptr, t_ptr, out_ptr, m, r, M, R, g_in, g_out,
        H, GATE, BACKWARD, DTYPE, PRECISION, BM, BR,
    )  # fmt: skip


@configs.closed_form("down")
def config_of_down(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """Tall tiles: each reads A, in fp32 r / BM of the bytes of x. Of low ranks shorter ones, two a processor of 8192
    rows: 3 % faster on an H100, with dropout 29 %."""
    wide = bits > 16  # fp32 runs without wgmma, or through tf32
    depth = 16 if wide and r > 64 else 64 if wide or r > 32 else 128
    tall = 16 if wide and r > 64 else 64 if not wide and 32 < r <= 64 else 32
    return Config(min(configs.bucket(M), tall), 0, depth, 8 if wide and r > 64 else 4, 2 if wide or r > 64 else 3)


def shares_of(programs: int, blocks: int, processors: int) -> int:
    """Into how many shares K is split, so that few row tiles still fill the processors; a share is two blocks or more.
    So few programs have sums that 32 bits count."""
    return max(1, min(processors // programs, tiles(blocks, 2)))


def _submit(x, d, A, bias, G, T, out, seed, threshold, scale, h, backward, trigger):
    M, K = x.shape
    R = A.shape[0]
    arch = launch.arch_of(x.device)
    config = configs.choose("down", arch, 8 * x.element_size(), M, R, K, R)
    BR = configs.rank_tile(R)
    g_in, g_out = (0, 0) if G is None or G.dim() == 1 else G.stride() if backward else G.stride()[::-1]
    grid, blocks = (tiles(M, config.BM), tiles(R, BR)), max(1, tiles(K, config.BK))
    steps = tiles(blocks, shares_of(grid[0] * grid[1], blocks, launch.processors(x.device)))
    shares = tiles(blocks, steps)
    part = x.new_empty(shares if shares > 1 else 0, M, R, dtype=torch.promote_types(x.dtype, torch.float32))
    args = {
        "x_ptr": x, "d_ptr": d, "a_ptr": A, "bias_ptr": bias, "g_ptr": G, "t_ptr": T, "out_ptr": out, "seed_ptr": seed,
        "part_ptr": part, "threshold": threshold, "scale": scale, "M": M, "K": K, "R": R, "steps": steps,
        "x_m": x.stride(0), "x_k": x.stride(1), "a_r": A.stride(0), "a_k": A.stride(1), "g_in": g_in, "g_out": g_out,
        "EVEN": K % 2 == 0, "TRIGGER": trigger and not launch.interpreting(),
        "H": h, "GATE": 0 if G is None else G.dim(), "BACKWARD": backward, "DTYPE": launch.TL[x.dtype],
        "PRECISION": launch.precision(x.dtype), "ACC": launch.acc(x.dtype), "BM": config.BM, "BK": config.BK, "BR": BR,
    }  # fmt: skip
    launch.submit(down, (*grid, shares), args, config, x.device)
    if shares > 1:
        args |= {"BM": 16, "shares": shares, "DEEP": 128 // BR}
        launch.submit(finish, (tiles(M, 16), grid[1]), args, Config(16, 0, 0, 4, 1), x.device)


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
        plain = h == "identity" and G is None  # as forward: one kernel less to compile
        before, out = (dT, None) if plain else (T if h != "identity" else None, dT)
        _submit(dy, d, B.t(), None, G, before, out, None, 0, scale, h, not plain, trigger)
    return dT
