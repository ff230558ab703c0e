"""Proof and timing of the kernels on one NVIDIA GPU, within a budget; partial results are on disk at any time.

    bench/h200.sh [SECONDS]
    python bench/h200.py [--seconds 540] [--out out/h200] [--dry-run] [--only correctness,gemm,speed,tune]

correctness.csv  every case, dtype and shape with the Triton backend forced: against the paper formula in fp64 (fp32,
                 small shapes), and against the expression in fp64 on the same rounded inputs, beside plain PyTorch's
                 error; two runs bitwise equal; the dropout mask; CUDA graph replay; compute-sanitizer
proven.json      {architecture: hash of csrc/} if nothing of the CUDA backend failed: csrc/proven.json
gemm.csv         bench/gemm.py's: the GEMM itself against cuBLAS
speed.csv        forward, backward and both against the frozen layer of the same round: Triton, cuBLAS, csrc/, eager,
                 HF PEFT with fp32 adapters (its default, and ours) and with bf16 ones (peft_half)
measured.json    {key: forward + backward's time as a multiple of the fastest backend's after it in the order csrc/,
                 Triton, cuBLAS, eager}, of Triton, and under "cuda ..." and "cublas ...": kernels/measured.json
tuning.csv, tuned.json   bench/tune.py's

Exit status 1 if a correctness row failed. Without a GPU, or with --dry-run: tiny shapes in Triton's interpreter on the
CPU, and rows whose gpu is "interpreter".
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import correctness
import gemm
import torch
import triton
import tune
from baselines import TIMED, config, has_peer, linear_for, peft_layer
from baselines import Shape as Layer
from clock import quantile
from correctness import DTYPES, ready, shaken
from timing import DEVICE, GPU, GRACE, INTERPRETING, Step, Table, captured, copies_of, each, interleaved, pool
from torch import Tensor, nn

import fused_peft as fp
from fused_peft.backends import extension
from fused_peft.backends.kernel_modules import configs, launch
from fused_peft.core import dispatch, operands
from fused_peft.core.dispatch import backends

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"correctness": 0.35, "gemm": 0.05, "speed": 0.4, "tune": 0.2}
SPEED = "method contender step M K N r dtype graph ms_p20 ms_p50 ms_p80 ratio_p20 ratio_p50 ratio_p80 peak_mb"
SPEED += " gpu driver torch triton commit"
RANKLESS = ("ia3", "ssb", "svdiff")
STEPS = ("forward", "backward", "both")
CONTENDERS = ("frozen", "triton", "cublas", "cuda", "eager", "peft", "peft_half")
FUSED = ("triton", "cublas", "cuda", "eager")
ROWS = (65, 1) if INTERPRETING else (8192, 1024, 128, 16, 1)
LAYERS = ((72, 64),) if INTERPRETING else tune.LAYERS
RANKS = (8,) if INTERPRETING else (16, 64, 8, 256)
# on the GPU all but those that dora, ssb and the frozen layer stand for; in the interpreter one of each kind
METHODS = [m for m in TIMED if m not in ("dora+dropout", "ssl", "bitfit")]
METHODS = ["lora", "lora+dropout", "dora", "ssb", "liera"] if INTERPRETING else METHODS
DTYPE = "fp16" if INTERPRETING else "bf16"
GRAPHED = 128  # up to so many rows the host is the limit, and a CUDA graph is timed too


def _any_factors(W: Tensor, new, *_) -> tuple[Tensor, Tensor, Tensor]:
    """In place of an SVD that takes longer than everything that is timed: factors of its shapes."""
    k = min(W.shape)
    U, S, Vh = (torch.randn(*shape, device=W.device) / k**0.5 for shape in ((W.shape[0], k), (k,), (k, W.shape[1])))
    return U, S, Vh


def build(contender: str, method: str, linear: nn.Linear, r: int) -> nn.Module:
    if contender == "frozen":
        return linear
    if not contender.startswith("peft"):
        with patch("fused_peft.methods.svd.decomposed", _any_factors):
            return shaken(fp.PeftLinear.from_linear(linear, config(method, r)))
    return shaken(peft_layer(method, linear, r, autocast_adapter_dtype=contender == "peft"))


def steps(layers: list[nn.Module], xs: list[Tensor], dys: list[Tensor]) -> dict[str, Step]:
    """{name: step}, each on the inputs and the layer that its number selects."""
    n = len(layers)
    wanted = [[x, *(p for p in layer.parameters() if p.requires_grad)] for layer, x in zip(layers, xs, strict=True)]
    ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    gradients = lambda y, i, **keep: torch.autograd.grad(y, wanted[i], dys[i], **keep)  # noqa: E731
    return {
        "forward": lambda i: layers[i % n](xs[i % n]),
        "backward": lambda i: gradients(ys[i % n], i % n, retain_graph=True),
        "both": lambda i: gradients(layers[i % n](xs[i % n]), i % n),
    }


def enter(contender: str) -> None:
    fp.set_backend(contender if contender in FUSED else None)


def prepare(method: str, layer: Layer) -> None:
    """Compile what a job's contenders launch of Triton's, into the cache that all processes share."""
    for backend in ("triton", "cuda") if cuda_takes(method, layer) else ("triton",):
        with suppress(Exception):  # told by the job itself
            compile_for(backend, method, layer)


def compile_for(backend: str, method: str, layer: Layer) -> None:
    with dispatch.forcing(backend):
        model = build(backend, method, linear_for(layer, DTYPES[DTYPE], DEVICE), layer.r)
        x, dy = (torch.randn(layer.M, n, device=DEVICE, dtype=DTYPES[DTYPE]) for n in (layer.K, layer.N))
        steps([model], [x.requires_grad_()], [dy])["both"](0)


def jobs_timed() -> list[tuple[str, Layer]]:
    """(method, layer), the main table first: ranks other than the first come last."""
    found = [
        (method, Layer(M, K, N, r))
        for r in RANKS
        for group in (LAYERS[:2], LAYERS[2:])
        for M in ROWS
        for K, N in group
        for method in METHODS
        if r == RANKS[0] or method not in RANKLESS
    ]
    return sorted(found, key=lambda job: job[1].r != RANKS[0] and (job[0], job[1].r) != ("parallel_adapter", 64))


def why(what: str, layer: Layer, e: Exception) -> str:
    """A line on what is left out; one line for all shapes of a peer's."""
    shape = "" if "peft" in what else f" {layer}"
    return f"speed: {what}{shape}: {type(e).__name__}: {e}".splitlines()[0][:200]


