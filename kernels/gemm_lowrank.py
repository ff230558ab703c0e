"""gemm_lowrank: y = d_out ⊙ (c + (x ⊙ d_in) Wᵀ + scale·S Bᵀ) + bias, the update in the GEMM's own accumulator.

The same computation serves backward: dx = d_in ⊙ ((dy ⊙ d_out) W + drop(dT A)), with W read transposed, the mask on the
update alone, and the column sums of x ⊙ dx̂ (the gradient of d_in) taken from the accumulator. Three forms:

``gemm_lowrank``      any strides, every option; INLINE also accumulates T = drop(x ⊙ d_in) Aᵀ: one launch in all;
                      DUAL carries a second accumulator, for dx where dropout acts on the base term too (DoRA).
``gemm_lowrank_tma``  sm_90: tensor descriptors, a persistent grid, the store through TMA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config, tiles
from .dropout import keep_tile
from .tile import activate, dot, gate, matrix, place, put, vector
from .triton_internals import FLATTENS, TensorDescriptor

INLINE_ROWS = 64  # up to here one launch, S made inside the GEMM, beats two
INLINE_RANK = 64  # above it the extra accumulator costs more than a launch
UNALIGNED = Config(64, 64, 32, 4, 2)  # rows that vector loads and asynchronous copies cannot take


@triton.jit
def _ranks(
    acc, s_ptr, b_ptr, scale, m, n, r0, M, N, R, b_n, b_r, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + S Bᵀ over the rank tile at r0."""
    s = matrix(s_ptr, m, r0, M, R, R, 1, BM, BR)
    b = matrix(b_ptr, r0, n, R, N, b_r, b_n, BR, BN)
    if SCALED:
        b = b.to(acc.dtype) * scale
    return dot(s, b.to(s.dtype), acc, PRECISION)


