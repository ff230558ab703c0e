// y = d_out ⊙ (x Wᵀ + S Bᵀ) + bias for sm_90a: two operand pairs in one K loop, (x, W) and then (S, B).
//
// Persistent blocks of one producer warpgroup, which starts TMA loads into a ring of stages, and two consumer warpgroups,
// which multiply with wgmma, each half of the tile's rows. The result leaves through TMA while the next tile begins.
// Clusters draw their tiles from one counter, so that a tile waits at most for tiles whose blocks are running.
//   LATE    the low-rank pair after the main one; with ``overlap`` S may still be in the making when the kernel starts
//   MASKED  the low-rank pair first, and dropout's mask on it: dx = dz W + drop(dT A)
//   SCALED  x ⊙ d_in in place of x: the tile goes through registers; the low-rank pair last
//   INLINE  the blocks of the first column also make T = x Aᵀ, store it and raise a flag, on which the low-rank pair waits
// ACROSS reads W as it lies for dx: (K, N), K across. B, (N, R), always has R contiguous and holds the scale.
#pragma once
#ifdef FUSED_PEFT_EMULATE
#include "emulator.h"
#else
#include "ptx.cuh"
#endif
#include "schedule.cuh"

namespace fused_peft {

enum Form { LATE, MASKED, SCALED, INLINE };
enum Kind { NONE, FP32, BF16, FP16 };  // of a vector's elements

struct Vector {
  TensorMap map;
  int kind;
  FUSED_PEFT_HOST_DEVICE int bytes() const { return kind == NONE ? 0 : kind == FP32 ? 4 : 2; }  // of an element
};

struct Parameters {
  TensorMap x, w, s, b, y, z, a, d_in;
  Vector d_out, bias;
  const int32_t* seed;
  uint32_t* t;                // (M, R) 16-bit, R even
  uint32_t *counter, *flags;  // of tiles drawn; INLINE's, one a row of tiles. Zero before and after
  Schedule schedule;
  int M, N, K, R, threshold, d_in_kind;
  bool bias_inside, has_y, has_z, overlap;
};

// INNER: columns of A's tile, the most r that INLINE takes.
template <class T_, int BM_, int BN_, int ACROSS_, Form FORM_, int INNER_ = 0>
struct Plan {
  using T = T_;
  static constexpr int BM = BM_, BN = BN_, ACROSS = ACROSS_, INNER = INNER_;
  static constexpr Form FORM = FORM_;
  static constexpr int BLOCKS = BM / CONSUMERS / 64;  // of 64 rows, a warpgroup's
  static constexpr int X_BYTES = BM * ROW, W_BYTES = BN * ROW, A_BYTES = INNER * ROW;
  static constexpr int D_BYTES = FORM == SCALED ? DEPTH * 4 : 0;
  static constexpr int BIAS = BN * 4;  // where the bias lies in a stage, behind d_out
  static constexpr int TURNS = 8;  // tiles' numbers on their way from the one who draws them to those who need them
  static constexpr int LIMIT = 227 * 1024, STAGE_BYTES = X_BYTES + W_BYTES + A_BYTES + D_BYTES + 16;
  static constexpr int STAGES = 4 * (STAGE_BYTES + CONSUMERS * 16 * ROW) + ATOM <= LIMIT ? 4 : 3;
  // offsets in shared memory, tiles of 128-byte rows first
  static constexpr int W = STAGES * X_BYTES, A = W + STAGES * W_BYTES, PANELS = A + STAGES * A_BYTES;
  static constexpr int PANEL_BYTES = 16 * ROW;
  static constexpr int REST = STAGES * (D_BYTES + 16) + TURNS * 12 + ATOM;  // and what aligning the start may cost
  static constexpr int DEEP = PANELS + 2 * 4 * CONSUMERS * PANEL_BYTES + REST <= LIMIT ? 2 : 1;  // panels a warp
  static constexpr int D = PANELS + DEEP * 4 * CONSUMERS * PANEL_BYTES, FULL = D + STAGES * D_BYTES;
  static constexpr int EMPTY = FULL + STAGES * 8, TOLD = EMPTY + STAGES * 8, NUMBER = TOLD + TURNS * 8;
  static constexpr int BYTES = NUMBER + TURNS * 4 + ATOM;
  static_assert(BYTES <= LIMIT, "shared memory");
  static constexpr int AHEAD = FORM == MASKED ? 2 : 1;  // tiles drawn beyond the one that is loaded
  // A number is written over when every tile since has filled a stage, and all who read it have given back a stage since.
  static_assert(TURNS >= STAGES + AHEAD, "numbers of tiles");
  static_assert(FORM != INLINE || INNER, "INLINE needs the columns of A's tile");
};

#ifdef FUSED_PEFT_DEVICE  // what follows is not for the host

// A vector's entries, in shared memory, at eight pairs of columns, the first pair at ``at`` and the others 8 apart;
// ``otherwise`` where there is no vector. The kind is asked once, so that the loads follow each other.
FUSED_PEFT_DEVICE void entries(float (&to)[16], uint32_t v, int kind, int at, float otherwise) {
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    float2 pair = {otherwise, otherwise};
    if (kind == FP32) pair = ptx::read_shared<float2>(v + 4 * at + 32 * i / 2);
    else if (kind == BF16) pair = ptx::unpack<bf16>(ptx::read_shared<uint32_t>(v + 2 * at + 16 * i / 2));
    else if (kind == FP16) pair = ptx::unpack<fp16>(ptx::read_shared<uint32_t>(v + 2 * at + 16 * i / 2));
    to[i] = pair.x;
    to[i + 1] = pair.y;
  }
}

