"""Which tile sizes a kernel runs with: tuned ones where a record of this GPU has them, and for everything else the
closed form that stands in the kernel's own file, under ``closed_form``.

Nothing is tuned while a model runs: ``bench/tune.py`` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


@dataclass(frozen=True)
class Config:
    """Tile rows, columns and depth; warps a program; pipeline stages; row tiles a band (L2 reuse).

    late: the TMA kernel adds the low-rank phase after the K loop instead of before. flatten: its tile loop and K loop
    are one loop to the pipeliner. cluster: blocks of the CUDA kernel that share the wider operand's tile. fuse: a
    product and the sum that it goes into may be rounded as one. inline: the CUDA kernel makes x Aᵀ too, where it can.
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
    fuse: bool = True
    inline: bool = False


CLOSED_FORMS: dict[str, Callable[..., Config]] = {}  # by kernel, once its file is imported


def closed_form(kernel: str) -> Callable:
    """Declares a function (arch, bits, M, N, K, r) -> Config as the one that a kernel's configs come from; arch as
    (major, minor), bits of an element of x, the rest as the kernel counts them."""

    def declare(function: Callable[..., Config]) -> Callable[..., Config]:
        CLOSED_FORMS[kernel] = function
        return function

    return declare


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


def table() -> dict[str, list]:
    """{key: fields of Config} of what was tuned on the GPU at hand; the package replaces this function."""
    return {}


def key(kind: str, arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> str:
    """The table's key: columns and depth exact, rows and rank by the power of two at or above them."""
    return f"{kind} sm_{arch[0]}{arch[1]} {bits} {bucket(M)} {N} {K} {rank_tile(r, 512) if r else 0}"


_insisted: dict[str, dict] = {}  # fields by kernel


def insist(kind: str, **fields) -> None:
    """Every config of the kernel has these fields until the next call, which takes them back: for who measures."""
    _insisted[kind] = fields
    choose.cache_clear()


@cache
def choose(kind: str, arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int = 16) -> Config:
    """The tuned config of the shape's bucket, else the closed form; bits: of an element of x."""
    tuned = table().get(key(kind, arch, bits, M, N, K, r))
    found = Config(*tuned) if tuned else CLOSED_FORMS[kind](arch, bits, M, N, K, r)
    return replace(found, **_insisted.get(kind, {}))
