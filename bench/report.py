"""Rewrites the README's tables from the committed results: `make report`.

A table stands between `<!-- name -->` and `<!-- /name -->`; nothing between the marks is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import tables

from fused_peft.__main__ import method_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"


def rows(name: str) -> list[dict[str, str]]:
    return tables.read(RESULTS / name)


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_layers() -> str:
    """One line a method, one column a shape and dtype: forward + backward as a ratio to the frozen layer, HF PEFT's
    behind it."""
    measured = [r for r in rows("cpu/layers.csv") if r["step"] == "forward + backward"]
    columns = list(dict.fromkeys((r["shape"], r["dtype"]) for r in measured))
    by = {(r["shape"], r["dtype"], r["method"], r["contender"]): f"{float(r['ratio_p50']):.2f}" for r in measured}

    def cell(method, column):
        mine, peer = (by.get((*column, method, who)) for who in ("ours", "peft"))
        return (mine or "") + (f" ({peer})" if peer else "")

    header = ["forward + backward", *(f"{shape} {dtype}" for shape, dtype in columns)]
    return markdown(header, [[m, *(cell(m, c) for c in columns)] for m in dict.fromkeys(r["method"] for r in measured)])


def overhead() -> str:
    found = {r["case"]: r["microseconds_or_ratio"] for r in rows("cpu/overhead.csv")}
    shown = [k for k in found if k.startswith(("F.linear", "fused", "PeftLinear", "HF PEFT")) and "/ F.linear" not in k]
    body = [[k, found[k]] for k in shown]
    body += [[k, found[k]] for k in found if "/ F.linear" in k]
    return markdown(["one call, one thread", "µs (last two: ratio)"], body)


def demo() -> str:
    found = rows("demo/results.csv")
    return markdown(list(found[0]), [list(r.values()) for r in found])


def demo_all() -> str:
    found = rows("demo_all/results.csv")
    return markdown(list(found[0]), [list(r.values()) for r in found])


def saved_bytes() -> str:
    found = rows("cpu/saved_bytes.csv")
    return markdown(["kept for backward beyond x", "ours", "HF PEFT"], [list(r.values()) for r in found])


def estimate() -> str:
    found = rows("estimate.csv")
    header = ["GiB", "frozen", "trained", "kept: x", "kept beyond x", "total", "HF PEFT: kept", "HF PEFT: total"]
    return markdown(header, [[f"{r['model']} {r['method']}", *list(r.values())[2:]] for r in found])


def accelerated() -> str:
    found = rows("cpu/accelerated.csv")
    header = ["training steps per second", "HF PEFT", "accelerated", "time, accelerated / HF PEFT"]
    columns = ("stock_per_second_p50", "accelerated_per_second_p50", "time_ratio_p50")
    return markdown(header, [[f"{r['model']} {r['method']}", *(r[c] for c in columns)] for r in found])


def gpu() -> str:
    """Predicted ratios at 8192 tokens, K = 4096, r = 16, and the measured ones beside them where there are any."""
    chosen = {"M": "8192", "K": "4096"}
    predicted = [r for r in rows("roofline.csv") if all(r[n] == v for n, v in chosen.items()) and r["r"] in ("16", "")]
    predicted = [r for r in predicted if r["N"] in ("4096", "14336")]
    file = RESULTS / "h200/speed.csv"
    measured = [r for r in rows("h200/speed.csv") if all(r[n] == v for n, v in chosen.items())] if file.exists() else []
    steps = {"forward": "forward", "both": "forward + backward"}
    real = {(r["method"], r["contender"], steps.get(r["step"]), r["N"]): r["ratio_p50"] for r in measured
            if r["r"] in ("16", "") and r["graph"] == "no"}  # fmt: skip

    def cell(row: dict[str, str]) -> str:
        others = ", ".join(row[who] or "–" for who in ("eager", "peft"))
        key = row["method"].replace("_drop", "+drop"), "triton", row["step"], row["N"]
        return f"{row['ours']} ({others}) | {real.get(key, 'not measured yet')}"

    columns = list(product(("4096", "14336"), ("forward", "forward + backward")))
    by = {(r["method"], r["N"], r["step"]): r for r in predicted}
    header = ["predicted: ours (eager, HF PEFT)"]
    header += [f"N = {N}, {step.replace('forward + backward', 'f + b')} | measured" for N, step in columns]
    body = [[m, *(cell(by[(m, *c)]) for c in columns)] for m in dict.fromkeys(r["method"] for r in predicted)]
    return markdown([cell for part in header for cell in part.split(" | ")], body)


def mpc() -> str:
    found = rows("cpu/mpc.csv")
    return markdown([*list(found[0])[:2], "% of the model"], [list(r.values())[:3] for r in found])


def methods() -> str:
    table = method_table()
    body = [[f"`{r['method']}`", f"`{r['config']}`", r["form"], r["mergeable"], r["trainable"]] for r in table]
    return markdown(["method", "config", "form", "mergeable", "trainable, 768 x 768, r = 8"], body)


TABLES: dict[str, Callable[[], str]] = {
    "accelerated": accelerated,
    "cpu-layers": cpu_layers,
    "overhead": overhead,
    "demo": demo,
    "demo-all": demo_all,
    "estimate": estimate,
    "gpu": gpu,
    "methods": methods,
    "mpc": mpc,
    "saved-bytes": saved_bytes,
}


def render(readme: str) -> str:
    """The README with every marked table made anew; ValueError for a mark without a table."""

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"README marks a table {name!r}, known: {', '.join(TABLES)}")
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", fill, readme, flags=re.S)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))


if __name__ == "__main__":
    main()
