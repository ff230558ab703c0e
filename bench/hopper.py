"""What a low-rank update costs csrc/'s GEMM by the order of its tiles, simulated for an H100. Nothing is measured.

    python bench/hopper.py [--out bench/results/hopper_predicted.csv]

LoRA's forward over the plain GEMM, T made inside (INLINE) or by ``down`` before it (LATE). Clusters take tiles in the
order of csrc/schedule.cuh, which is compiled here, each the next one when it begins the one before. A tile takes its
products at the tensor cores' rate, then its low-rank steps, then what is left of the epilogue. With INLINE a tile of
the first column also multiplies x by A, and low-rank steps begin only when T of their rows is there.

inline        x A^T bound by shared memory (``rates.narrow``), which the one measurement of INLINE there is agrees with
inline_fast   at the tensor cores' full rate: the first column's products take (BN + inner) / BN of the others'
inline_banded as inline, with the first column of a band of rows first in the band, and not before all others
late          the GEMM begins when ``down`` has ended: its registers and shared memory leave it no room beside
gbytes_*      of x and W read from memory with a cache of L2 bytes, tiles in bands, or the first column first

``rates`` has the cycles that the choice rests on; none is fitted to INLINE.
"""

from __future__ import annotations

import ctypes
import heapq
import subprocess
import tempfile
from collections import OrderedDict
from functools import cache
from itertools import product
from pathlib import Path

import tables

import fused_peft as fp
from fused_peft.backends import cuda, rates
from fused_peft.backends.kernel_modules import configs

ROWS, COLUMNS, K, RANKS = (1024, 2048, 3072, 4096, 6144, 8192), (1024, 2048, 4096, 8192, 14336), 4096, (16, 32, 64)
Tiles = list[tuple[int, int]]
PROCESSORS, DEPTH, STEP = 132, 64, 16
EPILOGUE = (
    2700  # of 128 x 256, what the next tile's products do not hide: twice what skewing two warpgroups was to save
)
RANK = 350  # beside its products: the update measured 0.9 % of a tile of 4096 deep, its products are 0.4 %
L2 = 25e6  # of 50 MB: each half keeps a copy of its own
SOURCE = """
#include "schedule.cuh"
extern "C" void order(const fused_peft::Schedule* s, int* at) {
  for (int i = 0; i < s->count(); ++i) {
    fused_peft::Tile tile = s->at(i, 0);
    at[2 * i] = tile.m / s->cluster_m, at[2 * i + 1] = tile.n / s->cluster_n;
  }
}
"""


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "order.cpp"), Path(folder, "order.so")
        source.write_text(SOURCE)
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{fp.source_dir('csrc')}", source, "-o", built]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(built))


def order(M: int, N: int, c: configs.Config, column_first: bool) -> Tiles:
    """Row and column of the clusters' tiles, in turn."""
    cluster = (c.cluster, 1) if c.BN >= c.BM else (1, c.cluster)
    tiles = configs.tiles(M, c.BM), configs.tiles(N, c.BN)
    count = configs.tiles(tiles[0], cluster[0]) * configs.tiles(tiles[1], cluster[1])
    schedule, at = (ctypes.c_int * 6)(*tiles, *cluster, c.group, column_first), (ctypes.c_int * (2 * count))()
    library().order(schedule, at)
    return list(zip(at[::2], at[1::2], strict=True))


def simulate(tiles: Tiles, clusters: int, main: float, after: float, first: float | None = None) -> float:
    """Cycles until all tiles are done. main, after: of a tile's products, and of what follows them; first: from there
    until T of a tile of the first column is there for its row; None: it was there before."""
    drawn = min(clusters, len(tiles))
    begun, there, waiting, end = [(0.0, i) for i in range(drawn)], {}, {}, 0.0
    while begun:
        start, i = heapq.heappop(begun)
        row, column = tiles[i]
        following, drawn = drawn, drawn + 1
        if first is not None and column == 0:
            there[row] = start + main + first
        waiting.setdefault(row, []).append((start + main, following))
        if first is not None and row not in there:
            continue
        for ready, turn in waiting.pop(row):
            done = max(ready, there.get(row, 0.0)) + after
            end = max(end, done)
            if turn < len(tiles):
                heapq.heappush(begun, (done, turn))
    return end


def traffic(tiles: Tiles, clusters: int, row_bytes: int, column_bytes: int) -> float:
    """Bytes of rows of x and columns of W read from memory: those of a wave once, unless the waves before left them."""
    kept, read = OrderedDict(), 0
    for at in range(0, len(tiles), clusters):
        wave = tiles[at : at + clusters]
        needed = {("x", row): row_bytes for row, _ in wave} | {("w", column): column_bytes for _, column in wave}
        read += sum(size for panel, size in needed.items() if panel not in kept)
        for panel, size in needed.items():
            kept[panel] = size
            kept.move_to_end(panel)
        while sum(kept.values()) > L2:
            kept.popitem(last=False)
    return read


def predicted(M: int, N: int, K: int, r: int) -> dict[str, float | str]:
    """Seconds of the plain GEMM, and as multiples of it the forms; gbytes by the order of tiles."""
    c, inner = cuda.config_of_gemm((9, 0), 16, M, N, K, r), configs.rank_tile(r)
    if c.BM == 256 and inner > 16:  # a second accumulator as wide is not compiled
        c = configs.Config(128, 256, c.BK, c.warps, c.stages, c.group, cluster=c.cluster)
    clusters, depth = PROCESSORS // c.cluster, configs.tiles(K, DEPTH) * DEPTH // STEP
    step = c.BM // 64 * c.BN / 2
    main, tail = depth * step, EPILOGUE * c.BM * c.BN / (128 * 256)
    after = tail + RANK + configs.tiles(r, STEP) * step
    banded, first = order(M, N, c, False), order(M, N, c, True)
    takes = lambda narrow: depth * c.BM // 64 * narrow + rates.HANDOVER  # noqa: E731
    plain = simulate(banded, clusters, main, tail)
    times = {
        "inline": simulate(first, clusters, main, after, takes(rates.narrow(inner))),
        "inline_fast": simulate(first, clusters, main, after, takes(inner / 2)),
        "inline_banded": simulate(banded, clusters, main, after, takes(rates.narrow(inner))),
        "late": simulate(banded, clusters, main, after) + rates.down(M, K) / rates.CYCLE,
    }
    panels = 2 * K * c.BM * (c.cluster if c.BN >= c.BM else 1), 2 * K * c.BN * (c.cluster if c.BN < c.BM else 1)
    read = {"gbytes_banded": traffic(banded, clusters, *panels), "gbytes_first": traffic(first, clusters, *panels)}
    chosen = "INLINE" if rates.inlines(M, K, r, c.BM) else "LATE"
    return {
        "tile": f"{c.BM}x{c.BN}", "cluster": c.cluster, "plain_us": f"{1e6 * plain * rates.CYCLE:.1f}",
        **{name: f"{cycles / plain:.3f}" for name, cycles in times.items()}, "choice": chosen,
        **{name: f"{moved / 1e9:.3f}" for name, moved in read.items()},
    }  # fmt: skip


def rows() -> list[dict[str, str | int]]:
    shapes = product(ROWS, COLUMNS, RANKS)
    return [{"M": M, "N": N, "K": K, "r": r, "basis": "predicted, H100", **predicted(M, N, K, r)} for M, N, r in shapes]


if __name__ == "__main__":
    tables.command(__doc__, rows)
