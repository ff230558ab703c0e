// CUDA's driver, opened when it is needed: what csrc/ takes of cuda.h, declared by hand, so that neither its headers nor
// its libraries are needed to build. tests/driver_test.cpp holds the declarations to NVIDIA's.
#pragma once
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fused_peft {

using Status = const char*;  // what went wrong; null when nothing did

struct LaunchAttribute {  // CUlaunchAttribute
  enum Id : int { CLUSTER = 4, PROGRAMMATIC = 6 };
  alignas(8) Id id;
  alignas(8) unsigned value[16];
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};

struct Kernel {
  void* handle = nullptr;              // a CUkernel, of every device
  std::atomic<uint64_t> allowed{0};  // the devices on which it may have its shared memory
};

struct Driver {
  enum { RELAXED = 2, NON_BLOCKING = 1, SHARED_BYTES = 8 };  // of several enums
  enum Type { FP16 = 6, FP32 = 7, BF16 = 9 };  // of a tensor map's elements
  enum { SWIZZLE_128B = 3, L2_256B = 3 };

  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*launch_ex)(const LaunchConfig*, void*, void**, void**);
  int (*encode)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int,
                int, int);
  int (*error_string)(int, const char**);
  int (*get_context)(void**);
  int (*set_context)(void*);
  int (*primary)(void**, int);
  int (*load)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  int (*get_kernel)(void**, void*, const char*);
  int (*set_attribute)(int, int, void*, int);
  int (*capture_mode)(int*);
  int (*capturing)(void*, int*);
  int (*get_device)(int*);
  int (*stream_id)(void*, unsigned long long*);
  int (*allocate)(unsigned long long*, size_t);
  int (*create_stream)(void**, unsigned);
  int (*set_bytes)(unsigned long long, unsigned char, size_t, void*);
  int (*synchronize)(void*);
  int (*destroy_stream)(void*);

  Status open(const char* library) {
    void* handle = dlopen(library, RTLD_LAZY);
    if (!handle) return dlerror();
    auto find = [handle](auto& function, const char* name) {
      function = reinterpret_cast<decltype(+function)>(dlsym(handle, name));
      return function != nullptr;
    };
    bool all = find(launch, "cuLaunchKernel") && find(launch_ex, "cuLaunchKernelEx") &&
               find(encode, "cuTensorMapEncodeTiled") && find(error_string, "cuGetErrorString") &&
               find(get_context, "cuCtxGetCurrent") && find(set_context, "cuCtxSetCurrent") &&
               find(primary, "cuDevicePrimaryCtxRetain") && find(load, "cuLibraryLoadData") &&
               find(get_kernel, "cuLibraryGetKernel") && find(set_attribute, "cuKernelSetAttribute") &&
               find(capture_mode, "cuThreadExchangeStreamCaptureMode") && find(capturing, "cuStreamIsCapturing") &&
               find(get_device, "cuCtxGetDevice") && find(stream_id, "cuStreamGetId") &&
               find(allocate, "cuMemAlloc_v2") && find(create_stream, "cuStreamCreate") &&
               find(set_bytes, "cuMemsetD8Async") && find(synchronize, "cuStreamSynchronize") &&
               find(destroy_stream, "cuStreamDestroy_v2");
    return all ? nullptr : "the driver lacks a function of CUDA 12";
  }

  Status said(int result) const {
    if (!result) return nullptr;
    const char* text = nullptr;
    error_string(result, &text);
    return text ? text : "an error that the driver has no words for";
  }

  // A thread of autograd's may have no context yet: PyTorch sets a device only where it is not the current one.
  Status bind(int device) const {
    void* context = nullptr;
    int result = get_context(&context);
    if (result || context) return said(result);
    if ((result = primary(&context, device))) return said(result);
    return said(set_context(context));
  }

  bool captures(void* stream) const {
    int status = 0;
    return !capturing(stream, &status) && status;
  }

  // A kernel of a cubin. Other threads may capture a graph meanwhile.
  Status read(Kernel* kernel, const void* cubin, const char* name) const {
    int mode = RELAXED;
    capture_mode(&mode);
    void* library = nullptr;
    int result = load(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (!result) result = get_kernel(&kernel->handle, library, name);
    capture_mode(&mode);
    return said(result);
  }

  // Device memory of zeros, outside any stream of the caller's and any capture.
  Status zeros(size_t bytes, void** data) const {
    int mode = RELAXED;
    unsigned long long made = 0;
    void* own = nullptr;
    capture_mode(&mode);
    int result = allocate(&made, bytes);
    if (!result) result = create_stream(&own, NON_BLOCKING);
    if (!result) result = set_bytes(made, 0, bytes, own);
    if (!result) result = synchronize(own);
    if (own) destroy_stream(own);
    capture_mode(&mode);
    *data = reinterpret_cast<void*>(made);
    return said(result);
  }

  // Let a kernel have so much shared memory on a device: asked for once.
  Status allow(Kernel* kernel, int device, int shared_bytes) const {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (kernel->allowed & bit) return nullptr;
    if (int result = set_attribute(SHARED_BYTES, shared_bytes, kernel->handle, device)) return said(result);
    kernel->allowed |= bit;
    return nullptr;
  }
};

static Driver driver;

}  // namespace fused_peft
