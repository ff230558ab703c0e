"""Timing on a CPU: contenders in turn, so that drift of the machine hits all alike; how figures are written down."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

# The C allocator keeps freed memory, and has enough of it from the start: page faults, which fall on a contender by
# chance, outweigh the differences.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
PREFAULT = 1 << 31


def keep_memory(command: list[str]) -> None:
    """Start the process anew with KEEP_MEMORY, which the C library reads at start-up only, and touch PREFAULT bytes."""
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, **KEEP_MEMORY})
    torch.zeros(PREFAULT, dtype=torch.uint8)


class Turns:
    """Seconds a call of every run, in rounds: the others, in an order that turns every round, then the shown one.

    Where a sample is several calls, one that is not timed goes before it: a short call is slow in the cache that
    another leaves.
    """

    def __init__(self, runs: dict[str, Callable], shown: str, calls: int = 1):
        self.runs, self.shown, self.calls = runs, shown, calls
        self.seconds: dict[str, list[float]] = {name: [] for name in runs}
        self._others = [name for name in runs if name != shown]

    def sample(self, name: str) -> None:
        run, calls = self.runs[name], self.calls
        taken = seconds(run) if calls == 1 else seconds(lambda: [run() for _ in range(calls)])
        self.seconds[name].append(taken / calls)

    def others(self) -> None:
        """A round up to the shown one's sample."""
        self._others = self._others[1:] + self._others[:1]
        for name in self._others:
            self._untimed(name)
            self.sample(name)
        self._untimed(self.shown)

    def _untimed(self, name: str) -> None:
        if self.calls > 1:
            self.runs[name]()


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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


def compared(times: dict[str, list[float]], name: str) -> dict[str, float | str]:
    """The columns of one contender: its time as a multiple of the frozen layer's, and of HF PEFT's where that runs."""
    peer = "peft" in times and name not in ("peft", "frozen")
    against = spread("vs_peft", relative(times, name, "peft")) if peer else {f"vs_peft_p{q}": "" for q in (20, 50, 80)}
    return {**spread("ratio", relative(times, name, "frozen")), **against, **environment()}


def environment() -> dict[str, str | int]:
    """The columns that say where a figure comes from."""
    return {**_machine(), "threads": torch.get_num_threads()}


@cache
def _machine() -> dict[str, str]:
    file, versions = Path("/proc/cpuinfo"), {"torch": torch.__version__}
    model = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    with suppress(metadata.PackageNotFoundError):
        versions["peft"] = metadata.version("peft")
    return {**versions, "cpu": model[1] if model else platform.machine()}
