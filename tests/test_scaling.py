"""bench/scaling.py: the law that made the times is found again, and where one way overtakes another."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

scaling = pytest.importorskip("scaling")
bench_scaling = pytest.importorskip("bench_scaling")

Law, Shape = scaling.Law, scaling.Shape
FROZEN = Law({"call": 0.05, "weight": 3e-7, "product": 2e-8})
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
    assert fit.frozen.coefficients == pytest.approx(FROZEN.coefficients, rel=1e-4)
    expected = dict.fromkeys(fit.overhead.coefficients, 0.0) | LAWS[who].coefficients
    assert fit.overhead.coefficients == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert max(fit.error, fit.frozen_error) < 1e-4
    unseen = Shape(3000, 1500, 700, 24)
    assert fit.ms(unseen) == pytest.approx(FROZEN(unseen) + LAWS[who](unseen), rel=1e-4)


def test_no_coefficient_is_negative_under_noise():
    noisy = rows()
    for i, r in enumerate(noisy):
        r["ratio_p50"] = str(float(r["ratio_p50"]) * (1 + 0.05 * (-1) ** i))
    fit = scaling.fit(noisy, "lora", "ours", "forward")
    assert min(fit.overhead.coefficients.values()) >= 0
    assert 0.01 < fit.error < 1


def test_what_was_not_measured_is_a_key_error():
    with pytest.raises(KeyError):
        scaling.fit(rows(), "dora", "ours", "forward")


@pytest.mark.parametrize(
    ("points", "changes", "words"),
    [
        ([(1, 2.0), (4, 0.5)], [(2.0, True)], "from M = 2"),  # halfway on a logarithmic scale
        ([(16, 0.25), (1, 2.0), (4, 0.5)], [(2.0, True)], "from M = 2"),
        ([(1, 0.5), (4, 2.0)], [(2.0, False)], "up to M = 2"),
        ([(1, 2.0), (4, 0.5), (16, 2.0)], [(2.0, True), (8.0, False)], "from M = 2 and up to M = 8"),
        ([(1, 2.0), (4, 1.5)], [], "nowhere"),
        ([(1, 0.5), (4, 0.2)], [], "all along"),
        ([(1, 2.0), (2, 1.01), (8, 1 / 1.01), (16, 0.5)], [(4.0, True)], "from M = 4"),
        ([(1, 0.98), (4, 1.02), (16, 0.99)], [], "level within 3 %"),
        ([(1, 0.5), (4, 1.01), (16, 0.5)], [], "all along"),
    ],
)
def test_crossings(points, changes, words):
    found = scaling.crossings(points)
    assert [second for _, second in found] == [second for _, second in changes]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in changes])
    assert scaling.where("M", points) == words


def test_where_one_launch_and_two_take_as_long():
    """At the reported M the two predicted times are the same to a step of M; on either side the cheaper one differs."""
    text = next(t for choice, _, t in scaling.predicted() if choice.startswith("one launch") and " 0 " in choice)
    M = int(text.removeprefix("from M = ").split()[0])

    def times(rows):
        ways = [scaling.roofline.lora_forward(Shape(rows, 4096, 4096, 16), one) for one in (True, False)]
        assert [len(way) for way in ways] == [1, 3]  # K in shares, which a launch adds up
        return [sum(launch.seconds for launch in way) for way in ways]

    one, two = times(M)
    assert one == pytest.approx(two, rel=0.05)
    assert times(M // 2)[0] < times(M // 2)[1]
    assert times(2 * M)[0] > times(2 * M)[1]


def test_the_share_of_the_librarys_rate():
    """With the fused GEMM slowed to the predicted share, fused and addmm take equally long."""
    text = next(t for choice, step, t in scaling.predicted() if "N = 4096" in choice and step == "forward")
    share = float(text.split()[1]) / 100
    shape = Shape(8192, 4096, 4096, 16)
    ours, eager = (scaling.roofline.schedule(who, "lora", shape, False) for who in ("ours", "eager"))
    slowed = sum(x.seconds / (share if x.name == "gemm_lowrank_tma" else 1) for x in ours)
    assert slowed == pytest.approx(sum(x.seconds for x in eager), rel=1e-3)


def test_crossovers_are_where_the_laws_meet():
    found = list(scaling.crossovers(rows()))
    (text,) = [t for choice, step, t in found if choice.startswith("addmm") and step == "forward" and "CPU" in choice]
    # 0.1 ms dearer a call, 4e-7 ms cheaper an element: M (1024 + 1024) = 0.1 / 4e-7
    fitted = float(text.split(" measured, from M = ")[1].split()[0])
    assert fitted == pytest.approx(0.1 / 4e-7 / 2048, rel=0.02)
    assert sum("predicted" in t for *_, t in found) == 6
