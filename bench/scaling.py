"""The scaling law of a layer's overhead, fitted to ``bench_scaling.py``'s times, and where one way overtakes another.

frozen    t = h + w·N·K + M·K·N / g
overhead  t − t_frozen = h' + b·M(K + N) + a·M·r(K + N) + c·N·K + e·N·K·r,  no coefficient negative

Every pass over x, dx, y or dy costs b, every skinny product a, and what is done to the weight itself (DoRA's norm, a
formed weight, reading it from farther away) c and e. As a multiple of the frozen layer the overhead tends, with many
tokens, to g(b + a·r)(1/K + 1/N): it falls as one over the width and rises with the rank. Least squares on relative
errors.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import roofline
from baselines import Shape
from scipy.optimize import nnls

TERMS: dict[str, Callable[[Shape], float]] = {
    "call": lambda s: 1,
    "passes": lambda s: s.M * (s.K + s.N),
    "skinny": lambda s: s.M * s.r * (s.K + s.N),
    "weight": lambda s: s.K * s.N,
    "weight rank": lambda s: s.K * s.N * s.r,
    "product": lambda s: s.M * s.K * s.N,
}
BASE = Shape(1024, 1024, 1024, 16)  # where the swept lines meet
OF_A_METHOD = ("call", "passes", "skinny", "weight", "weight rank")
OF_A_FORMED_WEIGHT = (*OF_A_METHOD, "product")  # dW


@dataclass(frozen=True)
class Law:
    """Milliseconds a term."""

    coefficients: dict[str, float]

    def __call__(self, shape: Shape) -> float:
        return sum(value * TERMS[name](shape) for name, value in self.coefficients.items())


def solve(points: list[tuple[Shape, float]], terms: tuple[str, ...], scale: list[float]) -> Law:
    """The law through the points, weighed by 1 / scale."""
    weights = 1 / np.array(scale)
    columns = np.array([[TERMS[name](shape) for name in terms] for shape, _ in points]) * weights[:, None]
    norms = np.linalg.norm(columns, axis=0)  # terms differ by nine orders of magnitude
    found = nnls(columns / norms, np.array([ms for _, ms in points]) * weights)[0] / norms
    return Law(dict(zip(terms, found.tolist(), strict=True)))


@dataclass(frozen=True)
class Fit:
    """What a contender takes, in ms: the frozen layer's law plus its own.

    error: the median over the points of |fitted / measured - 1| of the overhead alone, frozen_error that of the frozen
    layer's time.
    """

    frozen: Law
    overhead: Law
    points: tuple[tuple[Shape, float], ...]  # shape, ratio to the frozen layer in the same rounds
    error: float
    frozen_error: float

    def ms(self, shape: Shape) -> float:
        return self.frozen(shape) + self.overhead(shape)

    def ratio(self, shape: Shape) -> float:
        return self.ms(shape) / self.frozen(shape)


def shape_of(row: dict[str, str]) -> Shape:
    return Shape(*(int(row[k]) for k in ("M", "K", "N", "r")))


def floors(rows: list[dict[str, str]], step: str) -> dict[Shape, float]:
    """Milliseconds of the frozen layer, the median over the methods that it was timed beside."""
    found = defaultdict(list)
    for r in rows:
        if r["contender"] == "frozen" and r["step"] == step:
            found[shape_of(r)].append(float(r["ms_p50"]))
    return {s: statistics.median(each) for s, each in found.items()}


def fit(rows: list[dict[str, str]], method: str, contender: str, step: str) -> Fit:
    """KeyError where the rows do not have them."""
    chosen = [r for r in rows if (r["method"], r["contender"], r["step"]) == (method, contender, step)]
    if not chosen:
        raise KeyError((method, contender, step))
    floor = floors(rows, step)
    frozen = solve(list(floor.items()), ("call", "weight", "product"), list(floor.values()))
    points = tuple((shape_of(r), float(r["ratio_p50"])) for r in chosen)
    above = [(s, (ratio - 1) * floor[s]) for s, ratio in points]
    terms = OF_A_FORMED_WEIGHT if contender == "formed" else OF_A_METHOD
    overhead = solve(above, terms, [floor[s] for s, _ in above])
    error = statistics.median(abs(overhead(s) / ms - 1) for s, ms in above)
    frozen_error = statistics.median(abs(frozen(s) / ms - 1) for s, ms in floor.items())
    return Fit(frozen, overhead, points, error, frozen_error)


def along(shape: Shape, base: Shape, field: str) -> bool:
    """Whether the shape differs from the base in that field alone (the width: K and N)."""
    same = {"M", "K", "r"} - {field}
    return shape.K == shape.N and all(getattr(shape, name) == getattr(base, name) for name in same)


def moved(base: Shape, field: str, x: float) -> Shape:
    values = vars(base) | ({"K": x, "N": x} if field == "K" else {field: x})
    return Shape(**values)


LEVEL = 0.03  # ratios this close to 1 are noise


def crossings(pairs: list[tuple[float, float]]) -> list[tuple[float, bool]]:
    """[(x, whether the second is the cheaper one from there)] of pairs (x, cost of the second / cost of the first).

    Only where points on both sides are more than LEVEL away from 1. Interpolated on logarithmic scales; where points
    between those go back and forth, the middle of it.
    """
    points = sorted(pairs)
    clear = [(x, y) for x, y in points if abs(y - 1) > LEVEL]
    found = []
    for (start, above), (end, below) in pairwise(clear):
        if (above > 1) != (below > 1):
            between = [(np.log(x), np.log(y)) for x, y in points if start <= x <= end]
            zeros = [x0 + (x1 - x0) * y0 / (y0 - y1) for (x0, y0), (x1, y1) in pairwise(between) if y0 * y1 <= 0 != y0]
            found.append((float(np.exp(np.mean(zeros))), below < 1))
    return found


def where(field: str, pairs: list[tuple[float, float]]) -> str:
    """In words: where the second is the cheaper one."""
    clear = [y for _, y in pairs if abs(y - 1) > LEVEL]
    if not clear:
        return f"level within {100 * LEVEL:.0f} %"
    changes = [f"{'from' if second else 'up to'} {field} = {x:.0f}" for x, second in crossings(pairs)]
    return " and ".join(changes) or ("all along" if clear[0] < 1 else "nowhere")


def crossovers(rows: list[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(choice, step, where the second overtakes the first): on the CPU measured and fitted, around BASE; on an H200 by
    the roofline model, K = N = 4096, r = 16."""
    steps = "forward", "forward + backward"
    for (first, second, field), step in product(CHOICES, steps):
        one, other = (fit(rows, "lora", who, step) for who in (first, second))
        times = {s: ratio for s, ratio in one.points if along(s, BASE, field)}
        pairs = [(getattr(s, field), ratio / times[s]) for s, ratio in other.points if s in times]
        low, high = min(pairs)[0], max(pairs)[0]
        law = [(x, other.ms(moved(BASE, field, x)) / one.ms(moved(BASE, field, x))) for x in geometric(low, high)]
        choice = f"{NAMES[first]}, then {NAMES[second]}; CPU, {field} = {low} to {high}"
        ends = f"second / first {min(pairs)[1]:.2f} to {max(pairs)[1]:.2f}"
        yield choice, step, f"{where(field, pairs)} measured, {where(field, law)} fitted; {ends}"
    yield from predicted()