// The number of the tile at a turn, once it is told.
template <class P>
FUSED_PEFT_DEVICE int told(uint32_t memory, Slot& turn) {
  ptx::barrier_wait(memory + P::TOLD + 8 * turn.stage, turn.phase);
  int number = ptx::read_shared<int>(memory + P::NUMBER + 4 * turn.stage);
  turn.advance(P::TURNS);
  return number;
}

// The side that loads. One thread runs it; that of the cluster's first block also draws the tiles.
template <class P>
struct Producer {
  const Parameters& p;
  uint32_t memory;
  int rank, mine_m, mine_n;  // this block's place in its cluster
  Slot slot, turn;

  FUSED_PEFT_DEVICE Producer(const Parameters& p, uint32_t memory, int rank) : p(p), memory(memory), rank(rank) {
    mine_m = p.schedule.cluster_m > 1 ? rank : 0;
    mine_n = p.schedule.cluster_n > 1 ? rank : 0;
    for (const TensorMap* map : {&p.x, &p.w}) ptx::prefetch(map);
  }

  FUSED_PEFT_DEVICE void part(const TensorMap* map, uint32_t to, int column, int row, bool shared) {
    if (shared) ptx::load_multicast(map, to, memory + P::FULL + 8 * slot.stage, column, row, 3);
    else ptx::load(map, to, memory + P::FULL + 8 * slot.stage, column, row);
  }

  // Claim the next stage: every block that this one writes to has read it.
  FUSED_PEFT_DEVICE void claim(int bytes) {
    ptx::barrier_wait(memory + P::EMPTY + 8 * slot.stage, slot.phase ^ 1);
    ptx::barrier_expect(memory + P::FULL + 8 * slot.stage, bytes);
  }