def cuda_takes(method: str, layer: Layer) -> bool:
    """Whether the CUDA backend computes the layer's call."""
    with dispatch.forcing("eager"):
        model = fp.PeftLinear(layer.K, layer.N, config=config(method, layer.r), dtype=DTYPES[DTYPE], device="meta")
        if model.forms_weight(layer.M):
            return False
        x, device = torch.empty(layer.M, layer.K, dtype=DTYPES[DTYPE], device="meta"), torch.device(DEVICE)
        problem = operands.foreseen(model.factors(), x, model.weight, model.bias, None, True, device)
    with dispatch.forcing("cuda"):
        return not (backends()["cuda"].available() or backends()["cuda"].reasons(problem))


def contenders(method: str, layer: Layer, linears, xs, dys, left: list[str]) -> tuple[dict, dict]:
    """{contender: its layers} of those that run, and {contender: MB that one forward + backward adds}."""
    models, peak = {}, {}
    for name in CONTENDERS:
        if name.startswith("peft") and not has_peer(method):
            continue
        if name == "cuda" and not cuda_takes(method, layer):
            continue
        try:
            enter(name)
            models[name] = [build(name, method, linear, layer.r) for linear in linears]
            both = steps(models[name][:1], xs[:1], dys[:1])["both"]
            both(0)
            if not INTERPRETING:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                both(0)
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as e:
            models.pop(name, None)
            left.append(why(f"{name} {method}", layer, e))
    return models, peak


