// Factors as the GEMM reads them: matrices of any strides and dtype become 16-bit rows, times a scale, rounded once.
#pragma once
#include "launch.cuh"

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
  int dtype;
  void* stream;

  FUSED_PEFT_HOST_DEVICE int64_t size(int which) const { return int64_t{factors[which].rows} * factors[which].columns; }
};

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

#ifdef FUSED_PEFT_EMULATE
template <class T>
Status cast_all(const Cast& c) {
  for (int64_t i = 0; i < c.size(0) + c.size(1); ++i) cast_one<T>(c, i);
  return nullptr;
}
#else
template <class T>
__global__ void cast(const __grid_constant__ Cast c) {
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < c.size(0) + c.size(1)) cast_one<T>(c, i);
}

template <class T>
Status cast_all(const Cast& c) {
  int64_t size = c.size(0) + c.size(1);
  cast<T><<<static_cast<unsigned>((size + 255) / 256), 256, 0, static_cast<cudaStream_t>(c.stream)>>>(c);
  return said(cudaGetLastError());
}
#endif

}  // namespace fused_peft

extern "C" fused_peft::Status fused_peft_cast(const fused_peft::Cast* c) {
  using namespace fused_peft;
  return c->dtype == BF16 ? cast_all<bf16>(*c) : cast_all<fp16>(*c);
}

#ifdef FUSED_PEFT_EMULATE
// From now on the function called at this line of gemm.cuh, one of those that order or wait, does nothing; 0: none.
extern "C" void fused_peft_leave_out(int line) { fused_peft::emulator::left_out = line; }
#endif

// What fused_peft/backends/extension.py holds its own declarations to.
extern "C" int fused_peft_sizes(int which) { return which ? sizeof(fused_peft::Cast) : sizeof(fused_peft::Call); }
