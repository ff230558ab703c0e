// The host's side: a call in plain C becomes tensor maps, a schedule and one launch; nothing of PyTorch is needed.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gemm.cuh"
#include "zeros.cuh"

namespace fused_peft {

// One GEMM. Strides in elements; y and z are (M, N) contiguous, t (M, R). Kinds are those of gemm.cuh; dtype too, of x,
// w, s, b, a, y, z and t. ``across``: w is stored (K, N). Null: absent. fused_peft/backends/cuda.py has its twin.
struct Call {
  const void *x, *w, *s, *b, *a, *d_in, *d_out, *bias;
  const int32_t* seed;
  void *y, *z, *t;
  int64_t x_stride, w_stride, s_stride, b_stride, a_stride;
  int M, N, K, R, threshold;
  int dtype, d_in_kind, d_out_kind, bias_kind;
  int bias_inside, across, cluster_m, cluster_n, group, processors, overlap;
  uint32_t seed_of_order;  // the emulator's
  void* stream;
};

using Status = const char*;  // what went wrong; null when nothing did

#ifndef FUSED_PEFT_EMULATE
// cuTensorMapEncodeTiled, found through the runtime so that libcuda is no dependency of the link.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  static auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

inline Status said(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next check elsewhere reports it again
  return cudaGetErrorString(error);
}
#endif

// A (rows, columns) matrix and the box one TMA instruction moves; bytes: of an element.
inline bool describe(TensorMap* map, const void* data, int rows, int columns, int64_t stride, int box_rows,
                     int box_columns, int kind) {
  int bytes = kind == FP32 ? 4 : 2;
  bool swizzled = box_rows > 1;  // a matrix; a vector lies as it is
#ifdef FUSED_PEFT_EMULATE
  *map = {static_cast<uint8_t*>(const_cast<void*>(data)), stride * bytes, columns, rows, box_columns, box_rows, bytes,
          swizzled};
  return reinterpret_cast<uint64_t>(data) % 16 == 0 && (rows == 1 || stride * bytes % 16 == 0);
#else
  cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride * bytes)};
  cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  auto type = kind == FP32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
              : kind == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  auto encode = encoder();
  return encode && encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE,
                          swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#endif
}

// What Zeros needs of CUDA.
struct Cuda {
#ifdef FUSED_PEFT_EMULATE
  static Status look(void* handle, Stream* stream) {
    *stream = {0, reinterpret_cast<uint64_t>(handle), false};
    return nullptr;
  }
  static Status zeros(size_t bytes, void** data) {
    *data = std::calloc(bytes, 1);
    return *data ? nullptr : "no memory";
  }
#else
  static Status look(void* handle, Stream* stream) {
    unsigned long long id = 0;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    auto given = static_cast<cudaStream_t>(handle);
    cudaError_t error = cudaGetDevice(&stream->device);
    if (error == cudaSuccess) error = cudaStreamGetId(given, &id);
    if (error == cudaSuccess) error = cudaStreamIsCapturing(given, &status);
    stream->id = id, stream->capturing = status != cudaStreamCaptureStatusNone;
    return said(error);
  }
  static Status zeros(size_t bytes, void** data) {
    auto mode = cudaStreamCaptureModeRelaxed;  // of this thread: a capture elsewhere would forbid it to allocate
    cudaStream_t own = nullptr;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error == cudaSuccess) error = cudaMalloc(data, bytes);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemsetAsync(*data, 0, bytes, own);
    if (error == cudaSuccess) error = cudaStreamSynchronize(own);
    if (own) cudaStreamDestroy(own);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return said(error);
  }
#endif
};

// The launch's counter and flags; a cluster may reach one row of tiles past the edge.
inline Status lend(const Call& c, Parameters* p) {
  static Zeros<Cuda> zeros;
  uint32_t* words = nullptr;
  Status wrong = zeros.get(c.stream, 8 + p->schedule.padded_m(), &words);
  p->counter = words, p->flags = words + 8;  // in sectors of their own
  return wrong;
}

