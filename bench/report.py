"""Rewrites the tables of docs/ from the committed results: `make report`.

A table stands between `<!-- name -->` and `<!-- /name -->`; nothing between the marks is written by hand.
"""

from __future__ import annotations

import re
from collections import defaultdict
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


def first() -> str:
    """What is trained most: time over the frozen layer, and memory."""
    chosen = "lora", "lora+dropout", "dora", "dora+dropout", "adalora", "ia3", "delora", "liera", "ssb", "ssl"
    measured = rows("cpu/layers.csv")
    shape = measured[0]["shape"]
    by = {(r["method"], r["contender"]): f"{float(r['ratio_p50']):.2f}" for r in measured
          if (r["shape"], r["dtype"], r["step"]) == (shape, "fp32", "forward + backward")}  # fmt: skip
    kept = {(r["method"], r["contender"]): f"{int(r['kept_bytes']) / int(r['x_bytes']):.2f}"
            for r in rows("cpu/memory.csv")}  # fmt: skip
    body = [[m, *(found.get((m, who), "") for found in (by, kept) for who in ("ours", "peft"))] for m in chosen]
    return markdown(["method", "ours / frozen", "HF PEFT / frozen", "kept for backward: ours", "HF PEFT"], body)


def behind() -> str:
    """Where another contender takes at least 3 % less time than ours, forward + backward."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    cases = [("{shape} {dtype}".format(**r), r) for r in rows("cpu/layers.csv")]
    cases += [("{M}x{K}x{N} r={r} fp32".format(**r), r) for r in rows("cpu/scaling.csv")]
    for case, r in cases:
        if r["step"] == "forward + backward":
            times.setdefault((r["method"], case), {})[r["contender"]] = float(r["ratio_p50"])
    found = defaultdict(list)
    for (method, case), ratios in times.items():
        for who in LABELS.keys() & ratios.keys():
            if (more := ratios["ours"] / ratios[who]) > 1.03:
                found[method, who].append(f"{case}: {more:.2f}")
    body = [[method, LABELS[who], "; ".join(each)] for (method, who), each in sorted(found.items())]
    return markdown(["method", "against", "ours / it"], body)


def overhead() -> str:
    found = {r["case"]: float(r["us_p50"]) for r in rows("cpu/overhead.csv")}
    kinds = ("forward", "forward + backward")
    lines = {name: [f"{found[f'{name} {kind}']:.2f}" for kind in kinds] for name in
             ("F.linear", "fused", "PeftLinear layer", "HF PEFT layer")}  # fmt: skip
    lines["overhead of fused"] = [f"{found[f'fused {kind}: overhead']:.2f}" for kind in kinds]
    lines["overhead / F.linear (ratio)"] = [
        f"{found[f'fused {kind}: overhead'] / found[f'F.linear {kind}']:.2f}" for kind in kinds
    ]
    return markdown(["µs a call, one thread", *kinds], [[name, *cells] for name, cells in lines.items()])


def wrap() -> str:
    found = {r["contender"]: r for r in rows("cpu/wrap.csv")}
    body = [[name, f"{float(found[who]['seconds_p50']):.3f}", found[who]["mb"]] for who, name in NAMES.items()
            if who in found]  # fmt: skip
    return markdown(["get_peft_model", "seconds", "MB of host memory"], body)


def checkpoint() -> str:
    found = {r["step"]: r for r in rows("cpu/checkpoint.csv")}
    body = [[step, *(found[f"{s}{step}"]["ms_p50"] for s in ("", "safetensors ")), found[step]["ratio_p50"]]
            for step in ("save", "load")]  # fmt: skip
    return markdown(["LoRA adapter of Llama-3-8B", "ours, ms", "safetensors, ms", "ratio"], body)


def init() -> str:
    header = [
        "r = 16 of 4096 × 4096",
        "ms",
        "full decomposition, ms",
        "largest angle, rad",
        "singular values differ by",
    ]
    columns = ("weight", "ms_p50", "full_ms", "angle", "values_differ")
    return markdown(header, [[r[c] for c in columns] for r in rows("cpu/init.csv")])


LABELS = {
    "peft": "HF PEFT", "written": "the formula written out", "compiled": "that under torch.compile",
    "addmm": "F.linear and addmm", "formed": "the weight formed in each call",
}  # fmt: skip
NAMES = {"ours": "ours", "peft": "HF PEFT"}


def as_written(name: str) -> Callable[[], str]:
    """The file's own lines and columns."""

    def table() -> str:
        found = rows(name)
        return markdown(list(found[0]), [list(r.values()) for r in found])

    return table


