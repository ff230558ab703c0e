"""outer: reductions over the rows, (u ⊙ d)ᵀ v and column sums, in two stages of fixed order: bitwise reproducible.

Stage one, one launch: every program sums a block of columns over one share of the rows into its own slot. Two products
share it, since dB = s·(dy ⊙ d_out)ᵀ h(T) and dA = (dTᵀ drop(x ⊙ d_in)) have one shape. Stage two, one launch: the slots
are added up in order. ``back`` makes dT and stage one of dB in one read of dy, where the slots cost less than a read.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .dropout import keep_tile
from .tile import activate, dot, gate, matrix, picked, places, put, slope, vector
from .triton_internals import gdc_launch_dependents

BLOCK = 256  # sums a program of add_up
EACH = 2  # programs of ``outer`` a processor
SLOTS = 64 << 20  # bytes that the slots of ``back`` may take


@triton.jit
def _job(
    pid, first, last, part_ptr, rows_ptr, u_ptr, v_ptr, d_ptr, z_ptr, seed_ptr, threshold, scale,
    C, R, u_m, u_c, z_m, z_c, product_at, usum_at, dot_at, vsum_at, out_c, out_r,
    H: tl.constexpr, PRODUCT: tl.constexpr, USUM: tl.constexpr, SCALED_SUM: tl.constexpr, VSUM: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Columns of tile pid, rows first to last, of u by an index if there is one: uᵀ h(v), Σ u, Σ u ⊙ z and Σ v into
    the slot."""
    blocks_r = tl.cdiv(R, BR) if PRODUCT else 1
    i_c, i_r = pid // blocks_r, pid % blocks_r
    c, r = i_c * BC, i_r * BR
    cols, ranks = c + tl.arange(0, BC), r + tl.arange(0, BR)
    acc = tl.zeros((BC, BR), ACC)
    # element by element, and added up once at the end: a sum over rows in the loop would make the warps wait
    usum, dsum, vsum = tl.zeros((BM, BC), ACC), tl.zeros((BM, BC), ACC), tl.zeros((BM, BR), ACC)
    for m0 in range(first, last, BM):
        if rows_ptr is None:
            u = matrix(u_ptr, m0, c, last, C, u_m, u_c, BM, BC)
        else:
            u = picked(u_ptr, places(rows_ptr, m0, last, BM), c, C, u_m, u_c, BM, BC)
            u = tl.where((m0 + tl.arange(0, BM) < last)[:, None], u, 0.0)
        if USUM:
            usum += u.to(ACC)
        if z_ptr is not None:
            dsum += u.to(ACC) * matrix(z_ptr, m0, c, last, C, z_m, z_c, BM, BC).to(ACC)
        if PRODUCT:
            if seed_ptr is not None:
                u = tl.where(keep_tile(seed_ptr, m0, c, C, threshold, EVEN, BM, BC), u, 0.0)
            v = matrix(v_ptr, m0, r, last, R, R, 1, BM, BR)
            if VSUM:
                vsum += v.to(ACC)
            if H != "identity":
                v = activate(v.to(ACC), H).to(u.dtype)
            acc = dot(tl.trans(u), v, acc, PRECISION)
    if PRODUCT:
        acc *= scale
        if d_ptr is not None:
            acc *= vector(d_ptr, cols, C).to(ACC)[:, None]
        put(part_ptr + product_at, acc, c, r, C, R, out_c, out_r, BC, BR)
        if VSUM:
            if i_c == 0:
                tl.store(part_ptr + vsum_at + ranks, tl.sum(vsum, 0), mask=ranks < R)
    if USUM or z_ptr is not None:
        if i_r == 0:
            if USUM:
                total = tl.sum(usum, 0)
                if SCALED_SUM:
                    total *= vector(d_ptr, cols, C).to(ACC)
                tl.store(part_ptr + usum_at + cols, total, mask=cols < C)
            if z_ptr is not None:
                tl.store(part_ptr + dot_at + cols, tl.sum(dsum, 0), mask=cols < C)


