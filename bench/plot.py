"""The figures of docs/, drawn from the committed results: docs/NAME.svg.

    python bench/plot.py

Backgrounds are transparent and every colour stands out from white as from a dark page. A figure carries a digest of the
numbers in it, which a test compares with the CSV files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
import report
import tables
from baselines import Shape
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = "#808080"
COLOURS = OURS, PEER, OTHER, FIFTH, _ = "#1a80d6", "#d9622b", "#2e9455", "#a868c8", "#b08000"
FLOOR = TEXT
STYLE = {
    "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "fused_peft", "font.size": 10,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.titlecolor": TEXT, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": TEXT, "grid.alpha": 0.25, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
Drawn = tuple[Figure, dict]  # the figure, and the numbers in it


def subplots(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, list]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()


def dots(axes, names: list[str], found: dict[str, tuple[float, float | None]], title: str) -> None:
    """Ours and HF PEFT's of every name, the last name on top, a line between the two."""
    for i, name in enumerate(names):
        ours, peer = found[name]
        if peer is not None:
            axes.plot((ours, peer), (i, i), color=TEXT, linewidth=1)
            axes.plot(peer, i, "D", color=PEER, markersize=5, label="HF PEFT")
        axes.plot(ours, i, "o", color=OURS, label="ours")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.02)
    axes.set_title(title)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(handles.values(), handles, loc="upper right")


def speed() -> Drawn:
    """Forward + backward of one layer over the frozen layer, by method."""
    rows = [r for r in report.rows("cpu/layers.csv") if r["step"] == "forward + backward"]
    shape = rows[0]["shape"]
    found: dict[str, dict] = {}
    for dtype in ("fp32", "bf16"):
        of = {(r["method"], r["contender"]): float(r["ratio_p50"]) for r in rows
              if (r["shape"], r["dtype"]) == (shape, dtype)}  # fmt: skip
        found[dtype] = {m: (of[m, "ours"], of.get((m, "peft"))) for m, who in of if who == "ours"}
    order = sorted(found["fp32"], key=lambda m: found["fp32"][m][0], reverse=True)
    figure, panels = subplots(1, 2, (9, 6), sharey=True)
    for axes, dtype in zip(panels, found, strict=True):
        dots(axes, order, found[dtype], f"{dtype}, {shape.replace('x', ' × ').replace(' r', ', r')}")
        axes.axvline(1, color=FLOOR, linewidth=1.5)
        axes.set_xlabel("forward + backward, multiples of the frozen layer")
    return figure, found


def steps() -> Drawn:
    """A training step of whole models, accelerated and HF PEFT's, over one through the frozen model."""
    of = {
        (f"{r['model']}, {r['method']}", r["contender"]): float(r["ratio_p50"]) for r in report.rows("cpu/training.csv")
    }
    names = [name for name, who in reversed(of) if who == "peft" and "ia3" not in name]
    found = {name: (of[name, "accelerated"], of[name, "peft"]) for name in names}
    figure, (axes,) = subplots(1, 1, (8, 2.8))
    dots(axes, names, found, "a training step, one CPU core, fp32")
    axes.axvline(1, color=FLOOR, linewidth=1.5)
    axes.margins(y=0.1)
    axes.set_xlabel("multiples of a step through the frozen model")
    return figure, {"fp32": found}


def memory() -> Drawn:
    """Kept for backward beyond x, and the peak, by method."""
    rows = report.rows("cpu/memory.csv")
    figure, panels = subplots(1, 2, (9, 6), sharey=True)
    found: dict[str, dict] = {}
    for what in ("kept", "peak"):
        of = {(r["method"], r["contender"]): int(r[f"{what}_bytes"]) / int(r["x_bytes"]) for r in rows}
        found[what] = {m: (of[m, "ours"], of.get((m, "peft"))) for m, who in of if who == "ours"}
    order = sorted(found["kept"], key=lambda m: (found["kept"][m][0], found["peak"][m][0]), reverse=True)
    titles = {"kept": "kept for backward beyond x", "peak": "most allocated during forward + backward"}
    for axes, what in zip(panels, found, strict=True):
        dots(axes, order, found[what], titles[what])
        axes.set_xlabel("multiples of x")
    return figure, found


def scaling_law() -> Drawn:
    """Overhead over the frozen layer as M, r and the width grow: measured points, and the fitted law."""
    import scaling

    rows = report.rows("cpu/scaling.csv")
    lines = {
        ("lora", "ours"): (OURS, "o"), ("lora", "peft"): (PEER, "D"), ("lora", "addmm"): (OTHER, "+"),
        ("dora", "ours"): (FIFTH, "x"),
    }  # fmt: skip
    figure, panels = subplots(1, 3, (9, 3.4), sharey=True)
    found = {}
    swept = {"tokens M": "M", "rank r": "r", "width K = N": "K"}
    for axes, (label, field) in zip(panels, swept.items(), strict=True):
        for (method, who), (colour, marker) in lines.items():
            fit = scaling.fit(rows, method, who, "forward + backward")
            along = [(s, ratio) for s, ratio in fit.points if scaling.along(s, scaling.BASE, field)]
            points = sorted((getattr(s, field), ratio) for s, ratio in along)
            name = f"{method}, {'HF PEFT' if who == 'peft' else who}"
            hollow = {"fillstyle": "none"} if marker == "D" else {}
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=name, **hollow)
            low, high = points[0][0], points[-1][0]
            xs = [low * (high / low) ** (i / 40) for i in range(41)]
            ys = [fit.ratio(scaling.moved(scaling.BASE, field, x)) for x in xs]
            axes.plot(xs, ys, color=colour, linewidth=1)
            found[f"{method} {who} {field}"] = points, [round(y, 6) for y in ys]
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks(ticks := [x for x, _ in points], [str(x) for x in ticks], minor=False)
        axes.minorticks_off()
        axes.axhline(1, color=FLOOR, linewidth=1.5)
    panels[0].set_ylabel("forward + backward / frozen layer")
    panels[0].legend(fontsize=8)
    return figure, found