def memory() -> str:
    found = rows("cpu/memory.csv")
    by = {(r["method"], r["contender"]): r for r in found}
    who = ("ours", "peft", "written")

    def cells(method: str, what: str) -> list[str]:
        chosen = [by.get((method, w)) for w in who]
        return [f"{int(r[what]) / int(r['x_bytes']):.2f}" if r else "" for r in chosen]

    labels = "ours", "HF PEFT", "written out"
    header = ["multiples of x", *(f"kept: {w}" for w in labels), *(f"peak: {w}" for w in labels)]
    methods = list(dict.fromkeys(r["method"] for r in found))
    floor = by[methods[0], "frozen"]
    kept, peak = (f"{int(floor[what]) / int(floor['x_bytes']):.2f}" for what in ("kept_bytes", "peak_bytes"))
    lines = [["frozen layer", kept, "", "", peak, "", ""]]
    return markdown(header, lines + [[m, *cells(m, "kept_bytes"), *cells(m, "peak_bytes")] for m in methods])


def estimate() -> str:
    found = rows("estimate.csv")
    header = ["GiB", "frozen", "trained", "kept: x", "kept beyond x", "total", "HF PEFT: kept", "HF PEFT: total"]
    return markdown(header, [[f"{r['model']} {r['method']}", *list(r.values())[2:]] for r in found])


def training() -> str:
    found = {(r["model"], r["method"], r["contender"]): r for r in rows("cpu/training.csv")}
    cell = lambda row, column: row[column] if row else ""  # noqa: E731
    header = ["tokens per second", "floor", "HF PEFT", "accelerated", "ours"]
    header += ["time: accelerated / HF PEFT", "time: ours / HF PEFT"]
    body = []
    for model, method in dict.fromkeys(key[:2] for key in found):
        of = {who: found.get((model, method, who)) for who in ("frozen", "peft", "accelerated", "ours")}
        rates = [f"{float(r['tokens_per_second_p50']):,.0f}" if r else "" for r in of.values()]
        against = [cell(of[who], "vs_peft_p50") for who in ("accelerated", "ours")]
        body.append([f"{model} {method}", *rates, *against])
    return markdown(header, body)


def gpu() -> str:
    """Predicted ratios for an H200 at 8192 tokens, K = 4096, r = 16."""
    chosen = {"M": "8192", "K": "4096"}
    predicted = [r for r in rows("roofline.csv") if all(r[n] == v for n, v in chosen.items()) and r["r"] in ("16", "")]
    predicted = [r for r in predicted if r["N"] in ("4096", "14336")]
    columns = list(product(("4096", "14336"), ("forward", "forward + backward")))
    by = {(r["method"], r["N"], r["step"]): r for r in predicted}
    cell = lambda r: f"{r['ours']} ({', '.join(r[who] or '–' for who in ('eager', 'peft'))})"  # noqa: E731
    header = ["predicted: ours (eager, HF PEFT)", *(f"N = {N}, {step}" for N, step in columns)]
    body = [[m, *(cell(by[(m, *c)]) for c in columns)] for m in dict.fromkeys(r["method"] for r in predicted)]
    return markdown(header, body)


CONTENDERS = {
    "gluon": "Gluon", "cuda": "csrc/", "triton": "Triton", "cublas": "cuBLAS", "eager": "eager",
    "peft_half": "HF PEFT, bf16", "peft": "HF PEFT",
}  # fmt: skip


def gpu_graph() -> str:
    """Measured on a GPU, in CUDA graphs: each contender over the frozen layer in the same rounds."""
    measured = [r for r in rows("gpu/speed.csv") if r["graph"] == "yes" and r["ratio_p50"]]
    by = {(r["method"], r["M"], r["step"], r["contender"]): f"{float(r['ratio_p50']):.2f}" for r in measured}
    cases = dict.fromkeys((r["method"], r["M"]) for r in measured)
    steps = {"forward": "forward", "both": "forward + backward"}
    body = [
        [f"{method}, {M} rows, {name}", *(by.get((method, M, step, who), "–") for who in CONTENDERS)]
        for method, M in cases for step, name in steps.items()
    ]  # fmt: skip
    return markdown(["over the frozen layer", *CONTENDERS.values()], body)


