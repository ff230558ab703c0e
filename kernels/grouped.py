"""``down``, ``gemm_lowrank`` and ``outer`` on rows in groups, each group with a weight and factors of its own.

The rows of a group are contiguous in an order sorted by group; x may stand in another, and is read by an index. A tile
of rows lies in one group, and a table made on the device says in which: the host knows no more than how many tiles
there may be, P // SIZE + E, and those that there are not return at once. Of a stacked operand a tile reads its group's
part; a stride of 0 between the parts is one part for all groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .configs import Config
from .down import _end
from .dropout import keep_tile
from .gemm_lowrank import UNALIGNED, Mask, Result, Update, _aligned, _update, config_of_gemm, narrow
from .outer import BLOCK, OverDy, OverX, _add_up, _job, config_of_outer
from .tile import dot, matrix, picked, place, places, put, vector
from .triton_internals import FLATTENS


@triton.jit(do_not_specialize=["size", "n"])
def tile_table(offs_ptr, tiles_ptr, ends_ptr, size, E, n, GROUPS: tl.constexpr, SOME: tl.constexpr):
    """tiles (n, 3): each tile's group, first row and the row after its last, zeros where there is no such tile; ends
    (E,): how many tiles the groups have up to each."""
    e = tl.arange(0, GROUPS)
    start = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    count = (tl.load(offs_ptr + e, mask=e < E, other=0) - start + size - 1) // size
    ends = tl.cumsum(tl.where(e < E, count, 0), 0)
    tile = tl.program_id(0) * SOME + tl.arange(0, SOME)
    past = ends[None, :] <= tile[:, None]
    group = tl.sum(past.to(tl.int32), 1)
    before = tl.max(tl.where(past, ends[None, :], 0), 1)
    there = group < E
    first = tl.load(offs_ptr + group - 1, mask=there & (group > 0), other=0) + (tile - before) * size
    last = tl.minimum(first + size, tl.load(offs_ptr + group, mask=there, other=0))
    tl.store(tiles_ptr + 3 * tile, tl.where(there, group, 0), mask=tile < n)
    tl.store(tiles_ptr + 3 * tile + 1, tl.where(there, first, 0), mask=tile < n)
    tl.store(tiles_ptr + 3 * tile + 2, tl.where(there, last, 0), mask=tile < n)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + e, ends, mask=e < E)


@triton.jit
def _tile(tiles_ptr, tile):
    """(group, first row, the row after the last) of a tile."""
    at = tiles_ptr + 3 * tile
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def down_grouped(
    tiles_ptr, rows_ptr, x_ptr, d_ptr, a_ptr, bias_ptr, g_ptr, t_ptr, out_ptr, seed_ptr, threshold, scale,
    K, R, x_m, x_k, a_e, a_r, a_k, g_e, g_in, g_out,
    H: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``down``, without shares of K."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    group, m, last = _tile(tiles_ptr, tl.program_id(0))
    if m >= last:
        return
    r = tl.program_id(1) * BR
    at = places(rows_ptr, m, last, BM)
    acc = tl.zeros((BM, BR), ACC)
    for k0 in range(0, K, BK):
        x = picked(x_ptr, at, k0, K, x_m, x_k, BM, BK)
        if d_ptr is not None:
            x = (x.to(ACC) * vector(d_ptr + group * K, k0 + tl.arange(0, BK), K).to(ACC)[None, :]).to(DTYPE)
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, m, k0, K, threshold, EVEN, BM, BK), x, 0.0)
        a = matrix(a_ptr + group * a_e, k0, r, K, R, a_k, a_r, BK, BR).to(DTYPE)
        acc = dot(x, a, acc, PRECISION)
    if bias_ptr is not None:
        bias_ptr += group * R
    if g_ptr is not None:
        g_ptr += group * g_e
    _end(
        acc, scale, bias_ptr, g_ptr, t_ptr, out_ptr, m, r, last, R, g_in, g_out,
        H, GATE, BACKWARD, DTYPE, PRECISION, BM, BR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def gemm_grouped(
    tiles_ptr, rows_ptr, x_ptr, w_ptr, s_ptr, b_ptr, c_ptr, d_in_ptr, d_out_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr,
    threshold, scale, tiles, N, K, R, x_m, x_k, w_e, w_n, w_k, b_e, b_n, b_r, c_m, c_n,
    BIAS_INSIDE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``gemm_lowrank`` with S given. MASK: dropout acts on the update."""
    i_m, i_n = place(tl.program_id(0), tiles * BM, N, BM, BN, GROUP)
    group, m, last = _tile(tiles_ptr, i_m)
    if m >= last:
        return
    n = i_n * BN
    cols = n + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    if b_ptr is not None:
        b = b_ptr + group * b_e
        acc = _update(acc, s_ptr, b, scale, m, n, last, N, R, b_n, b_r, False, PRECISION, ONE, BM, BN, BR) * scale
        if MASK:
            acc = tl.where(keep_tile(seed_ptr, m, n, N, threshold, EVEN, BM, BN), acc, 0.0)
    if w_ptr is not None:
        at = places(rows_ptr, m, last, BM)
        for k0 in range(0, K, BK):
            x = picked(x_ptr, at, k0, K, x_m, x_k, BM, BK)
            if d_in_ptr is not None:
                d = vector(d_in_ptr + group * K, k0 + tl.arange(0, BK), K)
                x = (x.to(ACC) * d.to(ACC)[None, :]).to(DTYPE)
            acc = dot(x, matrix(w_ptr + group * w_e, k0, n, K, N, w_k, w_n, BK, BN), acc, PRECISION)
    if c_ptr is not None:
        acc += matrix(c_ptr, m, n, last, N, c_m, c_n, BM, BN).to(ACC)
    if bias_ptr is not None:
        bias = vector(bias_ptr + group * N, cols, N).to(ACC)[None, :]
        if BIAS_INSIDE:
            acc += bias
    if z_ptr is not None:
        put(z_ptr, acc.to(DTYPE), m, n, last, N, N, 1, BM, BN)
    if d_out_ptr is not None:
        acc *= vector(d_out_ptr + group * N, cols, N).to(ACC)[None, :]
    if bias_ptr is not None:
        if not BIAS_INSIDE:
            acc += bias
    put(y_ptr, acc.to(DTYPE), m, n, last, N, N, 1, BM, BN)