template <class P>
Status prepare(const Call& c, Parameters* p) {
  if (c.cluster_m * c.cluster_n > 2 || c.cluster_m * c.cluster_n < 1) return "clusters are of one or two blocks";
  p->schedule = {ceil_div(c.M, P::BM), ceil_div(c.N, P::BN), c.cluster_m, c.cluster_n, c.group};
  p->d_out.kind = c.d_out ? c.d_out_kind : NONE, p->bias.kind = c.bias ? c.bias_kind : NONE;
  p->seed = c.seed;
  p->t = static_cast<uint32_t*>(c.t);
  p->M = c.M, p->N = c.N, p->K = c.K, p->R = c.R, p->threshold = c.threshold, p->d_in_kind = c.d_in_kind;
  p->bias_inside = c.bias_inside, p->has_y = c.y, p->has_z = c.z, p->overlap = c.overlap && P::FORM != INLINE;
  int rows_x = P::BM / c.cluster_n, rows_w = P::BN / c.cluster_m;
  bool fine = describe(&p->x, c.x, c.M, c.K, c.x_stride, rows_x, DEPTH, c.dtype);
  if (P::ACROSS) fine &= describe(&p->w, c.w, c.K, c.N, c.w_stride, DEPTH / c.cluster_m, DEPTH, c.dtype);
  else fine &= describe(&p->w, c.w, c.N, c.K, c.w_stride, rows_w, DEPTH, c.dtype);
  if (c.R) {
    const void* s = P::FORM == INLINE ? c.t : c.s;
    fine &= describe(&p->s, s, c.M, c.R, P::FORM == INLINE ? c.R : c.s_stride, rows_x, DEPTH, c.dtype);
    fine &= describe(&p->b, c.b, c.N, c.R, c.b_stride, rows_w, DEPTH, c.dtype);
  }
  if (c.y) fine &= describe(&p->y, c.y, c.M, c.N, c.N, 16, DEPTH, c.dtype);
  if (c.z) fine &= describe(&p->z, c.z, c.M, c.N, c.N, 16, DEPTH, c.dtype);
  if (P::FORM == INLINE) fine &= describe(&p->a, c.a, c.R, c.K, c.a_stride, P::INNER, DEPTH, c.dtype);
  if (P::FORM == SCALED) fine &= describe(&p->d_in, c.d_in, 1, c.K, ceil_div(c.K, 8) * 8, 1, DEPTH, c.d_in_kind);
  if (c.d_out) fine &= describe(&p->d_out.map, c.d_out, 1, c.N, ceil_div(c.N, 8) * 8, 1, P::BN, c.d_out_kind);
  if (c.bias) fine &= describe(&p->bias.map, c.bias, 1, c.N, ceil_div(c.N, 8) * 8, 1, P::BN, c.bias_kind);
  if (!fine) return "cuTensorMapEncodeTiled refuses an operand: TMA wants 16-byte rows";
  return lend(c, p);
}

#ifdef FUSED_PEFT_EMULATE
template <class P>
Status start(const Call& c) {
  Parameters p;
  if (Status wrong = prepare<P>(c, &p)) return wrong;
  static std::string error;
  try {
    emulator::Machine machine(p.schedule.blocks(c.processors), p.schedule.size(), THREADS, c.seed_of_order,
                              [&p] { run<P>(p); });
    machine.run();
    for (int i = 0; i < 8 + p.schedule.padded_m(); ++i)
      if (p.counter[i]) emulator::fail("the counter or a flag is left raised");
  } catch (const std::exception& e) {
    std::memset(p.counter, 0, 4 * (8 + p.schedule.padded_m()));
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
#else
template <class P>
Status start(const Call& c) {
  Parameters p;
  if (Status wrong = prepare<P>(c, &p)) return wrong;
  // of the current device, so asked for every time
  cudaError_t error = cudaFuncSetAttribute(gemm<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::BYTES);
  if (error != cudaSuccess) return said(error);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(p.schedule.size()), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = p.overlap;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.schedule.blocks(c.processors));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = P::BYTES;
  config.stream = static_cast<cudaStream_t>(c.stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  return said(cudaLaunchKernelEx(&config, gemm<P>, static_cast<const Parameters>(p)));
}
#endif

}  // namespace fused_peft

// One compiled plan, callable by name from C; what fused_peft/backends/extension.py puts into files of their own.
#define FUSED_PEFT_INSTANCE(NAME, ...)                                       \
  extern "C" fused_peft::Status fused_peft_##NAME(const fused_peft::Call* c) { \
    using namespace fused_peft;                                              \
    return start<Plan<__VA_ARGS__>>(*c);                                     \
  }