  // A stage's 64 columns of K from ``column`` on: rows of x's kind; where a neighbour shares them, half.
  FUSED_PEFT_DEVICE void left_rows(const TensorMap* map, int column, const Tile& tile) {
    bool shared = p.schedule.cluster_n > 1;
    int mine = mine_n * P::BM / 2;
    part(map, memory + slot.stage * P::X_BYTES + mine * ROW, column, tile.m * P::BM + mine, shared);
  }
  FUSED_PEFT_DEVICE void right_rows(const TensorMap* map, int column, const Tile& tile) {
    bool shared = p.schedule.cluster_m > 1;
    int mine = mine_m * P::BN / 2;
    part(map, memory + P::W + slot.stage * P::W_BYTES + mine * ROW, column, tile.n * P::BN + mine, shared);
  }
  // W that lies with K across: blocks of 64 columns, of which neighbours halve the rows.
  FUSED_PEFT_DEVICE void right_across(int k, const Tile& tile) {
    bool shared = p.schedule.cluster_m > 1;
    int mine = mine_m * DEPTH / 2;
    uint32_t to = memory + P::W + slot.stage * P::W_BYTES + mine * ROW;
    for (int j = 0; j < P::BN / DEPTH; ++j)
      part(&p.w, to + j * DEPTH * ROW, tile.n * P::BN + j * DEPTH, k + mine, shared);
  }

  FUSED_PEFT_DEVICE void main_pair(const Tile& tile) {
    bool first = P::FORM == INLINE && tile.n == 0;
    for (int k = 0; k < p.K; k += DEPTH) {
      claim(P::X_BYTES + P::W_BYTES + (first ? P::A_BYTES : 0) + (P::FORM == SCALED ? d_bytes() : 0));
      left_rows(&p.x, k, tile);
      if (P::ACROSS) right_across(k, tile);
      else right_rows(&p.w, k, tile);
      if (first) part(&p.a, memory + P::A + slot.stage * P::A_BYTES, k, 0, false);
      if (P::FORM == SCALED) part(&p.d_in, memory + P::D + slot.stage * P::D_BYTES, k, 0, false);
      slot.advance(P::STAGES);
    }
  }

  FUSED_PEFT_DEVICE int d_bytes() const { return DEPTH * (p.d_in_kind == FP32 ? 4 : 2); }

  FUSED_PEFT_DEVICE void rank_pair(const Tile& tile) {
    if (!p.R) return;
    if (P::FORM == INLINE) wait_for_flag(tile.m);
    else if (p.overlap) ptx::wait_for_launch_before();
    for (int r = 0; r < p.R; r += DEPTH) {
      claim(P::X_BYTES + P::W_BYTES);
      left_rows(&p.s, r, tile);
      right_rows(&p.b, r, tile);
      slot.advance(P::STAGES);
    }
  }

  // T of the row of tiles is in memory. The last to see the flag lowers it, for the launch after this one.
  FUSED_PEFT_DEVICE void wait_for_flag(int row) {
    uint32_t* flag = p.flags + row;
    while (!ptx::peek(flag)) ptx::pause();
    if (ptx::add(flag, 1) == static_cast<uint32_t>(p.schedule.padded_n())) ptx::write(flag, 0u);
    ptx::fence_async();
  }

  // The entries of d_out and of the bias at the tile's columns, in the tile's last stage.
  FUSED_PEFT_DEVICE void vectors(const Tile& tile) {
    int bytes = P::BN * (p.d_out.bytes() + p.bias.bytes());
    if (!bytes) return;
    claim(bytes);
    uint32_t to = memory + slot.stage * P::X_BYTES;
    if (p.d_out.kind) part(&p.d_out.map, to, tile.n * P::BN, 0, false);
    if (p.bias.kind) part(&p.bias.map, to + P::BIAS, tile.n * P::BN, 0, false);
    slot.advance(P::STAGES);
  }

  FUSED_PEFT_DEVICE void tile(const Tile& tile) {
    if (P::FORM == MASKED) rank_pair(tile);
    main_pair(tile);
    if (P::FORM != MASKED) rank_pair(tile);
    vectors(tile);
  }

  // Tell all who work on the tile its number.
  FUSED_PEFT_DEVICE int tell(int number) {
    ptx::barrier_expect(memory + P::TOLD + 8 * turn.stage, 4);
    if (rank) return told<P>(memory, turn);
    for (int to = 0; to < p.schedule.size(); ++to)
      ptx::send(number, memory + P::NUMBER + 4 * turn.stage, memory + P::TOLD + 8 * turn.stage, to);
    turn.advance(P::TURNS);
    return number;
  }

  FUSED_PEFT_DEVICE int draw() { return rank ? 0 : ptx::take(p.counter); }

