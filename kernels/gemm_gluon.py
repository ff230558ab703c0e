"""gemm_gluon: y = d_out ⊙ (x Wᵀ + drop(scale·S Bᵀ)) + bias on sm_90, by warps that each do one thing, in Gluon.

    producer   one warp: TMA brings tiles of x and W into a ring in shared memory
    consumers  two groups of four warps, half the tile's rows each: wgmma from the ring, the epilogue from registers

The rank step is one more slot of the ring, before a tile's first K step: S where x goes, B where W goes; the scale and
the mask act on its product in registers. TMA stores a quarter of the columns at a time while the next one is made
ready, and the last of them while the next tile begins. The grid is persistent.

Only imported where ``triton_internals.no_gluon`` knows this Triton's Gluon; Triton's interpreter cannot run it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import configs, launch
from .configs import Config, tiles
from .dropout import _hash
from .gemm_lowrank import Mask, Result, Update, _describable
from .tile import place

CONSUMERS = gl.constexpr(2)
# Triton 3.9 renamed both
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _fetch(it, a_desc, b_desc, m, n, k, ring, TRANSPOSED: gl.constexpr):
    """Step ``it`` of the ring: the tiles of x and W, or of S and B, at depth k, once the consumers have left the
    slot."""
    left, right, full, free = ring
    STAGES: gl.constexpr = left.shape[0]
    slot = it % STAGES
    mbarrier.wait(free.index(slot), (it // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    load(a_desc, [m, k], full.index(slot), left.index(slot))
    if TRANSPOSED:
        load(b_desc, [k, n], full.index(slot), right.index(slot))
    else:
        load(b_desc, [n, k], full.index(slot), right.index(slot))
    return it + 1


@gluon.jit
def _produce(
    x_desc, w_desc, s_desc, b_desc, ring, M, N, K,
    TRANSPOSED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    it = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        i_m, i_n = place(tile, M, N, BM, BN, GROUP)
        if s_desc is not None:
            it = _fetch(it, s_desc, b_desc, i_m * BM, i_n * BN, 0, ring, TRANSPOSED)
        for k in range(0, K, BK):
            it = _fetch(it, x_desc, w_desc, i_m * BM, i_n * BN, k, ring, TRANSPOSED)


@gluon.jit
def _halves(t):
    """The left and the right half of the columns."""
    return gl.split(t.reshape((t.shape[0], 2, t.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def _dropped(acc, seed_ptr, m, n, width, threshold, scale, layout: gl.constexpr):
    """scale·acc where it is kept; neighbouring columns, which one thread holds, share a hash."""
    ROWS: gl.constexpr = acc.shape[0]
    PAIRS: gl.constexpr = acc.shape[1] // 2
    even, odd = gl.split(acc.reshape((ROWS, PAIRS, 2)))
    at: gl.constexpr = even.type.layout
    row = (m + gl.arange(0, ROWS, gl.SliceLayout(1, at))).to(gl.uint32) * width
    col = (n + 2 * gl.arange(0, PAIRS, gl.SliceLayout(0, at))).to(gl.uint32)
    bits = _hash(seed_ptr, (gl.expand_dims(row, 1) + gl.expand_dims(col, 0)) >> 1)
    low = (bits & 0xFFFF).to(gl.uint16).to(gl.int16, bitcast=True).to(gl.int32)
    high = (bits >> 16).to(gl.uint16).to(gl.int16, bitcast=True).to(gl.int32)
    even = gl.where(low >= threshold, even * scale, 0.0)
    odd = gl.where(high >= threshold, odd * scale, 0.0)
    return gl.convert_layout(gl.join(even, odd).reshape((ROWS, 2 * PAIRS)), layout)


@gluon.jit
def _put(desc, value, m, n, buffer):
    """Store a piece through a buffer that the store before last has left."""
    tma.store_wait(1)
    buffer.store(value.to(desc.dtype))
    fence_async_shared()
    store(desc, [m, n], buffer)


@gluon.jit
def _emit(part, i, y_desc, z_desc, m, n, N, d_out_ptr, bias_ptr, outs, BIAS_INSIDE: gl.constexpr):
    """z and y of the i-th piece of columns, each through the other buffer than the one before."""
    n += i * part.shape[1]
    col = n + gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))
    if bias_ptr is not None:
        bias = gl.expand_dims(gl.load(bias_ptr + col, mask=col < N, other=0.0).to(gl.float32), 0)
        if BIAS_INSIDE:
            part += bias
    if z_desc is not None:
        _put(z_desc, part, m, n, outs.index(0))
    if d_out_ptr is not None:
        part *= gl.expand_dims(gl.load(d_out_ptr + col, mask=col < N, other=0.0).to(gl.float32), 0)
    if bias_ptr is not None:
        if not BIAS_INSIDE:
            part += bias
    _put(y_desc, part, m, n, outs.index(i % 2 if z_desc is None else 1))


@gluon.jit
def _consume(
    I, outs, y_desc, z_desc, s_desc, d_out_ptr, bias_ptr, seed_ptr, ring, scale, threshold, M, N, K,
    BIAS_INSIDE: gl.constexpr, MASK: gl.constexpr, TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Rows I·BM/2 on of every tile."""
    ROWS: gl.constexpr = BM // CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    left, right, full, free = ring
    STAGES: gl.constexpr = left.shape[0]
    it = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        i_m, i_n = place(tile, M, N, BM, BN, GROUP)
        m, n = i_m * BM + I * ROWS, i_n * BN
        acc = gl.zeros((ROWS, BN), gl.float32, layout)
        if s_desc is not None:
            slot = it % STAGES
            mbarrier.wait(full.index(slot), it // STAGES & 1)
            s = left.index(slot).slice(I * ROWS, ROWS, 0).slice(0, BR, 1)
            b = right.index(slot).slice(0, BR, 0 if TRANSPOSED else 1)
            acc = warpgroup_mma(s, b if TRANSPOSED else b.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(free.index(slot), count=1)
            it += 1
            if MASK:
                acc = _dropped(acc, seed_ptr, m, n, N, threshold, scale, layout)
            else:
                acc *= scale
        for k in range(0, K, BK):
            slot = it % STAGES
            mbarrier.wait(full.index(slot), it // STAGES & 1)
            x, w = left.index(slot).slice(I * ROWS, ROWS, 0), right.index(slot)
            acc = warpgroup_mma(x, w if TRANSPOSED else w.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # this step's product is under way, the one before has ended
            mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), count=1, pred=k > 0)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), count=1)
        near, far = _halves(acc)
        a, b = _halves(near)
        c, d = _halves(far)
        _emit(a, 0, y_desc, z_desc, m, n, N, d_out_ptr, bias_ptr, outs, BIAS_INSIDE)
        _emit(b, 1, y_desc, z_desc, m, n, N, d_out_ptr, bias_ptr, outs, BIAS_INSIDE)
        _emit(c, 2, y_desc, z_desc, m, n, N, d_out_ptr, bias_ptr, outs, BIAS_INSIDE)
        _emit(d, 3, y_desc, z_desc, m, n, N, d_out_ptr, bias_ptr, outs, BIAS_INSIDE)
    tma.store_wait(0)


