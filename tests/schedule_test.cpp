// Exhaustive checks of csrc/schedule.cuh on the CPU, run by test_cuda.py. Prints what is wrong; exit status 1 if anything.
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

#include "schedule.cuh"

using namespace fused_peft;

static int wrong = 0;
static void check(bool holds, int line, const char* what) {
  if (!holds && wrong++ < 20) std::printf("line %d: %s\n", line, what);
}
#define CHECK(...) check((__VA_ARGS__), __LINE__, #__VA_ARGS__)

// Every tile once, in bands, whole clusters, nothing idle. INLINE: a tile's first column is drawn before the tile, in the
// order itself and so by however many clusters that each take the next one.
static void order_of_tiles(bool column_first) {
  const int clusters[][2] = {{1, 1}, {2, 1}, {1, 2}};
  for (auto& c : clusters)
    for (int tiles_m = 1; tiles_m <= 9; ++tiles_m)
      for (int tiles_n = 1; tiles_n <= 9; ++tiles_n)
        for (int group = 1; group <= 5; ++group) {
          Schedule s{tiles_m, tiles_n, c[0], c[1], group, column_first};
          std::vector<int> seen(s.padded_m() * s.padded_n());
          std::vector<int> first_seen(s.padded_m(), -1);
          int band_before = -1, column_before = 0;
          for (int i = 0; i < s.count(); ++i)
            for (int rank = 0; rank < s.size(); ++rank) {
              Tile t = s.at(i, rank);
              CHECK(t.m >= 0 && t.m < s.padded_m() && t.n >= 0 && t.n < s.padded_n());
              ++seen[t.m * s.padded_n() + t.n];
              // neighbours in a cluster share what they multicast
              Tile head = s.at(i, 0);
              if (c[0] == 2) CHECK(t.n == head.n && t.m == head.m + rank);
              if (c[1] == 2) CHECK(t.m == head.m && t.n == head.n + rank);
              int row = t.m / c[0], column = t.n / c[1], band = row / group;
              if (t.n == 0) first_seen[t.m] = i;
              CHECK(first_seen[t.m] >= 0 && first_seen[t.m] + (column > 0) <= i);
              if (column_first && i < s.rows()) {
                CHECK(column == 0 && row == i);
                continue;
              }
              // a band is finished before the next begins, and in it a column before the next
              CHECK(band > band_before || (band == band_before && column >= column_before));
              CHECK(!column_first || column > 0);
              band_before = band;
              column_before = column;
            }
          for (int n : seen) CHECK(n == 1);
          CHECK(s.padded_m() >= tiles_m && s.padded_m() < tiles_m + c[0]);
          CHECK(s.padded_n() >= tiles_n && s.padded_n() < tiles_n + c[1]);
          for (int processors = s.size(); processors <= 12; ++processors) {
            int blocks = s.blocks(processors);
            CHECK(blocks % s.size() == 0 && blocks >= s.size() && blocks <= processors);
            CHECK(blocks / s.size() <= s.count());
            CHECK(blocks + s.size() > processors || blocks / s.size() == s.count());  // as many as there is work for
            // the persistent loop, as the kernel writes it, visits all
            std::set<int> visited;
            for (int block = 0; block < blocks; ++block)
              for (int i = block / s.size(); i < s.count(); i += blocks / s.size()) visited.insert(i);
            CHECK(static_cast<int>(visited.size()) == s.count());
          }
        }
}

// Producer and consumers walk the ring in step: the n-th use of a stage has parity n % 2.
static void ring() {
  for (int stages = 1; stages <= 5; ++stages) {
    Slot slot;
    for (int i = 0; i < 40; ++i) {
      CHECK(slot.stage == i % stages && slot.phase == static_cast<uint32_t>(i / stages % 2));
      slot.advance(stages);
    }
  }
}

// 128-byte rows: 16-byte pieces stay in their row, and eight rows of a column lie in eight different banks' groups.
static void swizzle() {
  for (int row = 0; row < 64; ++row) {
    std::set<int> pieces;
    for (int piece = 0; piece < 8; ++piece) {
      int at = swizzled(row, piece), linear = row * 128 + piece * 16;
      CHECK(at / 128 == row && at % 16 == 0);
      CHECK(at == (linear ^ (linear >> 3 & 0x70)));  // bits 4-6 by bits 7-9
      pieces.insert(at);
    }
    CHECK(pieces.size() == 8);
  }
  for (int piece = 0; piece < 8; ++piece) {
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(swizzled(row, piece) % 128);
    CHECK(banks.size() == 8);
  }
}

// Accumulators cover the 64 x N block once; ldmatrix and stmatrix address what they hold.
static void registers() {
  for (int N : {16, 64, 128, 192, 256}) {
    std::set<std::pair<int, int>> seen;
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < N / 2; ++i) {
        int row = accumulator_row(thread, i), column = accumulator_column(thread, i);
        CHECK(row >= 0 && row < 64 && column >= 0 && column < N);
        seen.insert({row, column});
      }
    CHECK(static_cast<int>(seen.size()) == 64 * N);
  }
  // Lane 8j + k addresses row k of matrix j, whose element (lane / 4, 2 (lane % 4)) a lane's register j holds.
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j) {
      int source = 8 * j + lane / 4;
      CHECK(matrix_row(source) == accumulator_row(lane, 2 * j));
      CHECK(8 * matrix_piece(source) + lane % 4 * 2 == accumulator_column(lane, 2 * j));
    }
}

// Fields of the descriptor (start, leading and stride offsets in 16 bytes, 128-byte swizzle), and steps along K.
static void descriptors() {
  auto field = [](uint64_t d, int from, int bits) { return d >> from & ((uint64_t{1} << bits) - 1); };
  for (uint32_t address = 0; address < 232448; address += 1024)
    for (int step = 0; step < DEPTH / STEP; ++step) {
      uint64_t rows = rows_descriptor(address, step), across = columns_descriptor(address, step);
      CHECK(field(rows, 0, 14) * 16 == address + step * 32);
      CHECK(field(across, 0, 14) * 16 == address + step * 16 * 128);
      CHECK(field(rows, 32, 14) * 16 == 8 * 128 && field(across, 32, 14) * 16 == 8 * 128);  // to the next 8 rows
      CHECK(field(rows, 16, 14) == 1 && field(across, 16, 14) * 16 == 64 * 128);            // to the next 64 columns
      for (uint64_t d : {rows, across}) CHECK(field(d, 62, 2) == 1 && field(d, 49, 3) == 0);
    }
}

// The low-rank pair multiplies all of R and less than a step more.
static void rank() {
  for (int R = 1; R <= 512; ++R) {
    int columns = 0, stages = 0;
    for (; stages * DEPTH < R; ++stages) {
      int steps = rank_steps(R, stages);
      CHECK(steps >= 1 && steps <= DEPTH / STEP);
      columns += steps * STEP;
      if ((stages + 1) * DEPTH < R) CHECK(steps == DEPTH / STEP);
    }
    CHECK(columns >= R && columns < R + STEP);
  }
}

int main() {
  for (bool column_first : {false, true}) order_of_tiles(column_first);
  ring();
  swizzle();
  registers();
  descriptors();
  rank();
  if (wrong) std::printf("%d wrong\n", wrong);
  return wrong > 0;
}
