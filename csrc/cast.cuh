// Factors as the GEMM reads them: matrices of any strides and dtype become 16-bit rows, times a scale, rounded once.
#pragma once
#include "gemm.cuh"

namespace fused_peft {

struct Factor {
  const void* from;
  void* to;
  int64_t row_stride, column_stride;  // of ``from``, in elements
  int rows, columns, kind;            // kind: of gemm.cuh
  float scale;
};

// One or two factors, in one launch; a second of no rows is none.
struct Cast {
  Factor factors[2];
  int dtype, device;
  void* stream;

  FUSED_PEFT_HOST_DEVICE int64_t size(int which) const { return int64_t{factors[which].rows} * factors[which].columns; }
};

#ifdef FUSED_PEFT_DEVICE
template <class T>
FUSED_PEFT_DEVICE void cast_one(const Cast& c, int64_t i) {
  bool second = i >= c.size(0);
  const Factor& f = c.factors[second];
  if (second) i -= c.size(0);
  int64_t at = i / f.columns * f.row_stride + i % f.columns * f.column_stride;
  float value;
  if (f.kind == FP32) {
    value = ptx::read(static_cast<const float*>(f.from) + at);
  } else {
    uint32_t bits = ptx::read(static_cast<const uint16_t*>(f.from) + at);
    value = f.kind == BF16 ? ptx::unpack<bf16>(bits).x : ptx::unpack<fp16>(bits).x;
  }
  static_cast<uint16_t*>(f.to)[i] = static_cast<uint16_t>(ptx::pack<T>(value * f.scale, 0.f));
}

#endif

}  // namespace fused_peft

#ifdef __CUDACC__
extern "C" __global__ void fused_peft_cast(const __grid_constant__ fused_peft::Cast c) {
  using namespace fused_peft;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= c.size(0) + c.size(1)) return;
  if (c.dtype == BF16) cast_one<bf16>(c, i);
  else cast_one<fp16>(c, i);
}
#endif
