"""Times on a device, each contender once a round, so that what else goes on there meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch

SAMPLE = 2e-4  # seconds of one timed sample, where one call is shorter
SETTLED = 3  # calls until one runs as all that follow: Python computes the first, watches the second, replays the third
Step = Callable[[int], object]


def stamp(device: torch.device):
    """A point in time on the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Seconds from one stamp to another, once the device has reached it."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _sample(run: Step, first: int, calls: int, device: torch.device) -> tuple:
    start = stamp(device)
    for i in range(first, first + calls):
        run(i)
    return start, stamp(device)


def interleaved(
    steps: dict[Hashable, Step],
    device: torch.device,
    enter: Callable = lambda name: None,
    seconds: float = 0.25,
    most: int = 30,
) -> dict[Hashable, list[float]]:
    """Seconds of one call of every step, in every round: at least three rounds, until ``seconds`` or ``most`` of them;
    no less than the host takes, where that is more than the device does.

    A step takes the number of the call, to rotate its inputs. Before it runs, ``enter`` gets its name, and SETTLED
    untimed calls follow: another backend means other plans for ``replay``, and the host must be ahead of the device.
    """
    calls, times = {}, {name: [] for name in steps}
    for name, run in steps.items():
        enter(name)
        for i in range(SETTLED):
            run(i)
        calls[name] = max(1, min(20, round(SAMPLE / max(1e-6, between(*_sample(run, 1, 1, device))))))
    begin, at = time.perf_counter(), 2
    for done in range(most):
        if done > 2 and time.perf_counter() - begin > seconds:
            break
        marks = {}
        for name, run in steps.items():
            enter(name)
            for i in range(at + 1 - SETTLED, at + 1):
                run(i)
            marks[name] = _sample(run, at + 1, calls[name], device)
        for name, mark in marks.items():
            times[name].append(between(*mark) / calls[name])
        at += 1 + max(calls.values())
    return times


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many inputs of that size exceed the L2 cache twice over, 64 at most."""
    if device.type != "cuda":
        return 2
    return min(64, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // nbytes))
