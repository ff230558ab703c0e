// keep(e) of fused_peft/core/dropout.py for CUDA and host code: the same bits, two elements a hash.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC, which has no headers
using int16_t = short;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define FUSED_PEFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_PEFT_HOST_DEVICE inline
#endif

namespace fused_peft {

// The 32 bits of a pair of elements; seed: two words.
FUSED_PEFT_HOST_DEVICE uint32_t hash(const int32_t* seed, uint32_t pair) {
  uint32_t h = pair ^ static_cast<uint32_t>(seed[0]);
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h ^= static_cast<uint32_t>(seed[1]);
  h = (h ^ (h >> 11)) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  return h ^ (h >> 14);
}

// Whether an element of the pair (0 or 1) is kept; threshold: as core.dropout.threshold(p).
FUSED_PEFT_HOST_DEVICE bool kept(uint32_t bits, int which, int32_t threshold) {
  return static_cast<int16_t>(which ? bits >> 16 : bits) >= threshold;
}

// Whether the row-major element is kept.
FUSED_PEFT_HOST_DEVICE bool keep(const int32_t* seed, uint32_t element, int32_t threshold) {
  return kept(hash(seed, element >> 1), element & 1, threshold);
}

}  // namespace fused_peft
