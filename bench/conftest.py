"""The benchmark suites under pytest-benchmark: --csv FILE writes what they measured, a line a contender."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import clock
import tables


def pytest_addoption(parser):
    parser.addoption("--csv", type=Path, help="file for the measured rows")
    parser.addoption("--rounds", type=int, default=5, help="rounds of every comparison")
    parser.addoption("--tiny", action="store_true", help="shapes that take no time: does everything run?")


def pytest_configure(config):
    if config.getoption("--csv") and not config.getoption("--tiny"):
        clock.keep_memory(["-m", "pytest", *config.invocation_params.args])
    config.measured = []


@pytest.fixture
def measured(request) -> list[dict]:
    """The rows of this session."""
    return request.config.measured


def pytest_sessionfinish(session, exitstatus):
    if session.config.measured and session.config.getoption("--csv"):
        tables.write(session.config.getoption("--csv"), session.config.measured)
