// One named function an instruction of sm_90a. Shared memory is addressed by its 32-bit window; csrc/emulator.h has the
// same functions for the CPU.
//
// No header of CUDA's or of C++'s is needed, so that NVRTC alone compiles this; the host's side sees the types only.
#pragma once
#include "dropout.cuh"

namespace fused_peft {

struct alignas(64) TensorMap {  // CUtensorMap
  uint64_t words[16];
};
struct bf16 {};
struct fp16 {};

}  // namespace fused_peft

#ifdef __CUDACC__
#define FUSED_PEFT_DEVICE __device__ __forceinline__

namespace fused_peft {
namespace ptx {

// where am I

FUSED_PEFT_DEVICE int thread() { return threadIdx.x; }
FUSED_PEFT_DEVICE int block() { return blockIdx.x; }
FUSED_PEFT_DEVICE int blocks() { return gridDim.x; }
FUSED_PEFT_DEVICE int uniform(int value) { return __shfl_sync(0xFFFFFFFF, value, 0); }
FUSED_PEFT_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FUSED_PEFT_DEVICE uint32_t shared_memory() {
  extern __shared__ uint8_t memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// order and waiting

FUSED_PEFT_DEVICE void sync_warp() { __syncwarp(); }
template <int THREADS>
FUSED_PEFT_DEVICE void sync_named(int name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}
FUSED_PEFT_DEVICE void sync_block() { __syncthreads(); }
FUSED_PEFT_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
FUSED_PEFT_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// between ordinary accesses and TMA's: of all memory, and of this block's shared memory
FUSED_PEFT_DEVICE void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
FUSED_PEFT_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
FUSED_PEFT_DEVICE void fence_device() { __threadfence(); }
FUSED_PEFT_DEVICE void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
template <int REGISTERS>
FUSED_PEFT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FUSED_PEFT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// mbarriers, with the default order and scope: wider ones put a fence of the whole GPU into every stage

FUSED_PEFT_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FUSED_PEFT_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
FUSED_PEFT_DEVICE void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// A word into the shared memory of a block of the cluster; it counts as 4 bytes on the barrier there.
FUSED_PEFT_DEVICE void send(uint32_t word, uint32_t to, uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there, then;\n"
      "mapa.shared::cluster.u32 there, %1, %3;\n"
      "mapa.shared::cluster.u32 then, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %0, [then];\n}" ::"r"(word),
      "r"(to), "r"(barrier), "r"(rank)
      : "memory");
}
FUSED_PEFT_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// tensor memory accelerator; coordinates: column first

FUSED_PEFT_DEVICE void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
FUSED_PEFT_DEVICE void load(const TensorMap* map, uint32_t to, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// to the same place in every block of the cluster whose bit is set, completing on the barrier of each
FUSED_PEFT_DEVICE void load_multicast(
    const TensorMap* map, uint32_t to, uint32_t barrier, int column, int row, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}
FUSED_PEFT_DEVICE void store(const TensorMap* map, uint32_t from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
FUSED_PEFT_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// until at most PENDING of this thread's committed stores still read shared memory
template <int PENDING>
FUSED_PEFT_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// matrices between registers and shared memory

FUSED_PEFT_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
FUSED_PEFT_DEVICE void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// numbers

template <class T>
FUSED_PEFT_DEVICE uint32_t pack(float low, float high);
template <>
FUSED_PEFT_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
FUSED_PEFT_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <class T>
FUSED_PEFT_DEVICE float2 unpack(uint32_t both);
template <>
FUSED_PEFT_DEVICE float2 unpack<bf16>(uint32_t both) {
  float2 two;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.bf16 %0, low;\ncvt.f32.bf16 %1, high;\n}"
      : "=f"(two.x), "=f"(two.y)
      : "r"(both));
  return two;
}
template <>
FUSED_PEFT_DEVICE float2 unpack<fp16>(uint32_t both) {
  float2 two;
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(two.x), "=f"(two.y)
      : "r"(both));
  return two;
}

// global and shared memory

template <class T>
FUSED_PEFT_DEVICE T read(const T* from) {
  return __ldg(from);
}
template <class T>
FUSED_PEFT_DEVICE T read_shared(uint32_t from) {
  return *reinterpret_cast<const T*>(__cvta_shared_to_generic(from));
}
template <class T>
FUSED_PEFT_DEVICE void write(T* to, T value) {
  *to = value;
}
// what others write meanwhile; it orders nothing
FUSED_PEFT_DEVICE uint32_t peek(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
FUSED_PEFT_DEVICE uint32_t add(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}
// the next of a count from zero; nothing else is ordered by it
FUSED_PEFT_DEVICE uint32_t take(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
FUSED_PEFT_DEVICE void pause() { __nanosleep(64); }

// warpgroup matrix products: d (64 x N, fp32) = a bᵀ, plus d where ``accumulate``

FUSED_PEFT_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FUSED_PEFT_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FUSED_PEFT_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define WGMMA_8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_16 WGMMA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_32 WGMMA_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31"
#define WGMMA_64 WGMMA_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_96 WGMMA_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_128 WGMMA_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D8 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_D16 WGMMA_D8, \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_D32 WGMMA_D16, \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_D64 WGMMA_D32, \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_D96 WGMMA_D64, \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WGMMA_D128 WGMMA_D96, \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// I: the operand after the accumulators, and those that follow it
#define WGMMA_SHARED(N, C, I, I1, I2, TYPE)                                                              \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #I2 ", 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_##C "}, %" #I    \
               ", %" #I1 ", more, 1, 1, 0, %" WGMMA_NEXT(I2) ";\n}"                                        \
               : WGMMA_D##C                                                                                \
               : "l"(a), "l"(b), "r"(accumulate), "n"(ACROSS))
#define WGMMA_REGISTERS(N, C, I, I1, I2, I3, I4, I5, TYPE)                                                  \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #I5 ", 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_##C "}, {%" #I   \
               ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", more, 1, 1, %" WGMMA_NEXT(I5) ";\n}"            \
               : WGMMA_D##C                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(ACROSS))
#define WGMMA_NEXT_10 "11"
#define WGMMA_NEXT_13 "14"
#define WGMMA_NEXT_18 "19"
#define WGMMA_NEXT_34 "35"
#define WGMMA_NEXT_37 "38"
#define WGMMA_NEXT_66 "67"
#define WGMMA_NEXT_69 "70"
#define WGMMA_NEXT_98 "99"
#define WGMMA_NEXT_101 "102"
#define WGMMA_NEXT_130 "131"
#define WGMMA_NEXT_133 "134"
#define WGMMA_NEXT(I) WGMMA_NEXT_##I

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// ACROSS: b lies with K across, in blocks of 64 columns
template <class T, int N, int ACROSS>
FUSED_PEFT_DEVICE void product(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool BF16 = IS_BF16<T>;
  if constexpr (N == 16) {
    if constexpr (BF16) WGMMA_SHARED(16, 8, 8, 9, 10, "bf16");
    else WGMMA_SHARED(16, 8, 8, 9, 10, "f16");
  }
  else if constexpr (N == 32) {
    if constexpr (BF16) WGMMA_SHARED(32, 16, 16, 17, 18, "bf16");
    else WGMMA_SHARED(32, 16, 16, 17, 18, "f16");
  }
  else if constexpr (N == 64) {
    if constexpr (BF16) WGMMA_SHARED(64, 32, 32, 33, 34, "bf16");
    else WGMMA_SHARED(64, 32, 32, 33, 34, "f16");
  }
  else if constexpr (N == 128) {
    if constexpr (BF16) WGMMA_SHARED(128, 64, 64, 65, 66, "bf16");
    else WGMMA_SHARED(128, 64, 64, 65, 66, "f16");
  }
  else if constexpr (N == 192) {
    if constexpr (BF16) WGMMA_SHARED(192, 96, 96, 97, 98, "bf16");
    else WGMMA_SHARED(192, 96, 96, 97, 98, "f16");
  }
  else if constexpr (N == 256) {
    if constexpr (BF16) WGMMA_SHARED(256, 128, 128, 129, 130, "bf16");
    else WGMMA_SHARED(256, 128, 128, 129, 130, "f16");
  }
}

// a: the 64 x 16 operand in registers, as load_matrices gives it
template <class T, int N, int ACROSS>
FUSED_PEFT_DEVICE void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  constexpr bool BF16 = IS_BF16<T>;
  if constexpr (N == 128) {
    if constexpr (BF16) WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, "bf16");
    else WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, "f16");
  }
  else if constexpr (N == 192) {
    if constexpr (BF16) WGMMA_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, "bf16");
    else WGMMA_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, "f16");
  }
  else if constexpr (N == 256) {
    if constexpr (BF16) WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, "bf16");
    else WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, "f16");
  }
}

}  // namespace ptx
}  // namespace fused_peft
#endif
