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
    if not config.getoption("--tiny") and not config.getoption("--collect-only"):
        clock.keep_memory(["-m", "pytest", *config.invocation_params.args])
    config.measured, config.partial = defaultdict(list), False


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
    """in_turn(runs, shown, calls=1, warmup=1, most=None): seconds a call of every run, ``most`` rounds or fewer,
    taking turns as ``clock.Turns`` has it; pytest-benchmark shows the one named ``shown``."""

    def timed(
        runs: dict[str, Callable], shown: str, calls: int = 1, warmup: int = 1, most: int | None = None
    ) -> dict[str, list[float]]:
        turns = clock.Turns(runs, shown, calls)
        for run in [*runs.values()] * warmup:
            run()
        benchmark.pedantic(
            turns.sample, args=(shown,), setup=turns.others, rounds=min(rounds, most or rounds), warmup_rounds=0
        )
        return turns.seconds

    return timed


def pytest_deselected(items):
    items[0].config.partial = True


def pytest_sessionfinish(session, exitstatus):
    """Writes the tables; as NAME.partial.csv where a suite did not run in full, so that nothing complete is lost."""
    config = session.config
    partial = exitstatus != 0 or config.partial or any("::" in arg for arg in config.args)
    folder = config.getoption("--results")
    for name, rows in config.measured.items() if folder else ():
        tables.write(folder / f"{name}{'.partial' * partial}.csv", rows)
