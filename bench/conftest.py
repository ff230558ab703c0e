"""The benchmark suites under pytest-benchmark: --results DIR gets a CSV file of what each measured."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "examples")]

import clock  # noqa: E402
import tables  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder for the measured rows")
    parser.addoption("--rounds", type=int, default=5, help="rounds of every comparison")
    parser.addoption("--tiny", action="store_true", help="sizes that take no time: does everything run?")


def pytest_configure(config):
    if config.getoption("--results") and not config.getoption("--tiny"):
        clock.keep_memory(["-m", "pytest", *config.invocation_params.args])
    config.measured = defaultdict(list)


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture
def rounds(request, tiny) -> int:
    return 2 if tiny else request.config.getoption("--rounds")


@pytest.fixture
def measured(request) -> Callable[..., None]:
    """measured(name, **row): a line of NAME.csv."""
    return lambda name, **row: request.config.measured[name].append(row)


@pytest.fixture
def in_turn(benchmark, rounds) -> Callable[..., dict[str, list[float]]]:
    """in_turn(runs, shown, calls=1, warmup=1): seconds a call of every run, in rounds in which they take turns, their
    order another in each; pytest-benchmark shows the one named ``shown``. Where a sample is several calls, one that is
    not timed goes before it, since a short call is slow in the cache that another leaves."""

    def timed(runs: dict[str, Callable], shown: str, calls: int = 1, warmup: int = 1) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        others = [name for name in runs if name != shown]
        for run in [*runs.values()] * warmup:
            run()

        def sample(name: str) -> None:
            run = runs[name]
            seconds[name].append(clock.seconds(lambda: [run() for _ in range(calls)] if calls > 1 else run()) / calls)

        def before() -> None:
            others.append(others.pop(0))
            for name in others:
                if calls > 1:
                    runs[name]()
                sample(name)
            if calls > 1:
                runs[shown]()

        benchmark.pedantic(sample, args=(shown,), setup=before, rounds=rounds, warmup_rounds=0)
        return seconds

    return timed


def pytest_sessionfinish(session, exitstatus):
    folder = session.config.getoption("--results")
    for name, rows in session.config.measured.items() if folder else ():
        tables.write(folder / f"{name}.csv", rows)
