// csrc/schedule.cuh against CUTLASS's own tables: registers of wgmma's accumulators and of its A operand, the places of
// elements under the 128-byte swizzle, and the descriptors of both operand layouts. Run by test_cuda.py.
#include <cstdio>

#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cute/tensor.hpp"
#include "schedule.cuh"

using namespace cute;
namespace fp = fused_peft;
using Element = cute::bfloat16_t;

static int wrong = 0;
static void check(bool holds, int line, const char* what) {
  if (!holds && wrong++ < 20) std::printf("line %d: %s\n", line, what);
}
#define CHECK(...) check((__VA_ARGS__), __LINE__, #__VA_ARGS__)

template <int N>
void accumulators() {
  SM90::GMMA::CLayout_64xN<N> layout;  // (thread, register) -> row + 64 column
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i)
      CHECK(layout(t, i) == fp::accumulator_row(t, i) + 64 * fp::accumulator_column(t, i));
}

void left_operand() {
  SM90::GMMA::ALayout_64x16 layout;  // the A operand in registers
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 8; ++i)
      CHECK(layout(t, i) == fp::accumulator_row(t, i) + 64 * fp::accumulator_column(t, i));
}

template <int ROWS>
void k_contiguous() {
  auto layout = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<ROWS>, _64>{});
  auto place = as_position_independent_swizzle_layout(layout);
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < 64; ++k) CHECK(2 * int(place(row, k)) == fp::swizzled(row, k / 8) + k % 8 * 2);
  for_each(make_seq<4>{}, [&](auto step) {
    auto tensor = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
    auto slice = local_tile(tensor, Shape<Int<ROWS>, _16>{}, make_coord(0, step));
    GmmaDescriptor desc = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(slice);
    uint64_t ours = fp::rows_descriptor(0, step);
    CHECK(desc.bitfield.stride_byte_offset_ == (ours >> 32 & 0x3FFF));
    CHECK(desc.bitfield.layout_type_ == ours >> 62);
  });
}

template <int COLUMNS>
void k_across() {
  // atoms of 64 columns x 8 rows of K: along K first
  auto layout = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<COLUMNS>, _64>{}, Step<_2, _1>{});
  auto place = as_position_independent_swizzle_layout(layout);
  for (int n = 0; n < COLUMNS; ++n)
    for (int k = 0; k < 64; ++k)
      CHECK(2 * int(place(n, k)) == n / 64 * 64 * 128 + fp::swizzled(k, n % 64 / 8) + n % 8 * 2);
  auto tensor = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  auto slice = local_tile(tensor, Shape<Int<COLUMNS>, _16>{}, make_coord(0, 0));
  GmmaDescriptor desc = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(slice);
  uint64_t ours = fp::columns_descriptor(0, 0);
  CHECK(desc.bitfield.stride_byte_offset_ == (ours >> 32 & 0x3FFF));
  CHECK(desc.bitfield.leading_byte_offset_ == (ours >> 16 & 0x3FFF));
  CHECK(desc.bitfield.layout_type_ == ours >> 62);
}

int main() {
  accumulators<16>();
  accumulators<64>();
  accumulators<128>();
  accumulators<192>();
  accumulators<256>();
  left_operand();
  k_contiguous<128>();
  k_contiguous<256>();
  k_across<128>();
  k_across<192>();
  k_across<256>();
  if (wrong) std::printf("%d wrong\n", wrong);
  return wrong > 0;
}
