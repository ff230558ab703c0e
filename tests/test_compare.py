"""bench/compare.py: regressions are flagged, noise is not."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import compare

ROOT = Path(__file__).resolve().parent.parent


def _row(step="lora", p50=1.1, width=0.01, **others):
    spread = {f"ratio_p{q}": str(p50 + d) for q, d in ((20, -width), (50, 0), (80, width))}
    return {"shape": "a", "step": step, **spread, "torch": "2", **others}


def _only(before, after, **options):
    (change,) = compare.compare([before], [after], **options)
    return change


def test_slower_beyond_the_noise_is_worse_and_faster_is_better():
    slower = _only(_row(), _row(p50=1.2))
    assert slower.beyond_noise
    assert slower.gain == pytest.approx(1.1 / 1.2)
    faster = _only(_row(), _row(p50=1.0))
    assert faster.beyond_noise
    assert faster.gain > 1


@pytest.mark.parametrize(("p50", "width"), [(1.2, 0.06), (1.12, 0.001), (1.1, 0.0)])
def test_overlapping_ranges_or_a_small_change_are_noise(p50, width):
    assert not _only(_row(width=width), _row(p50=p50, width=width)).beyond_noise


def test_more_per_second_is_better():
    rows = [{"model": "m", "tokens_per_second_p50": v} for v in ("100", "150")]
    assert _only(*rows).gain == 1.5
    assert _only(*rows[::-1]).beyond_noise


def test_exact_figures_in_bytes_may_be_nothing():
    rows = [{"method": "m", "kept_bytes": v, "torch": t} for v, t in (("0", "2"), ("16", "3"))]
    assert not _only(rows[0], rows[0]).beyond_noise
    assert _only(rows[0], rows[1]).gain == 0
    assert _only(rows[1], rows[0]).gain == float("inf")
    assert _only(rows[1], rows[0]).beyond_noise


def test_environment_does_not_part_lines_and_lines_may_be_missing():
    before = [_row("lora"), _row("dora"), _row("gone")]
    after = [_row("dora", torch="3"), _row("lora", torch="3"), _row("new", torch="3")]
    assert [c.line for c in compare.compare(before, after)] == ["a lora", "a dora"]
    with pytest.raises(ValueError, match="not told apart"):
        compare.compare([_row(), _row()], [_row()])


def test_exit_status(tmp_path):
    def write(name, rows):
        with (tmp_path / name).open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    def status(a, b):
        command = [sys.executable, ROOT / "bench/compare.py", a, b]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    fast, slow = write("fast.csv", [_row()]), write("slow.csv", [_row(p50=1.5)])
    assert status(fast, fast)[0] == 0
    code, printed = status(fast, slow)
    assert (code, printed.startswith("WORSE")) == (1, True)
    assert status(slow, fast)[0] == 0
    assert status(fast, write("other.csv", [_row("else")]))[0] == 2
    for file in (ROOT / "bench/results").rglob("*.csv"):
        if "_p50" in file.read_text().splitlines()[0] or file.stem == "memory":
            assert status(file, file)[0] == 0, file