  // All tiles of this block. The next number is drawn before a tile's loads, and has come when they are started; each
  // cluster draws AHEAD past the end, and the last of them puts the counter back.
  FUSED_PEFT_DEVICE void tiles(int clusters) {
    int drawn = draw(), number;
    if constexpr (P::AHEAD == 1) {
      while ((number = tell(drawn)) < p.schedule.count()) {
        drawn = draw();
        tile(p.schedule.at(number, rank));
      }
    } else {
      number = tell(drawn);
      drawn = draw();
      while (number < p.schedule.count()) {
        int next = tell(drawn);
        drawn = draw();
        tile(p.schedule.at(number, rank));
        number = next;
      }
    }
    if (!rank && drawn == p.schedule.count() + P::AHEAD * clusters - 1) {
      ptx::write(p.counter, 0u);
      ptx::fence_device();  // a launch that begins before this one has ended draws from it
    }
  }
};

// A side that multiplies: a warpgroup.
template <class P>
struct Consumer {
  using T = typename P::T;
  static constexpr int N = P::BN, COUNT = N / 2;

  const Parameters& p;
  uint32_t memory;
  int group, thread;  // which warpgroup, and the thread in it
  Slot slot, turn;
  int panel = 0;
  float acc[P::BLOCKS][COUNT];
  Tile next;         // MASKED: the tile after this one,
  uint32_t keep[4];  // and which of its accumulators dropout keeps, two bits a pair
  int32_t seed[2];
  uint32_t left[2][P::BLOCKS][4];  // SCALED: x's step under way and the next; products read them until they are waited for

  FUSED_PEFT_DEVICE int lane() const { return thread % 32; }
  FUSED_PEFT_DEVICE uint32_t x_tile(int stage, int block) const {
    return memory + stage * P::X_BYTES + (group * P::BLOCKS + block) * 64 * ROW;
  }
  FUSED_PEFT_DEVICE void await() { ptx::barrier_wait(memory + P::FULL + 8 * slot.stage, slot.phase); }

  // Tell every block that writes here that this warp has read a stage.
  FUSED_PEFT_DEVICE void release(int stage) {
    if (lane() < p.schedule.size()) ptx::barrier_arrive(memory + P::EMPTY + 8 * stage, lane());
  }

  // The main pair's stages. ``first``: nothing is in the accumulators. The last stage's products are still under way at the
  // end; that stage is returned, for ``finish``.
  template <bool FIRST_COLUMN, Kind D_IN = NONE>
  FUSED_PEFT_DEVICE int main_pair(int first, float (&inner)[P::BLOCKS][P::INNER ? P::INNER / 2 : 1]) {
    int before = -1;
    for (int k = 0; k < p.K; k += DEPTH) {
      await();
      uint32_t w = memory + P::W + slot.stage * P::W_BYTES;
      if constexpr (P::FORM == SCALED) {
        scaled_stage<D_IN>(w, k, first, before);
      } else {
        ptx::products_begin();
#pragma unroll
        for (int step = 0; step < DEPTH / STEP; ++step) {
          uint64_t right = P::ACROSS ? columns_descriptor(w, step) : rows_descriptor(w, step);
#pragma unroll
          for (int block = 0; block < P::BLOCKS; ++block) {
            uint64_t left = rows_descriptor(x_tile(slot.stage, block), step);
            ptx::product<T, N, P::ACROSS>(acc[block], left, right, !first || k || step);
            if constexpr (FIRST_COLUMN) {
              uint64_t down = rows_descriptor(memory + P::A + slot.stage * P::A_BYTES, step);
              ptx::product<T, P::INNER, 0>(inner[block], left, down, k || step);
            }
          }
        }
        ptx::products_commit();
        if constexpr (P::FORM == MASKED)
          if (k < STEPS * DEPTH) choose(k / DEPTH);
        ptx::products_wait<1>();  // the stage before
        if (before >= 0) release(before);
      }
      before = slot.stage;
      slot.advance(P::STAGES);
    }
    return before;
  }