def timed(method: str, layer: Layer, left: list[str]) -> list[tuple[str, str, dict, dict]]:
    """(step, graph, {contender: seconds of every round}, peak) of one job."""
    dtype = DTYPES[DTYPE]
    copies = copies_of((layer.M * (layer.K + layer.N) + layer.K * layer.N) * dtype.itemsize)
    draw = lambda n: [torch.randn(layer.M, n, device=DEVICE, dtype=dtype) for _ in range(copies)]  # noqa: E731
    linears = [linear_for(layer, dtype, DEVICE) for _ in range(copies)]
    xs, dys = [x.requires_grad_() for x in draw(layer.K)], draw(layer.N)
    models, peak = contenders(method, layer, linears, xs, dys, left)
    runs = {}
    for name in models:
        enter(name)
        runs[name] = steps(models[name], xs, dys)
    found = [(s, "no", interleaved({c: run[s] for c, run in runs.items()}, enter), peak) for s in STEPS]
    if INTERPRETING or layer.M > GRAPHED:
        return found
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = {}
        for name in models:
            try:
                enter(name)
                own = steps(models[name], xs, dys)
                own["both"](0)
                graphs[name] = {step: captured(run, copies) for step, run in own.items()}
            except Exception as e:
                left.append(why(f"graph of {name} {method}", layer, e))
        for step in STEPS if "frozen" in graphs else ():
            seconds = interleaved({c: graph[step] for c, graph in graphs.items()})
            found.append((step, "yes", {c: [s / copies for s in of] for c, of in seconds.items()}, peak))
    return found


def measured_key(method: str, layer: Layer, what: str = "") -> str | None:
    """The key that backends/triton.py, or with "cuda " backends/cuda.py, looks up for the job's calls; None where the
    method makes none."""
    enter("frozen")
    model = fp.PeftLinear(layer.K, layer.N, config=config(method, layer.r), dtype=DTYPES[DTYPE], device="meta")
    if model.forms_weight(layer.M):
        return None
    f, arch = model.factors(), launch.arch_of(torch.device(DEVICE, 0))
    kind = "hadamard" if f.hadamard else "low rank" if f.rank else "scales"
    key = configs.key(what + kind, arch, 8 * DTYPES[DTYPE].itemsize, layer.M, layer.N, layer.K, f.rank)
    return f"{'interpreter ' if INTERPRETING else ''}{key}"


def speed(table: Table, workers, deadline: float, measured: Path) -> list[str]:
    """Every row of the timing; what was left out."""
    left, jobs, facts, ratios = [], jobs_timed(), environment(), {}
    for at, (method, layer) in enumerate(jobs):
        if time.time() >= deadline:
            left.append(f"speed: {len(jobs) - at} of {len(jobs)} jobs, from {method} {layer} on")
            break
        if workers and at % 20 == 0:
            list(each(workers, prepare, jobs[at : at + 20], min(deadline, time.time() + 45)))
        try:
            found = timed(method, layer, left)
        except Exception as e:
            left.append(why(method, layer, e))
            continue
        for step, graph, times, peak in found:
            for name, seconds in times.items():
                relative = [s / f for s, f in zip(seconds, times["frozen"], strict=True)]
                spread = {f"ms_p{q}": 1e3 * quantile(seconds, q / 100) for q in (20, 50, 80)}
                spread |= {f"ratio_p{q}": quantile(relative, q / 100) for q in (20, 50, 80)}
                about = {"method": method, "contender": name, "step": step, "M": layer.M, "K": layer.K, "N": layer.N}
                about |= {"r": 0 if method in RANKLESS else layer.r, "dtype": DTYPE, "graph": graph}
                table.add(**about, **spread, peak_mb=peak.get(name), **facts)
            if step == "both" and graph == "no" and {"triton", "eager"} <= times.keys():
                compare(method, layer, times, ratios)
                known = {key: round(statistics.median(of), 3) for key, of in ratios.items()}
                measured.write_text(json.dumps(known, indent=1) + "\n")
    return left


def compare(method: str, layer: Layer, times: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    """Add what the dispatcher will look up: the time of each backend over that of the fastest after it."""
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))  # noqa: E731
    order = [name for name in ("cuda", "triton", "cublas", "eager") if name in times]
    for at, name in enumerate(order[:-1]):
        if key := measured_key(method, layer, "" if name == "triton" else f"{name} "):
            ratios.setdefault(key, []).append(max(ratio(name, later) for later in order[at + 1 :]))