@triton.jit(do_not_specialize=["M", "rows_each", "tiles_0"])
def outer(
    part_ptr, slot, rows_each, tiles_0, M, R,
    u0_ptr, v0_ptr, d0_ptr, z0_ptr, scale0, C0, u0_m, u0_c, z0_m, z0_c, product0_at, usum_at, dot_at,
    u1_ptr, v1_ptr, d1_ptr, seed_ptr, threshold, scale1, C1, u1_m, u1_c, product1_at, vsum_at,
    H: tl.constexpr, PRODUCT0: tl.constexpr, PRODUCT1: tl.constexpr, USUM: tl.constexpr, SCALED_SUM: tl.constexpr,
    VSUM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Job 0 over dy: dB (C0, R), Σ dy (bias), Σ dy ⊙ z (d_out). Job 1 over x: dA (R, C1), Σ dT (a)."""
    pid, share = tl.program_id(0), tl.program_id(1)
    part_ptr += share.to(tl.int64) * slot
    if pid < tiles_0:
        if u0_ptr is not None:
            _job(
                pid, share * rows_each, min(share * rows_each + rows_each, M), part_ptr, None,
                u0_ptr, v0_ptr, d0_ptr, z0_ptr, None, 0, scale0,
                C0, R, u0_m, u0_c, z0_m, z0_c, product0_at, usum_at, dot_at, 0, R, 1,
                H, PRODUCT0, USUM, SCALED_SUM, False, False, PRECISION, ACC, BM, BC, BR,
            )  # fmt: skip
    elif PRODUCT1:
        _job(
            pid - tiles_0, share * rows_each, min(share * rows_each + rows_each, M), part_ptr, None, u1_ptr, v1_ptr,
            d1_ptr, None, seed_ptr, threshold, scale1, C1, R, u1_m, u1_c, 0, 0, product1_at, 0, 0, vsum_at, 1, C1,
            "identity", True, False, False, VSUM, EVEN, PRECISION, ACC, BM, BC, BR,
        )  # fmt: skip


@triton.jit
def _add_up(part_ptr, out_ptr, block, n, shares, ACC: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for first in range(0, shares, DEEP):
        total += tl.sum(matrix(part_ptr, first, block * BLOCK, shares, n, n, 1, DEEP, BLOCK), 0)
    tl.store(out_ptr + at, total, mask=at < n)


@triton.jit(do_not_specialize=["blocks0", "shares0", "shares1"])
def add_up(
    part0_ptr, out0_ptr, n0, shares0, blocks0, part1_ptr, out1_ptr, n1, shares1,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """out (n,) = the slots of part (shares, n) added up in a fixed order, DEEP loads in flight; two such sums."""
    block = tl.program_id(0)
    if block < blocks0:
        _add_up(part0_ptr, out0_ptr, block, n0, shares0, ACC, BLOCK, DEEP)
    else:
        _add_up(part1_ptr, out1_ptr, block - blocks0, n1, shares1, ACC, BLOCK, DEEP)


@triton.jit(do_not_specialize=["M"])
def back(
    dy_ptr, d_ptr, b_ptr, g_ptr, t_ptr, dt_ptr, part_ptr, scale, M, N, R, dy_m, dy_n, b_n, b_r, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, TRIGGER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One read of dy for two products: dT (M, R) as ``down`` makes it, and each row tile's slot of dB (N, R)."""
    if TRIGGER:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    m = tl.program_id(0) * BM
    t = matrix(t_ptr, m, 0, M, R, R, 1, BM, BR).to(ACC)
    u = activate(t, H).to(DTYPE)
    slot = part_ptr + tl.program_id(0).to(tl.int64) * N * R
    acc = tl.zeros((BM, BR), ACC)
    for n in range(0, N, BN):
        dy = matrix(dy_ptr, m, n, M, N, dy_m, dy_n, BM, BN)
        d_b = dot(tl.trans(dy), u, tl.zeros((BN, BR), ACC), PRECISION) * scale
        if d_ptr is not None:
            d = vector(d_ptr, n + tl.arange(0, BN), N).to(ACC)
            d_b *= d[:, None]
            dy = (dy.to(ACC) * d[None, :]).to(DTYPE)
        put(slot, d_b, n, 0, N, R, R, 1, BN, BR)
        acc = dot(dy, matrix(b_ptr, n, 0, N, R, b_n, b_r, BN, BR).to(DTYPE), acc, PRECISION)
    acc = gate(acc * scale, g_ptr, 0, R, g_in, g_out, GATE, DTYPE, PRECISION, BR)
    if H != "identity":
        acc *= slope(t, H)
    put(dt_ptr, acc.to(DTYPE), m, 0, M, R, R, 1, BM, BR)


@configs.closed_form("outer")
def config_of_outer(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    wide = bits > 16
    if arch < (9, 0) and not wide:
        return Config(64, 64, 0, 8, 2)
    rows = 16 if wide and r > 64 else 32 if wide or r > 32 else 64
    warps = 8 if arch >= (12, 0) else 4  # with 4 sm_120 spills
    return Config(rows, 64, 0, warps, 2 if wide or r > 64 else 3)


@configs.closed_form("back")
def config_of_back(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    return Config(128, 128 if bits <= 16 else 64, 0, 8, 3)


def one_read(arch: tuple[int, int], M: int, N: int, r: int, processors: int) -> bool:
    """Whether dT and dB in one read of dy beat two, on sm_90: their slots, written and read, must cost fewer bytes than
    dy and little memory, and their row tiles keep a good third of the processors busy."""
    if arch != (9, 0) or N < 64 or configs.rank_tile(r) >= 32:
        return False
    row_tiles = configs.tiles(M, 128)
    return processors <= 3 * row_tiles and 4 * row_tiles * N * r <= SLOTS


class OverDy(NamedTuple):
    """Job 0. dy (M, N); h(T) with T (M, R), d (N,) and scale make dB; sums, z: Σ dy (times d if scaled), Σ dy ⊙ z."""

    dy: Tensor
    T: Tensor | None = None
    h: str = "identity"
    d: Tensor | None = None
    scale: float = 1.0
    sums: bool = False
    scaled: bool = False
    z: Tensor | None = None
    made: bool = False  # elsewhere, by ``back``: the launch has no program for it, and is compiled alike


class OverX(NamedTuple):
    """Job 1. x (M, K), dT (M, R), d (K,), seed and threshold, scale make dA; sums: Σ dT."""

    x: Tensor
    dT: Tensor
    d: Tensor | None = None
    seed: Tensor | None = None
    threshold: int = 0
    scale: float = 1.0
    sums: bool = False


def added_up(*parts: Tensor) -> list[Tensor]:
    """Σ over the first dimension of each contiguous (shares, n), in a fixed order; two of them share a launch."""
    out = [part[0] if part.shape[0] == 1 else part.new_empty(part.shape[1]) for part in parts]
    jobs = [(part, sums) for part, sums in zip(parts, out, strict=True) if part.shape[0] > 1]
    for first, second in zip_longest(jobs[::2], jobs[1::2]):
        (part, sums), (other, others) = first, second or first  # without a second, no program of it: one kernel less
        (shares0, n0), (shares1, n1) = part.shape, other.shape if second else (0, 0)
        args = {
            "part0_ptr": part, "out0_ptr": sums, "n0": n0, "shares0": shares0, "blocks0": configs.tiles(n0, BLOCK),
            "part1_ptr": other, "out1_ptr": others, "n1": n1, "shares1": shares1,
            "ACC": launch.acc(part.dtype), "BLOCK": BLOCK, "DEEP": 16,
        }  # fmt: skip
        grid = (configs.tiles(n0, BLOCK) + configs.tiles(n1, BLOCK),)
        launch.submit(add_up, grid, args, Config(0, 0, 0, 4, 1), part.device)
    return out


def project_back(
    dy: Tensor, d: Tensor | None, B: Tensor, G: Tensor | None, h: str, T: Tensor, scale: float,
    trigger: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dT (M, R), partial sums of dB (row tiles, N·R)) in one read of dy; arguments as ``down.project_back``."""
    (M, N), R = dy.shape, B.shape[1]
    config = configs.choose("back", launch.arch_of(dy.device), 8 * dy.element_size(), M, N, 0, R)
    tiles = configs.tiles(M, config.BM)
    dT, part = dy.new_empty(M, R), dy.new_empty(tiles, N * R, dtype=torch.promote_types(dy.dtype, torch.float32))
    g_in, g_out = (0, 0) if G is None or G.dim() == 1 else G.stride()
    args = {
        "dy_ptr": dy, "d_ptr": d, "b_ptr": B, "g_ptr": G, "t_ptr": T, "dt_ptr": dT, "part_ptr": part, "scale": scale,
        "M": M, "N": N, "R": R, "dy_m": dy.stride(0), "dy_n": dy.stride(1), "b_n": B.stride(0), "b_r": B.stride(1),
        "g_in": g_in, "g_out": g_out, "H": h, "GATE": 0 if G is None else G.dim(),
        "PRECISION": launch.precision(dy.dtype), "ACC": launch.acc(dy.dtype),
        "TRIGGER": trigger and not launch.interpreting(),
        "BM": config.BM, "BN": config.BN, "BR": configs.rank_tile(R),
    }  # fmt: skip
    launch.submit(back, (tiles,), args, config, dy.device)
    return dT, part


def reduce_rows(first: OverDy | None, second: OverX | None, *parts: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """{"dB" (N, R), "sum" (N,), "dot" (N,), "dA" (R, K), "da" (R,)}: those asked for, in fp32 (fp64 for fp64); and the
    sums of other ``parts`` (shares, n), which take no launch of their own."""
    if second is None and (first is None or first.made):
        return {}, added_up(*parts)
    some = first.dy if first is not None else second.x
    M, device = some.shape[0], some.device
    wide = torch.promote_types(some.dtype, torch.float32)
    T = first.T if first is not None and first.T is not None else second.dT if second is not None else None
    R = 0 if T is None else T.shape[1]
    shapes: dict[str, tuple[int, ...]] = {}
    C0 = C1 = 0
    if first is not None:
        C0 = first.dy.shape[1]
        wanted = {"dB": first.T is not None, "sum": first.sums, "dot": first.z is not None}
        shapes |= {name: (C0, R) if name == "dB" else (C0,) for name, on in wanted.items() if on and not first.made}
    if second is not None:
        C1 = second.x.shape[1]
        shapes |= {"dA": (R, C1)} | ({"da": (R,)} if second.sums else {})
    if not M:
        zeros = {name: torch.zeros(shape, dtype=wide, device=device) for name, shape in shapes.items()}
        return zeros, added_up(*parts)
    offsets, slot = {}, 0
    for name, shape in shapes.items():
        offsets[name] = slot
        slot += -(-torch.Size(shape).numel() // 4) * 4  # each gradient 16-byte aligned
    arch = launch.arch_of(device)
    config = configs.choose("outer", arch, 8 * some.element_size(), M, max(C0, C1), 0, R)
    BR, BC = configs.rank_tile(R), config.BN
    product0, product1 = first is not None and first.T is not None, second is not None
    tiles_0 = 0 if first is None or first.made else configs.tiles(C0, BC) * (configs.tiles(R, BR) if product0 else 1)
    tiles = tiles_0 + (configs.tiles(C1, BC) * configs.tiles(R, BR) if product1 else 0)
    shares = max(1, min(configs.tiles(M, 4 * config.BM), configs.tiles(EACH * launch.processors(device), tiles)))
    rows_each = configs.tiles(configs.tiles(M, shares), config.BM) * config.BM
    shares = configs.tiles(M, rows_each)
    part = torch.empty(shares, slot, dtype=wide, device=device)
    f, g = first or OverDy(None), second or OverX(None, None)
    (u0_m, u0_c), (z0_m, z0_c), (u1_m, u1_c) = (launch.strides(t) for t in (f.dy, f.z, g.x))
    args = {
        "part_ptr": part, "slot": slot, "rows_each": rows_each, "tiles_0": tiles_0, "M": M, "R": R,
        "u0_ptr": f.dy, "v0_ptr": f.T, "d0_ptr": f.d, "z0_ptr": f.z, "scale0": f.scale, "C0": C0,
        "u0_m": u0_m, "u0_c": u0_c, "z0_m": z0_m, "z0_c": z0_c,
        "product0_at": offsets.get("dB", 0), "usum_at": offsets.get("sum", 0), "dot_at": offsets.get("dot", 0),
        "u1_ptr": g.x, "v1_ptr": g.dT, "d1_ptr": g.d, "seed_ptr": g.seed, "threshold": g.threshold, "scale1": g.scale,
        "C1": C1, "u1_m": u1_m, "u1_c": u1_c, "product1_at": offsets.get("dA", 0), "vsum_at": offsets.get("da", 0),
        "H": f.h, "PRODUCT0": product0, "PRODUCT1": product1, "USUM": f.sums, "SCALED_SUM": f.scaled, "VSUM": g.sums,
        "EVEN": C1 % 2 == 0,
        "PRECISION": launch.precision(some.dtype), "ACC": launch.acc(some.dtype),
        "BM": config.BM, "BC": BC, "BR": BR,
    }  # fmt: skip
    launch.submit(outer, (tiles, shares), args, config, device)
    flat, *others = added_up(part, *parts)
    sums = {name: flat[at : at + torch.Size(shapes[name]).numel()].view(shapes[name]) for name, at in offsets.items()}
    return sums, others