  FUSED_PEFT_DEVICE void finish(int stage) {
    ptx::products_wait<0>();
    if (stage >= 0) release(stage);
  }

  // One stage with x's tile scaled on its way through registers, a step at a time; one product is always under way.
  template <Kind D_IN>
  FUSED_PEFT_DEVICE void scaled_stage(uint32_t w, int k, int first, int before) {
    uint32_t d = memory + P::D + slot.stage * P::D_BYTES;
#pragma unroll
    for (int step = 0; step < DEPTH / STEP; ++step) {
      auto& now = left[step % 2];
#pragma unroll
      for (int block = 0; block < P::BLOCKS; ++block) {
        int row = thread / 32 * 16 + matrix_row(lane()), piece = 2 * step + matrix_piece(lane());
        ptx::load_matrices(now[block], x_tile(slot.stage, block) + swizzled(row, piece));
#pragma unroll
        for (int i = 0; i < 4; ++i) now[block][i] = scaled<D_IN>(now[block][i], d, step * STEP + i / 2 * 8 + thread % 4 * 2);
      }
      ptx::products_begin();
#pragma unroll
      for (int block = 0; block < P::BLOCKS; ++block) {
        uint64_t right = P::ACROSS ? columns_descriptor(w, step) : rows_descriptor(w, step);
        ptx::product<T, N, P::ACROSS>(acc[block], now[block], right, !first || k || step);
      }
      ptx::products_commit();
      ptx::products_wait<1>();  // the step before: its registers, and after the first the stage before, are free
      if (step == 0 && before >= 0) release(before);
    }
  }

  template <Kind D_IN>
  FUSED_PEFT_DEVICE uint32_t scaled(uint32_t both, uint32_t d, int column) const {
    float2 v = ptx::unpack<T>(both), by;
    if constexpr (D_IN == FP32) by = ptx::read_shared<float2>(d + 4 * column);
    else if constexpr (D_IN == BF16) by = ptx::unpack<bf16>(ptx::read_shared<uint32_t>(d + 2 * column));
    else by = ptx::unpack<fp16>(ptx::read_shared<uint32_t>(d + 2 * column));
    return ptx::pack<T>(v.x * by.x, v.y * by.y);
  }

  // The low-rank pair's stages, on top of products still under way on the stage ``before``; none are at the end.
  FUSED_PEFT_DEVICE void rank_pair(int first, int before) {
    for (int i = 0; i * DEPTH < p.R; ++i) {
      await();
      uint32_t b = memory + P::W + slot.stage * P::W_BYTES;
      for (int step = 0; step < rank_steps(p.R, i); ++step) {
        ptx::products_begin();
#pragma unroll
        for (int block = 0; block < P::BLOCKS; ++block) {
          uint64_t left = rows_descriptor(x_tile(slot.stage, block), step);
          ptx::product<T, N, 0>(acc[block], left, rows_descriptor(b, step), !first || i || step);
        }
        ptx::products_commit();
      }
      finish(before);
      before = slot.stage;
      slot.advance(P::STAGES);
    }
    finish(before);
  }

  // Global row and column of an accumulator.
  FUSED_PEFT_DEVICE int row(const Tile& tile, int block, int i) const {
    return tile.m * P::BM + (group * P::BLOCKS + block) * 64 + accumulator_row(thread, i);
  }
  FUSED_PEFT_DEVICE int column(const Tile& tile, int i) const { return tile.n * N + accumulator_column(thread, i); }

