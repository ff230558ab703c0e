// The host's side: a call in plain C becomes tensor maps, a schedule and one launch. A C++ compiler alone builds it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"
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
  int device;
  void* stream;
};

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
  const uint64_t sizes[2] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)};
  const uint64_t strides[1] = {static_cast<uint64_t>(stride * bytes)};
  const uint32_t box[2] = {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows)}, steps[2] = {1, 1};
  auto type = kind == FP32 ? Driver::FP32 : kind == BF16 ? Driver::BF16 : Driver::FP16;
  return !driver.encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, 0,
                        swizzled ? Driver::SWIZZLE_128B : 0, Driver::L2_256B, 0);
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
    int result = driver.get_device(&stream->device);
    if (!result) result = driver.stream_id(handle, &id);
    stream->id = id, stream->capturing = driver.captures(handle);
    return driver.said(result);
  }
  static Status zeros(size_t bytes, void** data) { return driver.zeros(bytes, data); }
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
  p->schedule = {ceil_div(c.M, P::BM), ceil_div(c.N, P::BN), c.cluster_m, c.cluster_n, c.group, P::FORM == INLINE};
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
    if (p.overlap && c.s) machine.launch_before(c.s, c.M, 2 * c.R, 2 * c.s_stride);
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
Status start(const Call& c, Kernel* kernel) {
  Parameters p = {};
  if (Status wrong = driver.bind(c.device)) return wrong;
  if (Status wrong = driver.allow(kernel, c.device, P::BYTES)) return wrong;
  if (Status wrong = prepare<P>(c, &p)) return wrong;
  LaunchAttribute attributes[2] = {{LaunchAttribute::CLUSTER, {static_cast<unsigned>(p.schedule.size()), 1, 1}},
                                   {LaunchAttribute::PROGRAMMATIC, {p.overlap}}};
  LaunchConfig config = {
      {static_cast<unsigned>(p.schedule.blocks(c.processors)), 1, 1}, {THREADS, 1, 1}, P::BYTES, c.stream, attributes, 2};
  void* parameters[1] = {&p};
  return driver.said(driver.launch_ex(&config, kernel->handle, parameters, nullptr));
}
#endif

}  // namespace fused_peft

// One plan, callable by name from C once its kernel is loaded; what fused_peft/backends/plans.py makes a library of.
#ifdef FUSED_PEFT_EMULATE
#define FUSED_PEFT_INSTANCE(NAME, ...)                                       \
  extern "C" fused_peft::Status fused_peft_##NAME(const fused_peft::Call* c) { \
    using namespace fused_peft;                                              \
    return start<Plan<__VA_ARGS__>>(*c);                                     \
  }
#else
#define FUSED_PEFT_INSTANCE(NAME, ...)                                         \
  static fused_peft::Kernel kernel_##NAME;                                     \
  extern "C" fused_peft::Status fused_peft_load_##NAME(const void* cubin) {    \
    return fused_peft::driver.read(&kernel_##NAME, cubin, "fused_peft_" #NAME); \
  }                                                                            \
  extern "C" fused_peft::Status fused_peft_##NAME(const fused_peft::Call* c) { \
    using namespace fused_peft;                                                \
    return start<Plan<__VA_ARGS__>>(*c, &kernel_##NAME);                       \
  }
#endif