def roofline() -> Drawn:
    """GFLOP/s of what the formula asks for against its arithmetic intensity, below what the machine can do at best."""
    import scaling

    ceiling = next(r for r in report.rows("cpu/ceiling.csv") if r["dtype"] == "fp32")
    rate, width = (float(ceiling[k]) for k in ("gflops_per_second_p50", "gb_per_second_p50"))
    measured = report.rows("cpu/scaling.csv")
    floors = scaling.floors(measured, "forward + backward")
    rows = [r for r in measured if r["step"] == "forward + backward" and r["method"] == "lora"]
    figure, (axes,) = subplots(1, 1, (6, 4))
    found: dict = {"ceiling": (rate, width)}
    shown = {"frozen": (FLOOR, "s"), "ours": (OURS, "o"), "peft": (PEER, "^"), "addmm": (OTHER, "v")}
    for who, (colour, marker) in shown.items():
        points = []
        for r in rows:
            if r["contender"] == who:
                shape = scaling.shape_of(r)
                flops, bytes_moved = needed(shape, who != "frozen")
                ms = floors[shape] * float(r["ratio_p50"])
                points.append((flops / bytes_moved, 1e-6 * flops / ms))
        found[who] = points
        label = {"peft": "LoRA, HF PEFT", "frozen": "frozen layer"}.get(who, f"LoRA, {who}")
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, markersize=5)
    highest = max(x for who in shown for x, _ in found[who])
    xs = [0.4 * rate / width, rate / width, highest * 1.2]
    axes.plot(xs, [min(rate, width * x) for x in xs], color=TEXT, linewidth=1.5)
    axes.text(xs[1], 1.02 * rate, f"a large product, {rate:.0f} GFLOP/s; a copy, {width:.0f} GB/s", fontsize=8)
    axes.set(xscale="log", ylim=(0, 1.12 * rate), xlabel="FLOP a byte that has to be moved", ylabel="GFLOP/s, fp32")
    axes.legend(fontsize=8, loc="lower right")
    return figure, found


def needed(s: Shape, low_rank: bool) -> tuple[int, int]:
    """FLOPs of forward + backward, and bytes in fp32 where every operand and result is moved once a direction."""
    flops = 4 * s.M * s.K * s.N + low_rank * 6 * s.M * s.r * (s.K + s.N)
    elements = 2 * (s.M * (s.K + s.N) + s.K * s.N) + low_rank * (s.M * s.K + 3 * s.r * (s.K + s.N))
    return flops, 4 * elements


def demo(folder: Path) -> Drawn:
    """What ``demo.py`` wrote there: accuracy against what trains, a label a point; of a few their losses too."""
    rows, steps = tables.read(folder / "results.csv"), tables.read(folder / "losses.csv")
    points = {r["method"]: (float(r["accuracy_percent"]), float(r["per_mille"])) for r in rows}
    few, curves = len(points) <= 6, {}
    figure, panels = subplots(1, 2, (9, 4)) if few else subplots(1, 1, (9, 6.5))
    right = panels[-1]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(points)}
    if few:
        for name in points:
            losses = (float(s[name]) for s in steps)
            curves[name] = list(accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss))
            dashes = "--" if name == "peft_lora" else "-"  # it coincides with ours
            panels[0].plot(curves[name], dashes, color=colours[name], label=name, linewidth=1.5)
        panels[0].set(xlabel="step", ylabel="training loss, smoothed", ylim=(0, None))
        panels[0].legend()
    ranked = sorted(points.items(), key=lambda item: (item[1][0], -item[1][1]))
    low, high = ranked[0][1][0], max(ranked[-1][1][0], ranked[0][1][0] + 1)
    for i, (name, (accuracy, share)) in enumerate(ranked):  # labels in a column of their own, in order
        height = low + (high - low) * i / max(len(ranked) - 1, 1)
        peer = {"fillstyle": "none", "markersize": 11} if name == "peft_lora" else {}
        right.plot(share, accuracy, "o", color=colours[name], **peer)
        right.plot((share, 100), (accuracy, height), color=colours[name], linewidth=0.4)
        right.text(110, height, name, va="center", color=colours[name], fontsize=9, clip_on=False)
    right.set_xscale("symlog", linthresh=0.1, linscale=0.3)
    right.set(xlim=(-0.02, 100), ylabel="test accuracy, %", xlabel="trainable parameters without the head, per mille")
    right.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    return figure, {"curves": curves, "points": points}


FIGURES: dict[str, Callable[[], Drawn]] = {
    "steps": steps, "speed": speed, "memory": memory, "scaling": scaling_law, "roofline": roofline,
    "losses": lambda: demo(report.RESULTS / "demo"), "accuracy": lambda: demo(report.RESULTS / "demo_all"),
}  # fmt: skip


def digest(numbers: dict) -> str:
    text = json.dumps(numbers, sort_keys=True, default=lambda v: v.item())
    return hashlib.sha256(text.encode()).hexdigest()


def draw(figure: Callable[[], Drawn], *files: Path) -> None:
    """The figure as .svg or .png files, the digest of its numbers in their description."""
    with mpl.rc_context(STYLE):
        drawn, numbers = figure()
        for file in files:
            metadata = {"Description": f"numbers {digest(numbers)}"} | ({"Date": None} if file.suffix == ".svg" else {})
            drawn.savefig(file, dpi=150, metadata=metadata)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        draw(figure, DOCS / f"{name}.svg")


if __name__ == "__main__":
    main()
