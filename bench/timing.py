"""What bench/gpu.py and bench/tune.py share: the device, interleaved timing on it, tables that are on disk at any time,
and cases in processes of their own.

Without a GPU, or with --dry-run, everything runs on the CPU in Triton's interpreter, and rows name "interpreter" as
their gpu.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

if "--dry-run" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from clock import quantile

from fused_peft.core import records
from fused_peft.tools import timing
from fused_peft.tools.isolated import LATE, Failure, Pool
from fused_peft.tools.timing import Step

ROOT = Path(__file__).resolve().parent.parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
CPU_OR_GPU = torch.device("cpu") if INTERPRETING else torch.device("cuda", torch.cuda.current_device())
FACTS = "gpu driver torch triton commit"  # the columns that say where a figure comes from


class Table:
    """A CSV file whose rows are on disk as soon as they are written."""

    def __init__(self, path: Path, columns: str):
        self.columns = columns.split()
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, restval="", lineterminator="\n")
        self._writer.writeheader()
        self.rows: list[dict] = []

    def add(self, **row) -> None:
        row |= facts()
        self.rows.append(row)
        self._writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()


@cache
def facts() -> dict[str, str]:
    """The values of FACTS."""
    known = records.identity(CPU_OR_GPU)
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    if (ROOT / "COMMIT").is_file():  # a copy, whatever history it has there
        commit = (ROOT / "COMMIT").read_text().strip()
    else:
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return {**{name: known[name] for name in ("gpu", "driver", "torch", "triton")}, "commit": commit}


def cases(
    table: Table, pool: Pool, function: str, jobs: list[tuple], seconds: float, deadline: float, workers: int = 99
) -> list[str]:
    """The rows of every job into the table as they come, each job in a process of its own; what did not begin in time.

    A job's first argument is a dict, the columns that name the case; ``function`` ("module:name") returns a list of
    dicts, the others. A case that raises, crashes or takes longer than ``seconds`` is one row whose note says so.
    """
    begun = set()
    for number, answer in pool.run(function, jobs, seconds, deadline, workers):
        begun.add(number)
        about = jobs[number][0]
        if isinstance(answer, Failure):
            print("failed:", *about.values(), answer.why, flush=True)
            # where rows are right or wrong it is wrong, but for want of time
            verdict = {"ok": "skipped" if answer == LATE else "false"} if "ok" in table.columns else {}
            answer = [{**verdict, "note": answer.why}]
        for row in answer:
            table.add(**{**about, **row})
    return [" ".join(map(str, job[0].values())) for number, job in enumerate(jobs) if number not in begun]


def spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p{q}": quantile(values, q / 100) for q in (20, 50, 80)}


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
    """``tools.timing.copies_of`` on DEVICE; one in the interpreter."""
    return 1 if INTERPRETING else timing.copies_of(nbytes, CPU_OR_GPU)
