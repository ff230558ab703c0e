"""What bench/gpu.py and bench/tune.py share: the device, interleaved timing on it, tables that are on disk at any time.

Without a GPU, or with --dry-run, everything runs on the CPU in Triton's interpreter, and rows name "interpreter" as
their gpu.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if "--dry-run" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from fused_peft.tools import timing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
CPU_OR_GPU = torch.device("cpu") if INTERPRETING else torch.device("cuda", torch.cuda.current_device())
GPU = "interpreter" if INTERPRETING else torch.cuda.get_device_name()

Step = Callable[[int], object]


class Table:
    """A CSV file whose rows are on disk as soon as they are written."""

    def __init__(self, path: Path, columns: str):
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns.split(), restval="", lineterminator="\n")
        self._writer.writeheader()
        self.rows: list[dict] = []

    def add(self, **row) -> None:
        self.rows.append(row)
        self._writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()


def interleaved(steps: dict, enter: Callable = lambda name: None, seconds: float = 0.25) -> dict:
    """``tools.timing.interleaved`` on DEVICE; one round in the interpreter."""
    return timing.interleaved(steps, CPU_OR_GPU, enter, seconds, 1 if INTERPRETING else 30)


def captured(step: Step, copies: int) -> Step:
    """A CUDA graph of the step on each of its inputs, which a call replays. Needs a stream that is not the default."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for i in range(copies):
            step(i)
    finally:
        graph.capture_end()
    return lambda i: graph.replay()


def copies_of(nbytes: int) -> int:
    """How many inputs of that size exceed the L2 cache twice over, 64 at most."""
    return timing.copies_of(nbytes, CPU_OR_GPU)