@gluon.jit
def gemm_gluon(
    x_desc, w_desc, y_desc, z_desc, s_desc, b_desc, d_out_ptr, bias_ptr, seed_ptr, scale, threshold, M, N, K,
    BIAS_INSIDE: gl.constexpr, MASK: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """MASK: dropout acts on the update. TRANSPOSED: w is stored (K, N) and b (R, N)."""
    ROWS: gl.constexpr = BM // CONSUMERS
    left = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    if TRANSPOSED:
        right = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BK, BN], w_desc.layout)
    else:
        right = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    outs0 = gl.allocate_shared_memory(y_desc.dtype, [2, ROWS, BN // 4], y_desc.layout)
    outs1 = gl.allocate_shared_memory(y_desc.dtype, [2, ROWS, BN // 4], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    fence_async_shared()
    ring = (left, right, full, free)
    gl.warp_specialize(
        [
            (_consume, (0, outs0, y_desc, z_desc, s_desc, d_out_ptr, bias_ptr, seed_ptr, ring, scale, threshold,
                        M, N, K, BIAS_INSIDE, MASK, TRANSPOSED, BM, BN, BK, BR, GROUP)),
            (_consume, (1, outs1, y_desc, z_desc, s_desc, d_out_ptr, bias_ptr, seed_ptr, ring, scale, threshold,
                        M, N, K, BIAS_INSIDE, MASK, TRANSPOSED, BM, BN, BK, BR, GROUP)),
            (_produce, (x_desc, w_desc, s_desc, b_desc, ring, M, N, K, TRANSPOSED, BM, BN, BK, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@configs.closed_form("gemm_gluon")
def config_of_gemm(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """As many stages as fill the shared memory beside the four pieces that are stored."""
    wide = N >= 256 and tiles(M, 128) * tiles(N, 256) >= 132
    return Config(128, 256, 64, 4, 4) if wide else Config(128, 128, 64, 4, 6)


@cache
def _layout(rows: int, columns: int):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)  # fp16's too: it goes by the bits


def _describe(t: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    return None if t is None else TensorDescriptor.from_tensor(t, [rows, columns], _layout(rows, columns))


def _readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in dtype with rows that TMA reads, from whole 16 bytes on: else a copy."""
    if t.dtype == dtype and _describable(t):
        return t
    rows, columns = t.shape
    return t.new_empty(rows, 8 * tiles(columns, 8), dtype=dtype)[:, :columns].copy_(t)


def gemm(
    x: Tensor,
    w: Tensor,
    like: tuple[int, int],
    update: Update | None = None,
    d_out: Tensor | None = None,
    bias: Tensor | None = None,
    bias_inside: bool = True,
    mask: Mask | None = None,
    want_z: bool = False,
) -> Result:
    """``gemm_lowrank.gemm`` for what the kernel takes: x (M, K) and w (N, K) or its transpose with rows that TMA reads,
    a rank of at most 64; ``backends.gluon`` sees to it."""
    M, N = like
    K, R = x.shape[1], 0 if update is None else update.B.shape[1]
    config = configs.choose("gemm_gluon", launch.arch_of(x.device), 8 * x.element_size(), M, N, K, R)
    BM, BN, BK = config.BM, config.BN, config.BK
    across = not _describable(w)
    S = B = None
    if update is not None:
        S, B = _readable(update.S, x.dtype), _readable(update.B.t() if across else update.B, x.dtype)
    result = Result(x.new_empty(M, N), x.new_empty(M, N) if want_z else None, None, None)
    block = (BK, BN) if across else (BN, BK)
    piece = BM // CONSUMERS.value, BN // 4
    masked = update is not None and update.masked
    args = {
        "x_desc": _describe(x, BM, BK), "w_desc": _describe(w.t() if across else w, *block),
        "y_desc": _describe(result.y, *piece), "z_desc": _describe(result.z, *piece),
        "s_desc": _describe(S, BM, BK), "b_desc": _describe(B, *block),  # beyond the rank TMA fills with zeros
        "d_out_ptr": d_out, "bias_ptr": bias, "seed_ptr": mask.seed if masked else None,
        "scale": 1.0 if update is None else update.scale, "threshold": mask.threshold if masked else 0,
        "M": M, "N": N, "K": K, "BIAS_INSIDE": bias_inside, "MASK": masked, "TRANSPOSED": across,
        "STAGES": config.stages, "BM": BM, "BN": BN, "BK": BK, "BR": configs.rank_tile(R, 64), "GROUP": config.group,
    }  # fmt: skip
    programs = min(launch.processors(x.device), tiles(M, BM) * tiles(N, BN))
    launch.submit(gemm_gluon, (programs,), args, config, x.device)
    return result
