// Index arithmetic of the GEMM, host and device: order of tiles, pipeline stages and phases, edges, layouts in registers
// and shared memory. Plain integers in and out, so that unit tests run it on the CPU.
#pragma once
#include "dropout.cuh"

namespace fused_peft {

constexpr int DEPTH = 64;           // columns of K a stage holds: one 128-byte row of 16-bit elements
constexpr int ROW = 2 * DEPTH;      // bytes of that row, the span of the 128-byte swizzle
constexpr int ATOM = 8 * ROW;       // bytes after which the swizzle repeats
constexpr int STEP = 16;            // columns of K one wgmma takes
constexpr int CONSUMERS = 2;        // warpgroups that multiply
constexpr int THREADS = 128 * (CONSUMERS + 1);

FUSED_PEFT_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A slot of the ring of stages and the parity of the barriers' phase there.
struct Slot {
  int stage = 0;
  uint32_t phase = 0;
  FUSED_PEFT_HOST_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Tile {
  int m, n;
};

// Which tile a block computes at its i-th turn. Clusters take neighbouring tiles: along M they share W's tile, along N
// x's. Tiles of clusters are visited in bands of ``group`` rows, columns slowly, so that a wave reuses both operands in
// L2; with ``column_first`` the first column of all bands comes before the rest, so that what others wait for is begun
// before any of them. The last cluster of a row or column may reach past the edge.
struct Schedule {
  int tiles_m, tiles_n, cluster_m, cluster_n, group;
  bool column_first = false;

  FUSED_PEFT_HOST_DEVICE int rows() const { return ceil_div(tiles_m, cluster_m); }
  FUSED_PEFT_HOST_DEVICE int columns() const { return ceil_div(tiles_n, cluster_n); }
  FUSED_PEFT_HOST_DEVICE int size() const { return cluster_m * cluster_n; }
  FUSED_PEFT_HOST_DEVICE int count() const { return rows() * columns(); }
  FUSED_PEFT_HOST_DEVICE int padded_m() const { return rows() * cluster_m; }
  FUSED_PEFT_HOST_DEVICE int padded_n() const { return columns() * cluster_n; }

  // Blocks to launch on so many processors: whole clusters, none of them idle.
  FUSED_PEFT_HOST_DEVICE int blocks(int processors) const {
    int clusters = processors / size() < count() ? processors / size() : count();
    return (clusters ? clusters : 1) * size();
  }

  // The tile of the block with that rank in its cluster, at a place in the clusters' order.
  FUSED_PEFT_HOST_DEVICE Tile at(int index, int rank) const {
    int from = column_first ? 1 : 0, wide = columns() - from;  // the columns in bands
    int row = index, column = 0;
    if (index >= from * rows()) {
      index -= from * rows();
      int band = index / (group * wide), first = band * group;
      int height = rows() - first < group ? rows() - first : group;
      int inside = index - first * wide;
      row = first + inside % height, column = from + inside / height;
    }
    return {row * cluster_m + rank % cluster_m, column * cluster_n + rank / cluster_m};
  }
};

// Where a 16-byte piece lies in a tile of 128-byte rows that the 128-byte swizzle wrote; the tile starts at an ATOM.
FUSED_PEFT_HOST_DEVICE int swizzled(int row, int piece) { return row * ROW + ((piece ^ (row & 7)) << 4); }

// Row and column, in a warpgroup's 64 x N block, of a thread's i-th accumulator.
FUSED_PEFT_HOST_DEVICE int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8;
}
FUSED_PEFT_HOST_DEVICE int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// What ldmatrix and stmatrix x4 want of a lane for four 8 x 8 blocks: (rows 0-7, piece), (rows 8-15, piece), then the
// same two of the next piece. With them a lane's registers are accumulators 4i to 4i + 7, packed, and wgmma's A operand.
FUSED_PEFT_HOST_DEVICE int matrix_row(int lane) { return lane % 16; }
FUSED_PEFT_HOST_DEVICE int matrix_piece(int lane) { return lane / 16; }

// wgmma's descriptor of an operand with the 128-byte swizzle; offsets in bytes.
FUSED_PEFT_HOST_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// K contiguous: groups of 8 rows follow each other. A step along K moves the address inside the swizzle's span.
FUSED_PEFT_HOST_DEVICE uint64_t rows_descriptor(uint32_t address, int step) {
  return descriptor(address + step * 2 * STEP, 16, ATOM);
}

// K across: blocks of 64 columns, each DEPTH rows; a step along K is 16 rows on.
FUSED_PEFT_HOST_DEVICE uint64_t columns_descriptor(uint32_t address, int step) {
  return descriptor(address + step * STEP * ROW, DEPTH * ROW, ATOM);
}

// wgmma steps of the low-rank pair's i-th stage: what lies past R is not multiplied.
FUSED_PEFT_HOST_DEVICE int rank_steps(int R, int i) {
  int left = R - i * DEPTH;
  return ceil_div(left < DEPTH ? left : DEPTH, STEP);
}

}  // namespace fused_peft