@triton.jit(do_not_specialize=["tiles_0"])
def outer_grouped(
    tiles_ptr, rows0_ptr, rows1_ptr, part0_ptr, part1_ptr, slot0, slot1, tiles_0, R,
    u0_ptr, v0_ptr, d0_ptr, z0_ptr, scale0, C0, u0_m, u0_c, z0_m, z0_c, usum_at, dot_at,
    u1_ptr, v1_ptr, d1_ptr, seed_ptr, threshold, scale1, C1, u1_m, u1_c, vsum_at,
    H: tl.constexpr, PRODUCT0: tl.constexpr, PRODUCT1: tl.constexpr, USUM: tl.constexpr, SCALED_SUM: tl.constexpr,
    VSUM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``outer``, where a share of the rows is a tile of the table: each has a slot in part0 and in part1."""
    pid, tile = tl.program_id(0), tl.program_id(1)
    group, first, last = _tile(tiles_ptr, tile)
    if first >= last:
        return
    if d0_ptr is not None:
        d0_ptr += group * C0
    if d1_ptr is not None:
        d1_ptr += group * C1
    if pid < tiles_0:
        if u0_ptr is not None:
            _job(
                pid, first, last, part0_ptr + tile.to(tl.int64) * slot0, rows0_ptr, u0_ptr, v0_ptr,
                d0_ptr, z0_ptr, None, 0, scale0,
                C0, R, u0_m, u0_c, z0_m, z0_c, 0, usum_at, dot_at, 0, R, 1,
                H, PRODUCT0, USUM, SCALED_SUM, False, False, PRECISION, ACC, BM, BC, BR,
            )  # fmt: skip
    elif PRODUCT1:
        _job(
            pid - tiles_0, first, last, part1_ptr + tile.to(tl.int64) * slot1, rows1_ptr, u1_ptr, v1_ptr,
            d1_ptr, None, seed_ptr, threshold, scale1,
            C1, R, u1_m, u1_c, 0, 0, 0, 0, 0, vsum_at, 1, C1,
            "identity", True, False, False, VSUM, EVEN, PRECISION, ACC, BM, BC, BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks0"])
def add_up_grouped(
    ends_ptr, part0_ptr, out0_ptr, n0, blocks0, part1_ptr, out1_ptr, n1,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """out (E, n) = the slots of each group's tiles added up in order, zeros where it has none; two such sums."""
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = tl.load(ends_ptr + group - 1, mask=group > 0, other=0), tl.load(ends_ptr + group)
    if block < blocks0:
        start = part0_ptr + first.to(tl.int64) * n0
        _add_up(start, out0_ptr + group * n0, block, n0, last - first, ACC, BLOCK, DEEP)
    else:
        start = part1_ptr + first.to(tl.int64) * n1
        _add_up(start, out1_ptr + group * n1, block - blocks0, n1, last - first, ACC, BLOCK, DEEP)


class Routing:
    """Which rows belong to which group, as the kernels read it: offs (E,) int32, the row after each group's last; rows
    (P,): the row of x that each reads, or None."""

    def __init__(self, offs: Tensor, rows: Tensor | None, P: int):
        self.offs, self.rows, self.P, self.E = offs, rows, P, offs.shape[0]
        self.mean = configs.tiles(P, self.E)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def tiles(self, size: int) -> tuple[Tensor, Tensor]:
        """(tiles (n, 3), ends (E,)) as ``tile_table`` makes them, for tiles of so many rows."""
        if size not in self._tables:
            n, all_groups = self.P // size + self.E, max(2, 1 << (self.E - 1).bit_length())
            some = max(2, min(32, 4096 // all_groups))
            made = self.offs.new_empty(n, 3), self.offs.new_empty(self.E)
            args = {
                "offs_ptr": self.offs, "tiles_ptr": made[0], "ends_ptr": made[1], "size": size, "E": self.E, "n": n,
                "GROUPS": all_groups, "SOME": some,
            }  # fmt: skip
            launch.submit(tile_table, (configs.tiles(n, some),), args, Config(0, 0, 0, 4, 1), self.offs.device)
            self._tables[size] = made
        return self._tables[size]


def row_tile(bits: int, mean: int) -> int:
    """Rows of a tile where a group has so many: few sizes, since each is compiled. ``down`` and the GEMM take the same,
    so that a table serves both."""
    return 16 if mean <= 16 else 64 if mean <= 64 or bits > 16 else 128


def _stack(t: Tensor | None) -> tuple[int, ...]:
    """The strides of a stack of matrices, zeros for an absent one."""
    return (0, 0, 0) if t is None else t.stride()


def _down(routing, rows, x, d, A, bias, G, T, out, seed, threshold, scale, h, backward):
    (_, R, K), bits, BM = A.shape, 8 * x.element_size(), row_tile(8 * x.element_size(), routing.mean)
    BR, wide = configs.rank_tile(R), bits > 16
    depth = (16 if wide else 32) if R > 64 else 64
    config = Config(BM, 0, depth, 8 if BM > 64 or R > 64 else 4, 2 if wide or R > 64 else 3)
    tiles, _ = routing.tiles(BM)
    gate = 0 if G is None else G.dim() - 1
    g_e, g_out, g_in = (R, 0, 0) if gate == 1 else _stack(G)
    (a_e, a_r, a_k), (x_m, x_k) = A.stride(), x.stride()
    args = {
        "tiles_ptr": tiles, "rows_ptr": rows, "x_ptr": x, "d_ptr": d, "a_ptr": A, "bias_ptr": bias, "g_ptr": G,
        "t_ptr": T, "out_ptr": out, "seed_ptr": seed, "threshold": threshold, "scale": scale, "K": K, "R": R,
        "x_m": x_m, "x_k": x_k, "a_e": a_e, "a_r": a_r, "a_k": a_k, "g_e": g_e,
        "g_in": g_out if backward else g_in, "g_out": g_in if backward else g_out,
        "H": h, "GATE": gate, "BACKWARD": backward, "EVEN": K % 2 == 0,
        "PRECISION": launch.precision(x.dtype), "ACC": launch.acc(x.dtype), "BM": BM, "BK": config.BK, "BR": BR,
    }  # fmt: skip
    launch.submit(down_grouped, (len(tiles), configs.tiles(R, BR)), args, config, x.device)


def project(
    routing: Routing, x: Tensor, d: Tensor | None, A: Tensor, a: Tensor | None, G: Tensor | None, h: str,
    seed: Tensor | None, threshold: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, S), each (P, R), as ``down.project``; x (M, K), read by the routing's index; A (E, R, K)."""
    T = x.new_empty(routing.P, A.shape[1])
    S = T if h == "identity" and G is None else torch.empty_like(T)
    if routing.P:
        _down(routing, routing.rows, x, d, A, a, G, T, None if S is T else S, seed, threshold, scale, h, False)
    return T, S


def project_back(
    routing: Routing, dy: Tensor, d: Tensor | None, B: Tensor, G: Tensor | None, h: str, T: Tensor | None, scale: float
) -> Tensor:
    """dT (P, R), as ``down.project_back``; dy (P, N), B (E, N, R)."""
    dT = dy.new_empty(dy.shape[0], B.shape[2])
    if routing.P:
        plain = h == "identity" and G is None
        before, out = (dT, None) if plain else (T if h != "identity" else None, dT)
        _down(routing, None, dy, d, B.mT, None, G, before, out, None, 0, scale, h, not plain)
    return dT


def gemm(
    routing: Routing,
    rows: Tensor | None,
    x: Tensor | None,
    w: Tensor | None,
    like: Tensor,
    N: int,
    update: Update | None = None,
    c: Tensor | None = None,
    d_in: Tensor | None = None,
    d_out: Tensor | None = None,
    bias: Tensor | None = None,
    bias_inside: bool = True,
    mask: Mask | None = None,
    want_z: bool = False,
) -> Result:
    """y, z (P, N) as ``gemm_lowrank.gemm``, in the dtype of ``like``; x by the index ``rows``; w (E, N, K), any
    strides; vectors (E, n), contiguous."""
    P, bits, dt = routing.P, 8 * like.element_size(), like.dtype
    result = Result(like.new_empty(P, N), like.new_empty(P, N) if want_z else None, None, None)
    if not P or not N:
        return result
    K, R, B = (0 if w is None else w.shape[2]), (0 if update is None else update.B.shape[2]), update and update.B
    BM = row_tile(bits, routing.mean)
    aligned = w is None or (_aligned(x) and _aligned(w[0]) and w.stride(0) * w.element_size() % 16 == 0)
    config = config_of_gemm(launch.arch_of(like.device), bits, BM if BM <= 64 else 1 << 14, N, K, R)
    config = replace(config if aligned else replace(UNALIGNED, warps=4 if BM <= 64 else 8), BM=BM)
    config = narrow(config, 64) if want_z and update is not None else config
    tiles, BR = routing.tiles(BM)[0], configs.rank_tile(R, 64 if bits == 16 else 32)
    (w_e, w_n, w_k), (b_e, b_n, b_r) = _stack(w), _stack(B)
    (x_m, x_k), (c_m, c_n) = launch.strides(x if K else None), launch.strides(c)
    args = {
        "tiles_ptr": tiles, "rows_ptr": rows if K else None, "x_ptr": x if K else None, "w_ptr": w,
        "s_ptr": None if update is None else update.S, "b_ptr": B, "c_ptr": c, "d_in_ptr": d_in, "d_out_ptr": d_out,
        "bias_ptr": bias, "seed_ptr": None if mask is None else mask.seed, "y_ptr": result.y, "z_ptr": result.z,
        "threshold": 0 if mask is None else mask.threshold, "scale": 1.0 if update is None else update.scale,
        "tiles": len(tiles), "N": N, "K": K, "R": R, "x_m": x_m, "x_k": x_k, "w_e": w_e, "w_n": w_n, "w_k": w_k,
        "b_e": b_e, "b_n": b_n, "b_r": b_r, "c_m": c_m, "c_n": c_n, "BIAS_INSIDE": bias_inside,
        "MASK": update is not None and update.masked, "EVEN": N % 2 == 0, "ONE": FLATTENS and R <= BR,
        "PRECISION": launch.precision(dt), "ACC": launch.acc(dt), "DTYPE": launch.TL[dt],
        "BM": BM, "BN": config.BN, "BK": config.BK, "BR": BR, "GROUP": config.group,
    }  # fmt: skip
    launch.submit(gemm_grouped, (len(tiles) * configs.tiles(N, config.BN),), args, config, like.device)
    return result


def _slot(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """Where in a slot each of its sums stands, and the slot's length."""
    at, length = {}, 0
    for name, shape in shapes.items():
        at[name], length = length, length + torch.Size(shape).numel()
    return at, length


def reduce_rows(
    routing: Routing, first: OverDy | None, second: OverX | None, rows0: Tensor | None = None
) -> dict[str, Tensor]:
    """{"dB" (E, N, R), "sum" (E, N), "dot" (E, N), "dA" (E, R, K), "da" (E, R)}, as ``outer.reduce_rows``; the rows of
    second.x by the routing's index, those of first.dy by rows0."""
    f, g = first or OverDy(None), second or OverX(None, None)
    some, T = (f.dy if f.dy is not None else g.x), (f.T if f.T is not None else g.dT)
    wide, R, E = torch.promote_types(some.dtype, torch.float32), 0 if T is None else T.shape[1], routing.E
    C0, C1 = (0 if t is None else t.shape[1] for t in (f.dy, g.x))
    all0 = {"dB": (C0, R) if f.T is not None else None, "sum": (C0,) if f.sums else None,
            "dot": None if f.z is None else (C0,)}  # fmt: skip
    shapes0 = {name: shape for name, shape in all0.items() if shape}
    shapes1 = {} if second is None else {"dA": (R, C1)} | ({"da": (R,)} if g.sums else {})
    (at0, slot0), (at1, slot1) = _slot(shapes0), _slot(shapes1)
    out0, out1 = (torch.empty(E, slot, dtype=wide, device=some.device) for slot in (slot0, slot1))
    arch = launch.arch_of(some.device)
    config = config_of_outer(arch, 8 * some.element_size(), routing.P, max(C0, C1), 0, R)
    BR, BC = configs.rank_tile(R), config.BN
    tiles_0 = configs.tiles(C0, BC) * (configs.tiles(R, BR) if f.T is not None else 1)
    columns = tiles_0 + configs.tiles(C1, BC) * configs.tiles(R, BR)
    # a share for each group, or as many as keep the processors busy
    shares = max(E, min(configs.tiles(4 * launch.processors(some.device), columns), configs.tiles(routing.P, 256)))
    size = configs.tiles(configs.tiles(routing.P, shares), 4 * config.BM) * 4 * config.BM
    tiles, ends = routing.tiles(max(size, config.BM))
    part0, part1 = (torch.empty(len(tiles), slot, dtype=wide, device=some.device) for slot in (slot0, slot1))
    (u0_m, u0_c), (z0_m, z0_c), (u1_m, u1_c) = (launch.strides(t) for t in (f.dy, f.z, g.x))
    common = {"PRECISION": launch.precision(some.dtype), "ACC": launch.acc(some.dtype)}
    args = {
        "tiles_ptr": tiles, "rows0_ptr": rows0, "rows1_ptr": None if second is None else routing.rows,
        "part0_ptr": part0, "part1_ptr": part1, "slot0": slot0, "slot1": slot1, "tiles_0": tiles_0, "R": R,
        "u0_ptr": f.dy, "v0_ptr": f.T, "d0_ptr": f.d, "z0_ptr": f.z, "scale0": f.scale, "C0": C0,
        "u0_m": u0_m, "u0_c": u0_c, "z0_m": z0_m, "z0_c": z0_c, "usum_at": at0.get("sum", 0),
        "dot_at": at0.get("dot", 0),
        "u1_ptr": g.x, "v1_ptr": g.dT, "d1_ptr": g.d, "seed_ptr": g.seed, "threshold": g.threshold, "scale1": g.scale,
        "C1": C1, "u1_m": u1_m, "u1_c": u1_c, "vsum_at": at1.get("da", 0),
        "H": f.h, "PRODUCT0": f.T is not None, "PRODUCT1": second is not None, "USUM": f.sums,
        "SCALED_SUM": f.scaled, "VSUM": g.sums, "EVEN": C1 % 2 == 0, "BM": config.BM, "BC": BC, "BR": BR, **common,
    }  # fmt: skip
    if routing.P:
        launch.submit(outer_grouped, (columns, len(tiles)), args, config, some.device)
    args = {
        "ends_ptr": ends, "part0_ptr": part0, "out0_ptr": out0, "n0": slot0, "blocks0": configs.tiles(slot0, BLOCK),
        "part1_ptr": part1, "out1_ptr": out1, "n1": slot1, "BLOCK": BLOCK, "DEEP": 8, **common,
    }  # fmt: skip
    grid = (configs.tiles(slot0, BLOCK) + configs.tiles(slot1, BLOCK), E)
    launch.submit(add_up_grouped, grid, args, Config(0, 0, 0, 4, 1), some.device)
    found = {
        name: out0[:, at : at + torch.Size(shapes0[name]).numel()].view(E, *shapes0[name]) for name, at in at0.items()
    }
    return found | {
        name: out1[:, at : at + torch.Size(shapes1[name]).numel()].view(E, *shapes1[name]) for name, at in at1.items()
    }
