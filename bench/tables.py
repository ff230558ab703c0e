"""Result tables as CSV files: a header, then a line a row."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def write(file: Path | None, rows: list[dict]) -> None:
    """The rows, all of the same columns, into the file, its folder made; nothing where no file is asked for."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def command(about: str, rows: Callable[[], list[dict]]) -> None:
    """A script that prints rows of the same columns, and writes them where ``--out FILE`` says."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = rows()
    for line in (list(found[0]), *(r.values() for r in found)):
        print(" ".join(f"{cell:>15}" for cell in line))
    write(args.out, found)
