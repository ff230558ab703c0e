"""What bench/h200.py and bench/tune.py share: the device, interleaved timing on it, and helper processes.

Without a GPU, or with --dry-run, everything runs on the CPU in Triton's interpreter, and rows name "interpreter" as
their gpu.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch

if "--dry-run" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
GPU = "interpreter" if INTERPRETING else torch.cuda.get_device_name()

SAMPLE = 2e-4  # seconds of one timed sample, where one call is shorter
GRACE = 15  # seconds that work begun before a deadline may take beyond it
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


def _stamp():
    """A point in time on the device's queue."""
    if INTERPRETING:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    """Seconds from one stamp to another, once the device has reached it."""
    if INTERPRETING:
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _sample(run: Step, first: int, calls: int) -> tuple:
    start = _stamp()
    for i in range(first, first + calls):
        run(i)
    return start, _stamp()


def interleaved(
    steps: dict[Hashable, Step], enter: Callable = lambda name: None, seconds: float = 0.25, most: int = 30
) -> dict[Hashable, list[float]]:
    """Seconds of one call of every step, in every round: at least three rounds, until ``seconds`` or ``most`` of them.

    A step takes the number of the call, to rotate its inputs. Before it runs, ``enter`` gets its name, and one untimed
    call follows, so that the host is ahead of the device.
    """
    calls, times = {}, {name: [] for name in steps}
    for name, run in steps.items():
        enter(name)
        run(0)
        calls[name] = max(1, min(20, round(SAMPLE / max(1e-6, _between(*_sample(run, 1, 1))))))
    begin, at = time.perf_counter(), 2
    for done in range(1 if INTERPRETING else most):
        if done > 2 and time.perf_counter() - begin > seconds:
            break
        marks = {}
        for name, run in steps.items():
            enter(name)
            run(at)
            marks[name] = _sample(run, at + 1, calls[name])
        for name, mark in marks.items():
            times[name].append(_between(*mark) / calls[name])
        at += 1 + max(calls.values())
    return times


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
    return 2 if INTERPRETING else min(64, -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes))


def pool(start: Callable[[], None]):
    """Processes that compile and check beside this one, each begun with ``start``; None without a GPU."""
    if INTERPRETING:
        return None
    return multiprocessing.get_context("spawn").Pool(max(1, min(12, (os.cpu_count() or 1) - 2)), start)


def each(workers, function: Callable, jobs: list[tuple], deadline: float) -> Iterator[tuple[tuple, object]]:
    """(job, function(*job)) of the jobs begun by the deadline (time.time()), side by side where there are workers."""
    begun = lambda job: workers.apply_async(_unless_late, (deadline, function, job))  # noqa: E731
    started = [None if workers is None else begun(job) for job in jobs]
    for job, result in zip(jobs, started, strict=True):
        try:
            left = max(0.0, deadline + GRACE - time.time())
            answer = _unless_late(deadline, function, job) if result is None else result.get(left)
        except multiprocessing.TimeoutError:
            continue
        if answer is not None:
            yield job, answer[0]


def _unless_late(deadline: float, function: Callable, job: tuple) -> tuple | None:
    return (function(*job),) if time.time() < deadline else None