def environment() -> dict[str, str]:
    """The columns that say where a figure comes from."""
    answer = lambda *command: subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: E731
    commit = answer("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") if shutil.which("git") else ""
    if not commit:
        commit = (ROOT / "COMMIT").read_text().strip() if (ROOT / "COMMIT").is_file() else "unknown"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = "" if INTERPRETING else answer(*query).split("\n")[0]
    return {"gpu": GPU, "driver": driver, "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def show(rows: list[dict]) -> None:
    """The main table: forward and forward + backward as multiples of the frozen layer's."""
    print(f"\nM = {ROWS[0]}, r = {RANKS[0]}, {DTYPE}, {GPU}; forward / forward + backward, frozen layer = 1")
    print(f"{'method':<17} {'K x N':<13}" + "".join(f"{c:>19}" for c in CONTENDERS[1:]))
    main = [r for r in rows if r["M"] == ROWS[0] and r["r"] in (0, RANKS[0]) and r["graph"] == "no"]
    at = {(r["method"], r["K"], r["N"], r["contender"], r["step"]): f"{r['ratio_p50']:.3f}" for r in main}
    for method, K, N in dict.fromkeys((r["method"], r["K"], r["N"]) for r in main):
        cells = (" / ".join(at.get((method, K, N, c, s), "-") for s in ("forward", "both")) for c in CONTENDERS[1:])
        print(f"{method:<17} {f'{K} x {N}':<13}" + "".join(f"{cell:>19}" for cell in cells))


def main() -> int:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--out", type=Path, default=ROOT / "out/h200")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--only", default=",".join(SHARES), help="stages, comma-separated")
    args = parser.parse_args()
    stages = [stage for stage in SHARES if stage in args.only.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    end, left, proof, pace = begin + args.seconds - (0 if INTERPRETING else 2 * GRACE), [], None, None
    fp.set_strict(True)
    try:
        extension.library(INTERPRETING)  # once, before workers need it
        print(f"{time.time() - begin:5.0f} s  csrc/ is built", flush=True)
    except extension.BuildError as e:
        left.append(str(e))
    with pool(ready) or nullcontext() as workers:
        for i, stage in enumerate(stages):
            part = SHARES[stage] / sum(SHARES[s] for s in stages[i:])
            deadline = time.time() + part * (end - time.time())
            print(f"{time.time() - begin:5.0f} s  {stage}, until {deadline - begin:.0f} s", flush=True)
            if stage == "correctness":
                proof = Table(args.out / "correctness.csv", correctness.COLUMNS)
                left += correctness.prove(proof, workers, deadline)
                missing = correctness.unproven(proof.rows)
                print(
                    f"csrc/ is proven: {'no, ' + missing[0] if missing else 'yes'} ({len(missing)} missing)", flush=True
                )
                if not missing:
                    record = {"sm_{}{}".format(*launch.arch_of(torch.device(DEVICE, 0))): extension.fingerprint()}
                    (args.out / extension.PROVEN).write_text(json.dumps(record) + "\n")
            elif stage == "gemm":
                left += gemm.measure(Table(args.out / "gemm.csv", gemm.COLUMNS), deadline, environment())
            elif stage == "speed":
                pace = Table(args.out / "speed.csv", SPEED)
                left += speed(pace, workers, deadline, args.out / "measured.json")
            else:
                left += tune.sweep(deadline - time.time(), args.out / "tuned.json", workers=workers)
    for what, n in list(Counter(left).items())[-60:]:
        print("left out:", what, f"({n} times)" if n > 1 else "")
    if pace is not None:
        show(pace.rows)
    failed = [row for row in proof.rows if row["ok"] == "false"] if proof else []
    for row in failed[:20]:
        print("FAILED", *(f"{k}={v}" for k, v in row.items() if v not in (None, "")))
    if proof:
        print(f"\ncorrectness: {dict(Counter(row['ok'] for row in proof.rows))}; {time.time() - begin:.0f} s in all")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
