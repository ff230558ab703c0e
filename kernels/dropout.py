"""keep(e) of ``fused_peft.dropout`` on the GPU: the same bits, two elements a hash, recomputed where needed."""

import triton
import triton.language as tl


@triton.jit
def keep(seed_ptr, element, threshold):
    """True where the row-major element (any int32 tensor) is kept; seed_ptr: two int32 words."""
    seed_0 = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    seed_1 = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    h = (element.to(tl.uint32) >> 1) ^ seed_0
    h = (h ^ (h >> 17)) * 0xED5AD4BB
    h = h ^ seed_1
    h = (h ^ (h >> 11)) * 0xAC4C1B51
    h = (h ^ (h >> 15)) * 0x31848BAB
    h = h ^ (h >> 14)
    half = tl.where((element & 1) == 0, h, h >> 16) & 0xFFFF
    return half.to(tl.uint16).to(tl.int16, bitcast=True).to(tl.int32) >= threshold


@triton.jit
def keep_mask(out_ptr, seed_ptr, n, threshold, BLOCK: tl.constexpr):
    """out (n,) int8: the mask itself, for tests and for checking other kernels."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + element, keep(seed_ptr, element, threshold).to(tl.int8), mask=element < n)
