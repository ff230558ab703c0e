"""Two result files of the same benchmark, line by line: what got slower or larger beyond the noise.

    python bench/compare.py BEFORE.csv AFTER.csv [--margin 0.03]

Lines belong together when everything but figures and the environment is the same. A figure is a column NAME_p50, with
NAME_p20 and NAME_p80 around it where the file has them, or an exact one in bytes. It changed when the two ranges do not
overlap, and the medians differ by more than the margin. More is better where the name ends in "per_second", less
anywhere else. Exit status 1 if anything got worse, 2 if no line is in both files.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import tables

ENVIRONMENT = {"torch", "triton", "peft", "cpu", "gpu", "driver", "commit", "threads", "python", "peak_mb"}
FIGURE = re.compile(r"(.+)_p(?:20|50|80)")
EXACT = re.compile(r"_bytes$|^mb$|^full_ms$|^angle$|^values_differ$")  # figures without a range


class Change(NamedTuple):
    """One figure of one line in both files; gain: how many times better the second is."""

    line: str
    figure: str
    before: float
    after: float
    gain: float
    beyond_noise: bool


def key(row: dict[str, str], figures: set[str]) -> str:
    """What the line measures."""
    return " ".join(v for k, v in row.items() if k not in ENVIRONMENT | figures and not FIGURE.fullmatch(k) and v)


def spread(row: dict[str, str], figure: str) -> tuple[float, float, float] | None:
    """(p20, p50, p80) of a figure; the median alone three times where the file has no range; None without a value."""
    middle = row.get(f"{figure}_p50") or row.get(figure)
    if not middle:
        return None
    return tuple(float(row.get(f"{figure}_p{q}") or middle) for q in (20, 50, 80))


def compare(before: list[dict[str, str]], after: list[dict[str, str]], margin: float = 0.03) -> list[Change]:
    """Every figure that both files have, in the order of the first. Raises ValueError where lines are not unique."""
    figures = [m[1] for name in before[0] if (m := FIGURE.fullmatch(name)) and name.endswith("_p50")]
    figures += [name for name in before[0] if EXACT.search(name)]
    rows = []
    for found in (before, after):
        by = {key(row, set(figures)): row for row in found}
        if len(by) < len(found):
            raise ValueError(f"{len(found) - len(by)} lines are not told apart by their columns {list(found[0])}")
        rows.append(by)
    changes = []
    for line, first in rows[0].items():
        for figure in figures:
            old, new = spread(first, figure), spread(rows[1].get(line, {}), figure)
            if old is None or new is None:
                continue
            more = figure.endswith("per_second")
            above, below = (new[1], old[1]) if more else (old[1], new[1])
            gain = above / below if below else 1.0 if above == below else math.inf
            apart = new[0] > old[2] or new[2] < old[0]
            changes.append(Change(line, figure, old[1], new[1], gain, apart and abs(gain - 1) > margin))
    return changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--margin", type=float, default=0.03)
    args = parser.parse_args()
    found = compare(tables.read(args.before), tables.read(args.after), args.margin)
    changed = [c for c in found if c.beyond_noise]
    for c in sorted(changed, key=lambda c: c.gain):
        word = "better" if c.gain > 1 else "WORSE"
        print(f"{word:<7} {c.gain:6.3f}  {c.figure:<16} {c.before:g} -> {c.after:g}  {c.line}")
    worse = sum(c.gain < 1 for c in changed)
    print(f"{len(found)} figures in both files: {worse} worse, {len(changed) - worse} better beyond the noise")
    return 1 if worse else 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
