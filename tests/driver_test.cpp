// csrc/driver.h holds to NVIDIA's own cuda.h: compiles where it does.
#include "driver.h"

#include <cuda.h>

#include <cstddef>

using namespace fused_peft;

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute), "");
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value), "");
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig), "");
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes), "");
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream), "");
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs), "");
static_assert(offsetof(LaunchConfig, count) == offsetof(CUlaunchConfig, numAttrs), "");

template <int A, int B>
struct Same {
  static_assert(A == B, "");
};
Same<LaunchAttribute::CLUSTER, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION> cluster;
Same<LaunchAttribute::PROGRAMMATIC, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION> programmatic;
Same<Driver::RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED> relaxed;
Same<Driver::NON_BLOCKING, CU_STREAM_NON_BLOCKING> non_blocking;
Same<Driver::SHARED_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES> shared_bytes;
Same<Driver::FP16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16> fp16;
Same<Driver::FP32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32> fp32;
Same<Driver::BF16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16> bf16;
Same<Driver::SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_128B> swizzle;
Same<Driver::L2_256B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B> promotion;

// As many arguments, each as large.
template <class Result, class... A, class... B>
constexpr bool alike(Result (*)(A...), CUresult (*)(B...)) {
  if constexpr (sizeof...(A) == sizeof...(B)) return ((sizeof(A) == sizeof(B)) && ...);
  else return false;
}
#define ALIKE(OURS, THEIRS) static_assert(alike(decltype(Driver::OURS)(nullptr), decltype(&THEIRS)(nullptr)), "")
ALIKE(launch, cuLaunchKernel);
ALIKE(launch_ex, cuLaunchKernelEx);
ALIKE(encode, cuTensorMapEncodeTiled);
ALIKE(error_string, cuGetErrorString);
ALIKE(get_context, cuCtxGetCurrent);
ALIKE(set_context, cuCtxSetCurrent);
ALIKE(primary, cuDevicePrimaryCtxRetain);
ALIKE(load, cuLibraryLoadData);
ALIKE(get_kernel, cuLibraryGetKernel);
ALIKE(set_attribute, cuKernelSetAttribute);
ALIKE(capture_mode, cuThreadExchangeStreamCaptureMode);
ALIKE(capturing, cuStreamIsCapturing);
ALIKE(get_device, cuCtxGetDevice);
ALIKE(stream_id, cuStreamGetId);
ALIKE(allocate, cuMemAlloc);
ALIKE(create_stream, cuStreamCreate);
ALIKE(set_bytes, cuMemsetD8Async);
ALIKE(synchronize, cuStreamSynchronize);
ALIKE(destroy_stream, cuStreamDestroy);

int main() {}