  // Dropout's hashes cost more than the pair that they mask, so those of the next tile are made a few a stage, while
  // products run. N is even, and two neighbours share a hash: the pair 4 step + w is in the word w.
  static constexpr int PAIRS = COUNT / 2, STEPS = P::BLOCKS * PAIRS / 4;
  FUSED_PEFT_DEVICE void choose(int step) {
    int block = 4 * step / PAIRS, first = 4 * step % PAIRS;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t m = row(next, block, 2 * w), n = column(next, 2 * first) + w / 2 * 8;
      uint32_t bits = hash(seed, (m * p.N + n) >> 1);
      keep[w] |= (kept(bits, 0, p.threshold) | kept(bits, 1, p.threshold) << 1) << 2 * step;
    }
  }

  // What the accumulators hold, less what is dropped.
  FUSED_PEFT_DEVICE void mask() {
#pragma unroll
    for (int block = 0; block < P::BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        int pair = block * PAIRS + i / 2;
        if (!(keep[pair % 4] >> (pair / 4 * 2 + i % 2) & 1)) acc[block][i] = 0;
      }
    for (uint32_t& word : keep) word = 0;
  }

  // T to memory, for the low-rank pair of this row of tiles and for backward; then the flag.
  FUSED_PEFT_DEVICE void publish(const Tile& tile, float (&inner)[P::BLOCKS][P::INNER ? P::INNER / 2 : 1]) {
#pragma unroll
    for (int block = 0; block < P::BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < P::INNER / 2; i += 2) {
        int m = row(tile, block, i), r = accumulator_column(thread, i);
        if (m < p.M && r < p.R)
          ptx::write(p.t + (static_cast<int64_t>(m) * p.R + r) / 2, ptx::pack<T>(inner[block][i], inner[block][i + 1]));
      }
    ptx::fence_async();
    ptx::sync_named<128 * CONSUMERS>(1);
    if (group == 0 && thread == 0) ptx::add(p.flags + tile.m, 1);
  }

  // 16 rows x 64 columns of 16-bit values, one warp's, to memory through its next panel; value(i): the i-th of a lane.
  template <class F>
  FUSED_PEFT_DEVICE void put(const TensorMap* map, int first_row, int first_column, F value) {
    uint32_t to = memory + P::PANELS + ((group * 4 + thread / 32) * P::DEEP + panel) * P::PANEL_BYTES;
    panel = (panel + 1) % P::DEEP;
    ptx::store_wait_read<P::DEEP - 1>();
    ptx::sync_warp();
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
      uint32_t four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = ptx::pack<T>(value(i + 2 * j), value(i + 2 * j + 1));
      ptx::store_matrices(to + swizzled(matrix_row(lane()), i / 4 + matrix_piece(lane())), four);
    }
    ptx::fence_async_shared();
    ptx::sync_warp();
    if (lane() == 0) {
      if (first_row < p.M && first_column < p.N) ptx::store(map, to, first_column, first_row);
      ptx::store_commit();
    }
  }

  FUSED_PEFT_DEVICE void epilogue(const Tile& tile) {
    int top = tile.m * P::BM + group * P::BLOCKS * 64 + thread / 32 * 16;
    bool vectors = p.d_out.kind || p.bias.kind;
    uint32_t v = memory + slot.stage * P::X_BYTES;
    if (vectors) await();
#pragma unroll
    for (int from = 0; from < COUNT; from += 32) {
      int left = tile.n * N + from * 2;
      float by[16], plus[16];  // of this panel's columns: each is in two accumulators of a block
      entries(by, v, p.d_out.kind, accumulator_column(thread, from), 1.f);
      entries(plus, v + P::BIAS, p.bias.kind, accumulator_column(thread, from), 0.f);
      if (vectors && from + 32 == COUNT) {
        ptx::sync_warp();
        release(slot.stage);
        slot.advance(P::STAGES);
      }
#pragma unroll
      for (int block = 0; block < P::BLOCKS; ++block) {
        auto z = [&](int i) { return acc[block][from + i] + (p.bias_inside ? plus[i / 4 * 2 + i % 2] : 0.f); };
        auto y = [&](int i) { return z(i) * by[i / 4 * 2 + i % 2] + (p.bias_inside ? 0.f : plus[i / 4 * 2 + i % 2]); };
        if (p.has_z) put(&p.z, top + block * 64, left, z);
        if (p.has_y) put(&p.y, top + block * 64, left, y);
      }
    }
  }

  FUSED_PEFT_DEVICE void tile(const Tile& tile) {
    float inner[P::BLOCKS][P::INNER ? P::INNER / 2 : 1];
    if constexpr (P::FORM == MASKED) {
      rank_pair(true, -1);
      mask();
      finish(main_pair<false>(false, inner));
      for (int step = ceil_div(p.K, DEPTH); step < STEPS; ++step) choose(step);
    } else if constexpr (P::FORM == INLINE) {
      if (tile.n == 0) {
        finish(main_pair<true>(true, inner));
        publish(tile, inner);
        rank_pair(false, -1);
      } else {
        rank_pair(false, main_pair<false>(true, inner));
      }
    } else if constexpr (P::FORM == SCALED) {
      int before;
      if (p.d_in_kind == FP32) before = main_pair<false, FP32>(true, inner);
      else if (p.d_in_kind == BF16) before = main_pair<false, BF16>(true, inner);
      else before = main_pair<false, FP16>(true, inner);
      rank_pair(false, before);
    } else {
      rank_pair(false, main_pair<false>(true, inner));
    }
    epilogue(tile);
  }

  // The tile of a number; past the last one any, whose mask nobody asks for.
  FUSED_PEFT_DEVICE Tile after(int number, int rank) const {
    return p.schedule.at(number < p.schedule.count() ? number : 0, rank);
  }

  FUSED_PEFT_DEVICE void tiles(int rank) {
    int number = ptx::uniform(told<P>(memory, turn));
    if constexpr (P::FORM == MASKED) {
      seed[0] = ptx::read(p.seed), seed[1] = ptx::read(p.seed + 1);
      for (uint32_t& word : keep) word = 0;
      next = after(number, rank);
      for (int step = 0; step < STEPS; ++step) choose(step);
    }
    while (number < p.schedule.count()) {
      if constexpr (P::FORM == MASKED) {
        Tile now = next;
        number = ptx::uniform(told<P>(memory, turn));
        next = after(number, rank);
        tile(now);
      } else {
        tile(p.schedule.at(number, rank));
        number = ptx::uniform(told<P>(memory, turn));
      }
    }
    ptx::store_wait_read<0>();
  }
};