@triton.jit
def _update(
    acc, s_ptr, b_ptr, scale, m, n, M, N, R, b_n, b_r, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + S Bᵀ at (m, n), or with scale·B if SCALED; s (M, R) contiguous. ONE: a rank tile holds R, and there is no
    loop, which would keep the one around it from being flattened."""
    if ONE:
        return _ranks(acc, s_ptr, b_ptr, scale, m, n, 0, M, N, R, b_n, b_r, SCALED, PRECISION, BM, BN, BR)
    else:
        for r0 in tl.range(0, R, BR, num_stages=1):
            acc = _ranks(acc, s_ptr, b_ptr, scale, m, n, r0, M, N, R, b_n, b_r, SCALED, PRECISION, BM, BN, BR)
        return acc


@triton.jit(do_not_specialize=["M"])
def gemm_lowrank(
    x_ptr, w_ptr, s_ptr, b_ptr, c_ptr, d_in_ptr, d_out_ptr, bias_ptr, seed_ptr, u_ptr, y_ptr, z_ptr, sums_ptr,
    a_ptr, a_bias_ptr, g_ptr, t_ptr, threshold, scale, rescale,
    M, N, K, R, x_m, x_k, w_n, w_k, b_n, b_r, c_m, c_n, u_m, u_n, a_r, a_k, g_in, g_out,
    BIAS_INSIDE: tl.constexpr, MASK: tl.constexpr, DUAL: tl.constexpr, INLINE: tl.constexpr, EVEN: tl.constexpr,
    ONE: tl.constexpr, H: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """MASK: dropout acts on the update. DUAL: the K loop also runs over x as it is, into past, and y = past +
    drop(acc − past)·rescale. INLINE: S is made here, from a_ptr on, and T stored."""
    i_m, i_n = place(tl.program_id(0), M, N, BM, BN, GROUP)
    m, n = i_m * BM, i_n * BN
    cols = n + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    if b_ptr is not None and not INLINE:
        acc = _update(acc, s_ptr, b_ptr, scale, m, n, M, N, R, b_n, b_r, False, PRECISION, ONE, BM, BN, BR) * scale
        if MASK:
            acc = tl.where(keep_tile(seed_ptr, m, n, N, threshold, EVEN, BM, BN), acc, 0.0)
    if DUAL:
        past = tl.zeros((BM, BN), ACC)
    if INLINE:
        inner = tl.zeros((BM, BR), ACC)
        ranks = tl.arange(0, BR)
    if w_ptr is not None:
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            x = matrix(x_ptr, m, k0, M, K, x_m, x_k, BM, BK)
            w = matrix(w_ptr, k0, n, K, N, w_k, w_n, BK, BN)
            if DUAL:
                past = dot(x, w, past, PRECISION)
            if d_in_ptr is not None:
                x = (x.to(ACC) * vector(d_in_ptr, k, K).to(ACC)[None, :]).to(DTYPE)
            acc = dot(x, w, acc, PRECISION)
            if INLINE:
                if seed_ptr is not None:
                    x = tl.where(keep_tile(seed_ptr, m, k0, K, threshold, EVEN, BM, BK), x, 0.0)
                a = matrix(a_ptr, k0, 0, K, R, a_k, a_r, BK, BR).to(DTYPE)
                inner = dot(x, a, inner, PRECISION)
    if INLINE:
        inner *= rescale
        if a_bias_ptr is not None:
            inner += vector(a_bias_ptr, ranks, R).to(ACC)[None, :]
        if i_n == 0:
            put(t_ptr, inner.to(DTYPE), m, 0, M, R, R, 1, BM, BR)
        s = gate(activate(inner, H), g_ptr, 0, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
        b = matrix(b_ptr, 0, n, R, N, b_r, b_n, BR, BN)
        acc = dot(s.to(DTYPE), (b.to(ACC) * scale).to(DTYPE), acc, PRECISION)

    if c_ptr is not None:
        acc += matrix(c_ptr, m, n, M, N, c_m, c_n, BM, BN).to(ACC)
    if bias_ptr is not None:
        bias = vector(bias_ptr, cols, N).to(ACC)[None, :]
        if BIAS_INSIDE:
            acc += bias
    if z_ptr is not None:
        put(z_ptr, acc.to(DTYPE), m, n, M, N, N, 1, BM, BN)
    if DUAL:
        acc = past + tl.where(keep_tile(seed_ptr, m, n, N, threshold, EVEN, BM, BN), (acc - past) * rescale, 0.0)
    if sums_ptr is not None:
        u = matrix(u_ptr, m, n, M, N, u_m, u_n, BM, BN).to(ACC)
        tl.store(sums_ptr + i_m * N + cols, tl.sum(acc * u, 0), mask=cols < N)
    if y_ptr is not None:
        if d_out_ptr is not None:
            acc *= vector(d_out_ptr, cols, N).to(ACC)[None, :]
        if bias_ptr is not None:
            if not BIAS_INSIDE:
                acc += bias
        put(y_ptr, acc.to(DTYPE), m, n, M, N, N, 1, BM, BN)


@triton.jit(do_not_specialize=["M"])
def gemm_lowrank_tma(
    x_desc, w_desc, y_desc, z_desc, s_ptr, b_ptr, d_in_ptr, d_out_ptr, bias_ptr, seed_ptr, u_ptr, sums_ptr,
    threshold, scale, M, N, K, R, b_n, b_r, u_m, u_n,
    BIAS_INSIDE: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    LATE: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """TRANSPOSED: w is stored (K, N), as W is for dx. LATE: the update follows the K loop, the scale in B's tile."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = place(tile, M, N, BM, BN, GROUP)
        m, n = i_m * BM, i_n * BN
        cols = n + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if b_ptr is not None and not LATE:
            acc = _update(acc, s_ptr, b_ptr, scale, m, n, M, N, R, b_n, b_r, False, PRECISION, ONE, BM, BN, BR) * scale
            if MASK:
                acc = tl.where(keep_tile(seed_ptr, m, n, N, threshold, EVEN, BM, BN), acc, 0.0)
        for i_k in range(tl.cdiv(K, BK)):
            x = x_desc.load([m, i_k * BK])
            if d_in_ptr is not None:
                d = vector(d_in_ptr, i_k * BK + tl.arange(0, BK), K)
                x = (x.to(tl.float32) * d.to(tl.float32)[None, :]).to(DTYPE)
            if TRANSPOSED:
                acc = dot(x, w_desc.load([i_k * BK, n]), acc, PRECISION)
            else:
                acc = dot(x, w_desc.load([n, i_k * BK]).T, acc, PRECISION)
        if b_ptr is not None and LATE:
            acc = _update(acc, s_ptr, b_ptr, scale, m, n, M, N, R, b_n, b_r, True, PRECISION, ONE, BM, BN, BR)
        if bias_ptr is not None:
            bias = vector(bias_ptr, cols, N).to(tl.float32)[None, :]
            if BIAS_INSIDE:
                acc += bias
        if z_desc is not None:
            z_desc.store([m, n], acc.to(DTYPE))
        if sums_ptr is not None:
            u = matrix(u_ptr, m, n, M, N, u_m, u_n, BM, BN).to(tl.float32)
            tl.store(sums_ptr + i_m * N + cols, tl.sum(acc * u, 0), mask=cols < N)
        if y_desc is not None:
            if d_out_ptr is not None:
                acc *= vector(d_out_ptr, cols, N).to(tl.float32)[None, :]
            if bias_ptr is not None:
                if not BIAS_INSIDE:
                    acc += bias
            y_desc.store([m, n], acc.to(DTYPE))


class Update(NamedTuple):
    """The low-rank term scale·S Bᵀ: S (M, R) contiguous, B (N, R) in any strides; masked: dropout acts on it."""

    S: Tensor
    B: Tensor
    scale: float
    masked: bool = False


class Inline(NamedTuple):
    """What makes S inside the GEMM: T = rescale·drop(x ⊙ d_in) Aᵀ + a, S = h(T) Gᵀ, update scale·S Bᵀ."""

    A: Tensor
    a: Tensor | None
    G: Tensor | None
    h: str
    B: Tensor
    scale: float


class Mask(NamedTuple):
    """Dropout: keep where the element's bits reach the threshold, times rescale = 1 / (1 − p)."""

    seed: Tensor
    threshold: int
    rescale: float


class Result(NamedTuple):
    """y and z (M, N), None unless asked for; sums (row tiles, N) fp32 partial column sums; T (M, R) where inline."""

    y: Tensor | None
    z: Tensor | None
    sums: Tensor | None
    T: Tensor | None


@configs.closed_form("gemm_lowrank_tma")
def config_of_tma(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """The tile whose waves compute least, the larger of two alike."""
    if M <= 64:
        return Config(64, 128, 64, 4, 4, late=True, flatten=True)
    waves = lambda BN: tiles(tiles(M, 128) * tiles(N, BN), 132) * BN  # noqa: E731
    wide = N >= 256 and r <= 16 and waves(256) <= waves(128)
    return Config(128, 256 if wide else 128, 64, 8, 3 if wide else 4, late=True, flatten=True)


@configs.closed_form("gemm_lowrank")
def config_of_gemm(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """With as many stages as shared memory holds."""
    if bits > 16:
        return UNALIGNED
    tall = configs.bucket(M) if M <= 64 else 64 if tiles(M, 128) * tiles(N, 128) < 64 else 128
    deep = tall < 128 or arch[0] == 10  # at 32 sm_100 spills
    config = Config(tall, 128 if tall >= 64 else 64, 64 if deep else 32, 8 if tall >= 64 else 4, 4)
    stage = (config.BM + config.BN) * config.BK * bits // 8
    most = (configs.shared_kib(arch) * 1024 - 16384) // stage
    return replace(config, stages=max(2, min(config.stages, most)))


def narrow(config: Config, most: int) -> Config:
    """The config for a tile that makes two results: at most 128 columns, ``most`` from 64 rows on."""
    return replace(config, BN=min(config.BN, most if config.BM >= 64 else 128))


def _describable(t: Tensor) -> bool:
    """Whether TMA can address a matrix: rows contiguous, 16-byte aligned."""
    row = t.stride(0)
    return t.stride(1) == 1 and row >= t.shape[1] > 0 and row * t.element_size() % 16 == t.data_ptr() % 16 == 0


def _aligned(t: Tensor) -> bool:
    """Whether whole 16-byte pieces of a matrix can be loaded, along its rows or its columns."""
    return _describable(t) or _describable(t.t())


def fits_tma(x: Tensor, w: Tensor | None, c: Tensor | None, N: int) -> bool:
    """Whether the TMA kernel can take the operands: 16-bit, aligned, on sm_90, at least 64 rows."""
    if TensorDescriptor is None or w is None or c is not None or x.shape[0] < 64:
        return False
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    arch = launch.arch_of(x.device)
    if arch != (9, 0) or N * x.element_size() % 16 or min(N, x.shape[1]) < 64:
        return False
    return _describable(x) and _aligned(w)


def gemm(
    x: Tensor | None,
    w: Tensor | None,
    like: tuple[int, int],
    update: Update | Inline | None = None,
    c: Tensor | None = None,
    d_in: Tensor | None = None,
    d_out: Tensor | None = None,
    bias: Tensor | None = None,
    bias_inside: bool = True,
    mask: Mask | None = None,
    dual: bool = False,
    u: Tensor | None = None,
    want_y: bool = True,
    want_z: bool = False,
) -> Result:
    """One GEMM with everything around it. x (M, K); w (N, K), any strides, or None; like: (M, N).

    u (M, N): column sums of u ⊙ (the value before d_out) are wanted.
    """
    M, N = like
    base = next(t for t in (x, c, update and update[0]) if t is not None)
    out = lambda wanted: base.new_empty(M, N) if wanted else None  # noqa: E731
    inline = isinstance(update, Inline)
    arch, bits = launch.arch_of(base.device), 8 * base.element_size()
    K = 0 if w is None else w.shape[1]
    R = 0 if update is None else update.B.shape[1]
    tma = not dual and not inline and fits_tma(x, w, c, N)
    kind = "gemm_lowrank_tma" if tma else "gemm_lowrank"
    aligned = all(_aligned(t) for t in (x if K else None, w) if t is not None)
    config = configs.choose(kind, arch, bits, M, N, K, R) if aligned else UNALIGNED
    if inline or dual or u is not None or (want_z and update is not None):
        config = narrow(config, 128 if tma else 64)
    BR = configs.rank_tile(R, INLINE_RANK if inline or bits == 16 else 32)
    tiles_m, tiles_n = tiles(M, config.BM), tiles(N, config.BN)
    sums = None if u is None else torch.empty(tiles_m, N, dtype=torch.promote_types(base.dtype, torch.float32),
                                              device=base.device)  # fmt: skip
    T = base.new_empty(M, R) if inline else None
    result = Result(out(want_y), out(want_z), sums, T)
    if not M or not N:
        return result
    masked = not inline and update is not None and update.masked
    B = None if update is None else update.B
    (b_n, b_r), (u_m, u_n) = launch.strides(B), launch.strides(u)
    common = {
        "threshold": 0 if mask is None else mask.threshold, "scale": 1.0 if update is None else update.scale,
        "b_n": b_n, "b_r": b_r, "u_m": u_m, "u_n": u_n, "M": M, "N": N, "K": K, "R": R,
        "s_ptr": None if inline or update is None else update.S, "b_ptr": B,
        "d_in_ptr": d_in, "d_out_ptr": d_out, "bias_ptr": bias, "seed_ptr": None if mask is None else mask.seed,
        "u_ptr": u, "sums_ptr": sums, "BIAS_INSIDE": bias_inside, "MASK": masked,
        "PRECISION": launch.precision(base.dtype), "DTYPE": launch.TL[base.dtype],
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.group,
        "BR": BR, "ONE": FLATTENS and R <= BR, "EVEN": N % 2 == 0 and (not inline or K % 2 == 0),
    }  # fmt: skip
    if tma:
        transposed = not _describable(w)
        stored = w.t() if transposed else w
        programs = min(launch.processors(base.device), tiles_m * tiles_n)
        block = [config.BK, config.BN] if transposed else [config.BN, config.BK]
        block_y = [config.BM, config.BN]
        describe = TensorDescriptor.from_tensor
        special = {
            "x_desc": describe(x, [config.BM, config.BK]), "w_desc": describe(stored, block),
            "y_desc": describe(result.y, block_y) if want_y else None,
            "z_desc": describe(result.z, block_y) if want_z else None,
            "TRANSPOSED": transposed, "LATE": config.late and not masked,
            # d_in's product passes through registers, and a loop over rank tiles keeps the others from becoming one
            "FLATTEN": config.flatten and FLATTENS and d_in is None and R <= BR,
        }  # fmt: skip
        launch.submit(gemm_lowrank_tma, (programs,), {**common, **special}, config, base.device)
        return result
    (x_m, x_k), (w_n, w_k), (c_m, c_n) = launch.strides(x if K else None), launch.strides(w), launch.strides(c)
    A, a, G, h = update[:4] if inline else (None, None, None, "identity")
    a_r, a_k = launch.strides(A)
    g_out, g_in = launch.strides(G if G is not None and G.dim() == 2 else None)
    special = {
        "x_ptr": x if K else None, "w_ptr": w, "c_ptr": c, "y_ptr": result.y, "z_ptr": result.z, "t_ptr": T,
        "a_ptr": A, "a_bias_ptr": a, "g_ptr": G, "rescale": 1.0 if mask is None else mask.rescale,
        "x_m": x_m, "x_k": x_k, "w_n": w_n, "w_k": w_k, "c_m": c_m, "c_n": c_n, "a_r": a_r, "a_k": a_k,
        "g_in": g_in, "g_out": g_out, "DUAL": dual, "INLINE": inline, "H": h, "GATE": 0 if G is None else G.dim(),
        "ACC": launch.acc(base.dtype),
    }  # fmt: skip
    launch.submit(gemm_lowrank, (tiles_m * tiles_n,), {**common, **special}, config, base.device)
    return result