PARTS = {
    "GEMM": "gemm_gluon|gemm_lowrank_tma|gemm_cuda|nvjet", "S, dT": "down|back|finish",
    "sums over rows": "outer|add_up", "scale": "scale", "norm": "row_norm|cutlass_80_simt",
}  # fmt: skip


def gpu_launches() -> str:
    """Measured on a GPU: its microseconds in the kernels of forward and backward, newest commit of each contender."""
    found: dict[tuple[str, str], dict[str, list[tuple[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in rows("gpu/launches.csv"):
        if r["M"] == "8192" and not r["note"]:
            found[r["method"], r["contender"]][r["commit"]].append((r["kernel"], float(r["us"])))
    body, frozen = [], {}
    for (method, who), commits in found.items():
        kernels = list(commits.values())[-1]
        total = sum(us for _, us in kernels)
        frozen[method] = total if who == "frozen" else frozen[method]
        part = {name: sum(us for k, us in kernels if re.search(of, k)) for name, of in PARTS.items()}
        part["other"] = total - sum(part.values())
        apart = who not in ("peft", "peft_half")  # their kernels are not of these parts
        cells = [f"{us:.0f}" if apart and us >= 0.5 else "–" for us in part.values()]
        name = f"{method}, {CONTENDERS.get(who, who)}"
        body.append([name, *cells, f"{total:.0f}", f"{total / frozen[method]:.2f}"])
    return markdown(["µs, forward + backward", *PARTS, "other", "all", "/ frozen"], body)


def gpu_gemm() -> str:
    """Measured on a GPU: the GEMM alone and with a rank-16 update, over cuBLAS's alone."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for r in rows("gpu/gemm.csv"):
        found[r["M"], r["K"], r["N"]][r["contender"]] = r
    who = ("gluon", "cuda", "triton")
    header = ["M x K x N", "cuBLAS, TFLOP/s", *(f"{CONTENDERS[w]}{u}" for w in who for u in (" alone", " + update"))]
    body = []
    for sizes, of in found.items():
        ratios = [f"{float(of[w + u]['ratio_p50']):.3f}" for w in who for u in ("", "+update")]
        body.append([" x ".join(sizes), f"{float(of['cublas']['tflops']):.0f}", *ratios])
    return markdown(header, body)


def choices() -> str:
    """What is chosen where nothing was measured: predicted, forward + backward, the GPU's time or the host's; eager's
    and HF PEFT's beside it."""
    found = {(r["method"], r["M"]): r for r in rows("choices.csv")}
    shown = ("1", "1024", "2048", "4096", "8192", "32768")
    cell = lambda r: f"{r['choice']} {r['chosen_waited']} ({r['eager_waited']}, {r['peft_waited'] or '–'})"  # noqa: E731
    body = [[m, *(cell(found[m, M]) for M in shown)] for m in dict.fromkeys(m for m, _ in found)]
    return markdown(["predicted: chosen (eager, HF PEFT)", *(f"M = {M}" for M in shown)], body)


def experts() -> str:
    """LoRA on experts, predicted: ours on both of its ways, HF PEFT's; what it keeps, the formed weights."""
    names = {"triton": "ours, Triton", "grouped_mm": "ours, grouped product", "peft": "HF PEFT"}
    header = ["predicted", "frozen, ms", *names.values(), "chosen: gate and up, down", "HF PEFT keeps, GiB"]
    body = []
    for r in rows("experts_predicted.csv"):
        model = f"{r['model']}, {r['top_k']} of {r['experts']} experts"
        chosen = r["choice"].replace(" ", ", ")
        body.append([model, r["frozen_ms"], *(r[who] for who in names), chosen, r["peft_keeps_gib"]])
    return markdown(header, body)


def cpu_experts() -> str:
    """A layer of experts with LoRA, forward + backward over the frozen one, and bytes kept over the frozen layer's."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for r in rows("cpu/experts.csv"):
        found[r["experts"], r["width"], r["dtype"]][r["contender"]] = r
    who = {"ours": "ours", "accelerated": "PEFT accelerated", "peft": "HF PEFT"}
    header = ["forward + backward / frozen", *who.values(), *(f"kept: {name}" for name in who.values())]
    body = []
    for (experts, width, dtype), of in found.items():
        kept = [f"{int(of[w]['kept_bytes']) / int(of['frozen']['kept_bytes']):.2f}" for w in who]
        body.append([f"{experts} x {width}, {dtype}", *(f"{float(of[w]['ratio_p50']):.2f}" for w in who), *kept])
    return markdown(header, body)


def cpu_batch() -> str:
    """Mixed batches over the frozen layer, HF PEFT's in brackets."""
    by = {(r["tokens"], r["adapters"], r["dtype"], r["step"], r["contender"]): f"{float(r['ratio_p50']):.2f}"
          for r in rows("cpu/batch.csv")}  # fmt: skip
    columns = list(dict.fromkeys(key[2:4] for key in by))

    def cell(case: tuple[str, str], column: tuple[str, str]) -> str:
        mine, peer = (by.get((*case, *column, who)) for who in ("ours", "peft"))
        return f"{mine} ({peer})" if mine else ""

    header = ["16 samples, 1024 to 1024, r = 16", *(f"{step}, {dtype}" for dtype, step in columns)]
    cases = dict.fromkeys(key[:2] for key in by)
    return markdown(
        header,
        [
            [f"{t} token{'s' * (t != '1')} each, {a} adapter{'s' * (a != '1')}", *(cell((t, a), c) for c in columns)]
            for t, a in cases
        ],
    )


def cpu_accelerate() -> str:
    """PEFT's layers over the frozen one, stock and accelerated; bytes kept over x's."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for r in rows("cpu/accelerate.csv"):
        found[r["method"]][r["contender"]] = r
    who = ("accelerated", "peft")
    header = ["forward + backward", "accelerated / HF PEFT", "accelerated / frozen", "HF PEFT / frozen"]
    header += ["kept / x: accelerated", "kept / x: HF PEFT"]
    body = []
    for method, of in found.items():
        times = [f"{float(of[w]['ratio_p50']):.2f}" for w in who]
        kept = [f"{int(of[w]['kept_bytes']) / int(of[w]['x_bytes']):.2f}" for w in who]
        body.append([method, f"{float(of['accelerated']['vs_peft_p50']):.2f}", *times, *kept])
    return markdown(header, body)


def cpu_quantised() -> str:
    """Layers of bitsandbytes: ours over HF PEFT's and the frozen layer; what is kept over the dense layer's."""
    found: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for r in rows("cpu/quantised.csv"):
        key = f"{r['format']}, {r['method']}", f"{r['tokens']} x {r['K']} x {r['N']}, {r['dtype']}"
        found[key][r["contender"]] = r
    body = []
    for (what, where), of in found.items():
        kept = int(of["ours"]["kept_bytes"]) / int(of["ours on a dense layer"]["kept_bytes"])
        peer = of["ours"]["vs_peft_p50"]
        cells = [f"{float(peer):.2f}" if peer else "–", f"{float(of['ours']['ratio_p50']):.2f}"]
        body.append([what, where, *cells, f"{kept:.3f}"])
    return markdown(["", "", "over HF PEFT", "over the frozen layer", "bytes kept, over a dense layer's"], body)


def gpu_quantised() -> str:
    """Predicted: a decode, and a LoRA step with two of them over one on a dense weight."""
    found: dict[tuple, dict[str, str]] = defaultdict(dict)
    for r in rows("packed_predicted.csv"):
        case = found[r["format"], f"{r['K']} to {r['N']}"]
        case["decode"], case[f"{r['M']} rows"] = r["decode_us"], f"{float(r['ratio']):.2f}"
    columns = [c for c in next(iter(found.values())) if c != "decode"]
    body = [[*case, of["decode"], *(of[c] for c in columns)] for case, of in found.items()]
    return markdown(["", "", "one decode, µs", *columns], body)


def host() -> str:
    """Host time on a stand-in for the CUDA driver, forward + backward."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for r in rows("cpu/host.csv"):
        found[r["method"]][r["contender"]].append(f"{float(r['us_p50']):.0f}")
    shown = {
        "frozen": "frozen layer",
        "ours": "ours",
        "accelerated": "PEFT accelerated",
        "peft": "HF PEFT",
        "python": "ours, not replayed",
    }
    cell = lambda each: " + ".join(each) if each else "–"  # noqa: E731
    body = [[m, *(cell(found[m][who]) for who in shown)] for m in found]
    return markdown(["µs, forward + backward", *shown.values()], body)


def mpc() -> str:
    body = [[r["step"], r["ms_p50"], r["percent_of_the_model_p50"]] for r in rows("cpu/mpc.csv")]
    return markdown(["forward + backward", "milliseconds", "% of the model"], body)


def law() -> str:
    """The fitted overheads."""
    import scaling

    measured, body = rows("cpu/scaling.csv"), []
    for method, who in dict.fromkeys((r["method"], r["contender"]) for r in measured):
        if who in NAMES:
            fit = scaling.fit(measured, method, who, "forward + backward")
            c = fit.overhead.coefficients
            units = {"call": 1e3, "passes": 1e9, "skinny": 1e9, "weight": 1e9, "weight rank": 1e9}  # ms: µs, ps
            cells = [f"{units[name] * c[name]:.3g}" for name in units]
            body.append([f"{method}, {NAMES[who]}", *cells, f"{100 * fit.error:.0f}"])
    c = fit.frozen.coefficients
    product = f"{1e3 * c['call']:.3g} and {1e9 * c['product']:.3g} per M·K·N"
    body.insert(0, ["frozen layer", product, "", "", f"{1e9 * c['weight']:.3g}", "", f"{100 * fit.frozen_error:.0f}"])
    header = ["forward + backward", "call, µs", "ps per M(K + N)", "per M·r(K + N)", "per N·K", "per N·K·r"]
    return markdown([*header, "error, %"], body)


def crossovers() -> str:
    import scaling

    return markdown(["choice", "step", "crossover"], [list(row) for row in scaling.crossovers(rows("cpu/scaling.csv"))])


def methods() -> str:
    own = {r["method"]: r for r in rows("cpu/memory.csv") if r["contender"] == "ours"}
    kept = {m: f"{int(r['kept_bytes']) / int(r['x_bytes']):.2f}" for m, r in own.items()}
    measured = rows("cpu/layers.csv")
    same = measured[0]["shape"], "fp32", "forward + backward", "ours"
    times = {r["method"]: f"{float(r['ratio_p50']):.2f}" for r in measured
             if (r["shape"], r["dtype"], r["step"], r["contender"]) == same}  # fmt: skip
    body = []
    for r in method_table():
        stored = " ".join(f"`{key}`" for key in r["stored"].split())
        shown = f"`{r['method']}`", f"`{r['config']}`", r["form"], r["mergeable"], r["trainable"]
        body.append([*shown, kept[r["method"]], times[r["method"]], stored])
    header = ["method", "config", "form", "mergeable", "trainable", "kept / x", "time / frozen", "tensors in a file"]
    return markdown(header, body)


TABLES: dict[str, Callable[[], str]] = {
    "behind": behind,
    "checkpoint": checkpoint,
    "choices": choices,
    "cpu-accelerate": cpu_accelerate,
    "cpu-batch": cpu_batch,
    "cpu-experts": cpu_experts,
    "cpu-layers": cpu_layers,
    "cpu-quantised": cpu_quantised,
    "crossovers": crossovers,
    "demo": as_written("demo/results.csv"),
    "demo-all": as_written("demo_all/results.csv"),
    "estimate": estimate,
    "experts": experts,
    "first": first,
    "gpu": gpu,
    "gpu-gemm": gpu_gemm,
    "gpu-graph": gpu_graph,
    "gpu-launches": gpu_launches,
    "gpu-quantised": gpu_quantised,
    "host": host,
    "init": init,
    "law": law,
    "memory": memory,
    "methods": methods,
    "mpc": mpc,
    "overhead": overhead,
    "qlora": as_written("qlora/results.csv"),
    "training": training,
    "wrap": wrap,
}


def pages() -> list[Path]:
    """The Markdown files that tables may stand in."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with every marked table made anew; ValueError for a mark without a table."""

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"a page marks a table {name!r}, known: {', '.join(TABLES)}")
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.S)


def main() -> None:
    for page in pages():
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