template <class P>
FUSED_PEFT_DEVICE void run(const Parameters& p) {
  uint32_t memory = (ptx::shared_memory() + ATOM - 1) / ATOM * ATOM;
  int warp = ptx::uniform(ptx::thread() / 32), rank = p.schedule.size() > 1 ? ptx::cluster_rank() : 0;
  if (ptx::thread() == 0) {
    for (int i = 0; i < P::STAGES; ++i) {
      ptx::barrier_init(memory + P::FULL + 8 * i, 1);
      ptx::barrier_init(memory + P::EMPTY + 8 * i, 4 * CONSUMERS * p.schedule.size());
    }
    for (int i = 0; i < P::TURNS; ++i) ptx::barrier_init(memory + P::TOLD + 8 * i, 1);
    ptx::fence_barriers();
  }
  if (p.schedule.size() > 1) ptx::sync_cluster();
  else ptx::sync_block();

  int size = p.schedule.size();
  if (warp < 4) {
    ptx::give_registers<40>();
    if (ptx::thread() == 0) {
      Producer<P> producer(p, memory, rank);
      producer.tiles(ptx::blocks() / size);
    }
    ptx::sync_warp();
  } else {
    ptx::take_registers<232>();
    Consumer<P> consumer{p, memory, warp / 4 - 1, ptx::thread() % 128};
    consumer.tiles(rank);
  }
  if (size > 1) ptx::sync_cluster();  // a neighbour may still write or arrive here
}

#endif

}  // namespace fused_peft

// One compiled plan: what fused_peft/backends/plans.py puts into a source file of its own.
#ifdef __CUDACC__
#define FUSED_PEFT_KERNEL(NAME, ...)                                                                              \
  extern "C" __global__ void __launch_bounds__(fused_peft::THREADS, 1)                                            \
      fused_peft_##NAME(const __grid_constant__ fused_peft::Parameters p) {                                       \
    using namespace fused_peft;                                                                                   \
    run<Plan<__VA_ARGS__>>(p);                                                                                    \
  }
#endif
