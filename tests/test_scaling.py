"""bench/scaling.py: the law that made the times is found again, and where one way overtakes another."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

scaling = pytest.importorskip("scaling")
bench_scaling = pytest.importorskip("bench_scaling")

Law, Shape = scaling.Law, scaling.Shape
FROZEN = Law({"call": 0.05, "product": 2e-8})
LAWS = {
    "ours": Law({"call": 0.2, "passes": 5e-7, "skinny": 3e-8, "weight": 0.0, "weight rank": 0.0}),
    "addmm": Law({"call": 0.1, "passes": 9e-7, "skinny": 3e-8, "weight": 0.0, "weight rank": 0.0}),
    "formed": Law({"call": 0.0, "passes": 0.0, "skinny": 0.0, "weight": 2e-6, "weight rank": 1e-8, "product": 0.0}),
}


def rows(shapes=bench_scaling.SHAPES):
    found = []
    for s in shapes:
        for step in ("forward", "forward + backward"):
            for who, ms in {"frozen": FROZEN(s), **{w: FROZEN(s) + law(s) for w, law in LAWS.items()}}.items():
                row = {"method": "lora", "step": step, "contender": who, "ms_p50": ms, "ratio_p50": ms / FROZEN(s)}
                found.append({k: str(v) for k, v in {**row, **vars(s)}.items()})
    return found


@pytest.mark.parametrize("who", LAWS)
def test_the_law_behind_the_times_is_found(who):
    fit = scaling.fit(rows(), "lora", who, "forward")
    assert fit.frozen.coefficients == pytest.approx(FROZEN.coefficients, rel=1e-6)
    expected = dict.fromkeys(fit.overhead.coefficients, 0.0) | LAWS[who].coefficients
    assert fit.overhead.coefficients == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert fit.error < 1e-6
    unseen = Shape(3000, 1500, 700, 24)
    assert fit.ms(unseen) == pytest.approx(FROZEN(unseen) + LAWS[who](unseen), rel=1e-4)


def test_no_coefficient_is_negative_under_noise():
    noisy = rows()
    for i, r in enumerate(noisy):
        r["ratio_p50"] = str(float(r["ratio_p50"]) * (1 + 0.05 * (-1) ** i))
    fit = scaling.fit(noisy, "lora", "ours", "forward")
    assert min(fit.overhead.coefficients.values()) >= 0
    assert 0 < fit.error < 0.1


def test_what_was_not_measured_is_a_key_error():
    with pytest.raises(KeyError):
        scaling.fit(rows(), "dora", "ours", "forward")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 2.0), (4, 0.5)], 2.0),  # halfway on a logarithmic scale
        ([(4, 0.5), (1, 2.0), (16, 0.25)], 2.0),
        ([(1, 2.0), (4, 1.5)], None),
        ([(1, 0.5), (4, 0.2)], None),
    ],
)
def test_crossing(points, expected):
    found = scaling.crossing(points)
    assert found == expected or found == pytest.approx(expected)


def test_crossovers_are_where_the_laws_meet():
    found = list(scaling.crossovers(rows()))
    (text,) = [t for choice, step, t in found if choice.startswith("addmm") and step == "forward" and "CPU" in choice]
    # 0.1 ms dearer a call, 4e-7 ms cheaper an element: M (1024 + 1024) = 0.1 / 4e-7
    fitted = float(text.split(" measured, M = ")[1].split()[0])
    assert fitted == pytest.approx(0.1 / 4e-7 / 2048, rel=0.02)
    assert sum("predicted" in t for *_, t in found) == 6
