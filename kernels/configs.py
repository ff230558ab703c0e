"""Which tile sizes a kernel runs with: a committed table of measured choices, and a closed form for everything else.

Nothing is tuned while a model runs. ``tuned.json`` holds {key(...): [fields of Config]}; it is written
by ``bench/tune.py`` on the GPU it names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
INLINE_ROWS = 64  # up to here one launch, S made inside the GEMM, beats two
MEASURED = Path(__file__).with_name("measured.json")  # where eager was measured faster; see backends/triton.py
KINDS = ("down", "gemm_lowrank", "gemm_lowrank_tma", "outer", "back", "row_norm", "hadamard", "form", "hadamard_grads")


@dataclass(frozen=True)
class Config:
    """Tile rows, columns and depth; warps a program; pipeline stages; row tiles a band (L2 reuse).

    late: the TMA kernel adds the low-rank phase after the K loop instead of before. flatten: its tile loop and K loop
    are one loop to the pipeliner. cluster: blocks of the CUDA kernel that share the wider operand's tile.
    """

    BM: int
    BN: int
    BK: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    late: bool = False
    flatten: bool = False
    cluster: int = 1


CUDA_TILES = ((128, 256), (256, 128), (128, 192))  # that csrc/ is compiled for
UNALIGNED = Config(64, 64, 32, 4, 2)  # rows that vector loads and asynchronous copies cannot take


def shared_kib(arch: tuple[int, int]) -> int:
    """Shared memory a program may take, KiB; the smallest known for an architecture not listed."""
    return SHARED.get(arch, 99)


def bucket(M: int) -> int:
    """The power of two at or above M, at least 16, at most 16384."""
    return min(max(16, 1 << (M - 1).bit_length() if M > 1 else 16), 16384)


def tiles(n: int, size: int) -> int:
    """How many tiles of a size cover n; triton.cdiv costs the host four times as much."""
    return -(-n // size)


def rank_tile(r: int, most: int = 128) -> int:
    """Columns of a rank tile: a power of two, at least 16 (tensor cores' least)."""
    return min(max(16, 1 << (r - 1).bit_length()), most)


@cache
def table() -> dict[str, Config]:
    """The committed table."""
    file = Path(__file__).with_name("tuned.json")
    stored = json.loads(file.read_text()) if file.exists() else {}
    return {key: Config(*values) for key, values in stored.items()}


def tuned() -> list[str]:
    """The keys of the committed table."""
    return list(table())


def key(kind: str, arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> str:
    """The table's key: columns and depth exact, rows and rank by the power of two at or above them."""
    return f"{kind} sm_{arch[0]}{arch[1]} {bits} {bucket(M)} {N} {K} {rank_tile(r, 512) if r else 0}"


@cache
def choose(kind: str, arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int = 16) -> Config:
    """The measured config of the shape's bucket, else the closed form; bits: of an element of x."""
    return table().get(key(kind, arch, bits, M, N, K, r)) or default(kind, arch, bits, M, N, K, r)


def default(kind: str, arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> Config:
    """The closed form."""
    wide = bits > 16  # fp32 runs without wgmma, or through tf32
    if kind == "row_norm":
        return Config(16, 0, 32 if wide else 64 if r > 64 else 128, 4, 2 if wide or r > 64 else 3)
    if kind == "down":
        depth = 32 if wide and r > 64 else 64 if wide or r > 32 else 128
        few = M < 4096 or (wide and r > 64)  # short tiles, so that there are programs enough for the memory
        tall = 16 if few else 32 if wide or r > 32 or M < 8192 else 64
        return Config(tall, 0, depth, 8 if wide and r > 64 else 4, 2 if wide or r > 64 else 3)
    if kind == "back":
        return Config(128, 128 if arch >= (9, 0) and not wide else 64, 0, 8, 3)
    if kind == "outer":
        if arch < (9, 0) and not wide:
            return Config(64, 64, 0, 8, 3)
        return Config(32 if wide or r > 32 else 64, 64, 0, 4, 2 if wide or r > 64 else 3)
    if kind == "hadamard_grads":
        if wide or arch < (9, 0):
            return Config(64, 64, 32 if wide else 64, 8, 2)  # BM: rows summed over
        return Config(64, 128, 128, 8, 3)
    if kind == "hadamard":
        return Config(min(bucket(M), 64), 64, 32, 4, 2)
    if kind == "form":
        return Config(0, 32 if wide else 64, 64, 4, 1)
    if kind == "gemm_cuda":
        waves = lambda tile: tiles(tiles(M, tile[0]) * tiles(N, tile[1]), 132) * tile[0] * tile[1]  # noqa: E731
        BM, BN = min(CUDA_TILES, key=waves)
        paired = tiles(M, BM) if BN >= BM else tiles(N, BN)  # an odd one out is computed for nothing
        whole = tiles(M, BM) * tiles(N, BN) >= 132 and (paired % 2 == 0 or paired >= 16)
        return Config(BM, BN, 64, 12, 4, cluster=2 if whole else 1)
    if kind == "gemm_lowrank_tma":
        if M > 64 and N >= 256 and r <= 16 and tiles(M, 128) * tiles(N, 256) >= 132:
            return Config(128, 256, 64, 8, 3, late=True, flatten=True)
        return Config(128 if M > 64 else 64, 128, 64, 8 if M > 64 else 4, 4, late=True, flatten=True)
    if wide:
        return UNALIGNED
    tall = bucket(M) if M <= 64 else 64 if tiles(M, 128) * tiles(N, 128) < 64 else 128
    depth = 64 if tall < 128 else 32
    return _fitting(Config(tall, 128 if tall >= 64 else 64, depth, 8 if tall >= 64 else 4, 4), arch, bits)


def narrow(config: Config, most: int) -> Config:
    """The config for a tile that makes two results: at most 128 columns, ``most`` from 64 rows on."""
    return replace(config, BN=min(config.BN, most if config.BM >= 64 else 128))


def one_read(M: int, N: int, r: int, processors: int) -> bool:
    """Whether dT and dB in one read of dy beat two: their slots, written and read, must cost fewer bytes than dy, and
    their row tiles keep a good third of the processors busy."""
    return rank_tile(r) < 32 and processors <= 3 * tiles(M, 128) and N >= 64


def _fitting(config: Config, arch: tuple[int, int], bits: int) -> Config:
    """The config with as many of its stages as shared memory holds."""
    stage = (config.BM + config.BN) * config.BK * bits // 8
    return replace(config, stages=max(2, min(config.stages, (shared_kib(arch) * 1024 - 16384) // stage)))
