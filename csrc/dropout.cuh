// keep(e) of fused_peft/dropout.py for CUDA and host code: the same bits, two elements a hash.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FUSED_PEFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_PEFT_HOST_DEVICE inline
#endif

namespace fused_peft {

// True where the row-major element is kept; seed: two words, threshold: as fused_peft.dropout.threshold(p).
FUSED_PEFT_HOST_DEVICE bool keep(const int32_t* seed, uint32_t element, int32_t threshold) {
  uint32_t h = (element >> 1) ^ static_cast<uint32_t>(seed[0]);
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h ^= static_cast<uint32_t>(seed[1]);
  h = (h ^ (h >> 11)) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  h ^= h >> 14;
  return static_cast<int16_t>(element & 1 ? h >> 16 : h) >= threshold;
}

}  // namespace fused_peft
