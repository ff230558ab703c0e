"""Timing on a CPU: contenders in turn, so that drift of the machine hits all alike; how figures are written down."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

# The C allocator keeps freed memory: page faults, which fall on a contender by chance, outweigh the differences.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def keep_memory(command: list[str]) -> None:
    """Start the process anew with KEEP_MEMORY, which the C library reads at start-up only."""
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, **KEEP_MEMORY})


def interleave(steps: dict[str, Callable], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every step in every round."""
    times = {name: [] for name in steps}
    for i in range(rounds + warmup):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def spread(name: str, values: list[float], digits: int = 3) -> dict[str, float]:
    """{NAME_p20, NAME_p50, NAME_p80}, the median that of ``statistics``."""
    found = {f"{name}_p{q}": quantile(values, q / 100) for q in (20, 50, 80)}
    found[f"{name}_p50"] = statistics.median(values)
    return {key: round(value, digits) for key, value in found.items()}


def relative(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    """One contender's time as a multiple of another's of the same round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]


def environment() -> dict[str, str | int]:
    """The columns that say where a figure comes from."""
    return {"torch": torch.__version__, "cpu": platform.machine(), "threads": torch.get_num_threads()}