CHOICES = (("ours", "formed", "r"), ("ours", "formed", "M"), ("addmm", "ours", "M"))
NAMES = {"ours": "fused, factored", "formed": "weight formed in each call", "addmm": "addmm on the library's GEMM"}


def geometric(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (i / 200) for i in range(201)]


def predicted() -> Iterator[tuple[str, str, str]]:
    seconds = lambda launches, each: sum(launch.seconds + each for launch in launches)  # noqa: E731
    rows = sorted({round(M) for M in geometric(1, 2048)})
    ways = [[roofline.lora_forward(Shape(M, 4096, 4096, 16), one) for one in (True, False)] for M in rows]
    for each in (0.0, 3e-6):
        pairs = [(M, seconds(two, each) / seconds(one, each)) for M, (one, two) in zip(rows, ways, strict=True)]
        choice = f"one launch, then two; H200, {1e6 * each:.0f} µs a launch"
        yield choice, "forward", f"{where('M', pairs)} predicted"
    for N, step in product((4096, 14336), (False, True)):
        shape = Shape(8192, 4096, N, 16)
        ours, eager = (roofline.schedule(who, "lora", shape, step) for who in ("ours", "eager"))
        gemms = sum(launch.seconds for launch in ours if launch.name == "gemm_lowrank_tma")
        share = gemms / (seconds(eager, 0) - (seconds(ours, 0) - gemms))
        choice = f"addmm, then fused; H200, N = {N}"
        yield choice, "forward + backward" if step else "forward", f"at {100 * share:.1f} % of cuBLAS's rate, predicted"
