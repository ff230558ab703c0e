"""Proof and timing of the kernels on one NVIDIA GPU, an H100 or an H200, in three stages of a few minutes.

    bench/gpu.sh 1|2|3 [SECONDS]
    python bench/gpu.py --stage N [--seconds S] [--out out/gpu] [--dry-run]

stage 1, 150 s   correctness.csv  every plan of csrc/, then every case, dtype and shape (bench/correctness.py)
                 speed.csv        forward, backward and both of the five layers that matter, against the frozen layer
                                  of the same round: Triton, cuBLAS, csrc/, eager, HF PEFT with fp32 adapters (its
                                  default, and ours) and with bf16 ones (peft_half); in a CUDA graph too
                 gemm.csv         the GEMM itself against cuBLAS (bench/gemm.py)
stage 2, 240 s   the record (JSON, for kernels/records) of Llama-3-8B's four shapes: every backend's self-test and time
                 (fused_peft.calibrate)
stage 3, 240 s   training.csv     steps of a BERT of MiniLM's size and of a small Llama, by HF PEFT and accelerated:
                                  tokens per second, peak memory, the step in a CUDA graph
                 sanitizer.csv    compute-sanitizer's memcheck on csrc/'s kernel alone

Every case runs in a process of its own, with a time-out: a crash or a hang costs that case, which is told, and no more.
Rows are on disk as soon as they are made. Rows with graph = no include the host's time, those with graph = yes do not.
Exit status 1 if a row of correctness or of the sanitizer failed. Without a GPU, or with --dry-run: tiny shapes in
Triton's interpreter on the CPU, and rows whose gpu is "interpreter".
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import correctness
import gemm
import tables
import torch
import triton
from baselines import Shape as Layer
from baselines import config, has_peer, linear_for, peft_layer
from clock import quantile
from correctness import DTYPES, shaken
from timing import DEVICE, GPU, INTERPRETING, Step, Table, captured, copies_of, interleaved
from torch import Tensor, nn

import fused_peft as fp
from fused_peft.backends import extension
from fused_peft.core import dispatch, operands
from fused_peft.core.dispatch import backends
from fused_peft.tools import calibrate
from fused_peft.tools.isolated import Failure, Pool

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {1: 150.0, 2: 240.0, 3: 240.0}  # of a stage
EACH = 60.0 if not INTERPRETING else 300.0  # of a case
FACTS = "gpu driver torch triton commit"
SPEED = "method contender step M K N r dtype graph ms_p20 ms_p50 ms_p80 ratio_p20 ratio_p50 ratio_p80 peak_mb " + FACTS
TRAINING = "model method contender graph tokens ms_p20 ms_p50 ms_p80 tokens_per_second ratio_p50 peak_mb note " + FACTS
SANITIZER = "case backend tensor ok note " + FACTS
STEPS = ("forward", "backward", "both")
CONTENDERS = ("frozen", "triton", "cublas", "cuda", "eager", "peft", "peft_half")
FUSED = ("triton", "cublas", "cuda", "eager")
METHODS = ("lora", "lora+dropout", "dora", "ssb")
RANKLESS = ("ssb",)
DTYPE = "fp16" if INTERPRETING else "bf16"
LARGE, SMALL = (Layer(8192, 4096, 4096, 16), Layer(2048, 4096, 4096, 16))
if INTERPRETING:
    LARGE, SMALL = Layer(65, 72, 64, 8), Layer(64, 72, 64, 8)
TIMINGS = [*((method, LARGE) for method in METHODS), ("lora", SMALL)]
LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)) if not INTERPRETING else ((72, 64),)
ROWS = (256, 1024, 2048, 4096, 8192, 16384) if not INTERPRETING else (65,)
TRAINED = {"lora": {}, "lora+dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}


def build(contender: str, method: str, linear: nn.Linear, r: int) -> nn.Module:
    if contender == "frozen":
        return linear
    if not contender.startswith("peft"):
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


def why(what: str, layer: Layer, e: Exception) -> str:
    """A line on what is left out; one line for all shapes of a peer's."""
    shape = "" if "peft" in what else f" {layer}"
    return f"{what}{shape}: {type(e).__name__}: {e}".splitlines()[0][:200]


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
    if INTERPRETING:
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


def speed_rows(method: str, layer: Layer) -> tuple[list[dict], list[str]]:
    """The rows of one layer, and what was left out."""
    left, rows = [], []
    for step, graph, times, peak in timed(method, layer, left):
        for name, seconds in times.items():
            relative = [s / f for s, f in zip(seconds, times["frozen"], strict=True)]
            spread = {f"ms_p{q}": 1e3 * quantile(seconds, q / 100) for q in (20, 50, 80)}
            spread |= {f"ratio_p{q}": quantile(relative, q / 100) for q in (20, 50, 80)}
            about = {"method": method, "contender": name, "step": step, "M": layer.M, "K": layer.K, "N": layer.N}
            about |= {"r": 0 if method in RANKLESS else layer.r, "dtype": DTYPE, "graph": graph}
            rows.append({**about, **spread, "peak_mb": peak.get(name)})
    return rows, left


@cache
def environment() -> dict[str, str]:
    """The columns that say where a figure comes from."""
    answer = lambda *command: subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: E731
    commit = answer("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") if shutil.which("git") else ""
    if not commit:
        commit = (ROOT / "COMMIT").read_text().strip() if (ROOT / "COMMIT").is_file() else "unknown"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = "" if INTERPRETING else answer(*query).split("\n")[0]
    return {"gpu": GPU, "driver": driver, "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def tabled(table: Table, pool: Pool, function: str, jobs: list[tuple], deadline: float, workers: int = 1) -> list[str]:
    """The rows of ``function(*job) -> (rows, what was left)`` into the table as they come; what was left."""
    left, done = [], set()
    for number, answer in pool.run(function, jobs, EACH, deadline, workers):
        done.add(number)
        rows, also = ([], [f"{_named(jobs[number])}: {answer.why}"]) if isinstance(answer, Failure) else answer
        left += also
        for row in rows:
            table.add(**row, **environment())
    return left + [f"{_named(job)}, for want of time" for i, job in enumerate(jobs) if i not in done]


def _named(job: tuple) -> str:
    return " ".join(map(str, job))


def first(out: Path, pool: Pool, begin: float, seconds: float) -> list[str]:
    try:
        extension.library(INTERPRETING)  # once, before processes need it
        print(f"{time.time() - begin:5.0f} s  csrc/ is built", flush=True)
    except extension.BuildError as e:
        print(f"csrc/ is left out: {e}")
    proof, jobs, left = Table(out / "correctness.csv", correctness.COLUMNS), correctness.jobs(), []
    untold = set(range(len(jobs)))
    for number, rows in pool.run("correctness:check", jobs, EACH, begin + 0.6 * seconds):
        untold.discard(number)
        if isinstance(rows, Failure):
            case, backend, dtype, shape = jobs[number]
            said = "false" if rows.fatal else "skipped"
            rows = [{"case": case, "backend": backend, "dtype": dtype, "shape": shape, "ok": said, "note": rows.why}]
        for row in rows:
            proof.add(**{"gpu": GPU, **row})
    left += [f"correctness of {jobs[i][1]} on {jobs[i][3] or jobs[i][0]}" for i in untold]
    print(f"{time.time() - begin:5.0f} s  correctness: {dict(Counter(row['ok'] for row in proof.rows))}", flush=True)
    left += tabled(Table(out / "speed.csv", SPEED), pool, "gpu:speed_rows", TIMINGS, begin + 0.95 * seconds)
    print(f"{time.time() - begin:5.0f} s  timed", flush=True)
    return left + tabled(Table(out / "gemm.csv", gemm.COLUMNS), pool, "gemm:rows", gemm.SHAPES, begin + seconds)


def second(out: Path, pool: Pool, begin: float, seconds: float) -> list[str]:
    layers = nn.ModuleList(
        fp.PeftLinear(K, N, bias=False, config=config(method, LARGE.r), dtype=DTYPES[DTYPE], device=DEVICE)
        for method in METHODS for K, N in LLAMA_3_8B
    )  # fmt: skip
    found = calibrate.calibrate(layers, ROWS, seconds - (time.time() - begin), folder=out)
    print(f"{found}\nrecord: {found.file}")
    return [f"calibration: {what}" for what in found.left]


def third(out: Path, pool: Pool, begin: float, seconds: float) -> list[str]:
    jobs = [(of, method) for of in ("MiniLM", "small Llama") for method in TRAINED]
    left = tabled(Table(out / "training.csv", TRAINING), pool, "gpu:training_rows", jobs, begin + 0.7 * seconds)
    print(f"{time.time() - begin:5.0f} s  trained", flush=True)
    watched = Table(out / "sanitizer.csv", SANITIZER)
    watched.add(**correctness.sanitize("cuda", "memcheck", max(10.0, begin + seconds - time.time())), **environment())
    return left


def model_of(of: str) -> tuple[nn.Module, Tensor, list[str]]:
    """The model with random weights, token ids (batch, length), and the names of what is adapted."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    tiny = {"num_hidden_layers": 1, "vocab_size": 64} if INTERPRETING else {}
    if of == "MiniLM":
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        model = BertForSequenceClassification(BertConfig(**{**sizes, **tiny}))
        batch, targets = (2, 8) if INTERPRETING else (128, 128), ["query", "key", "value", "dense"]
    else:
        sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 4096}
        sizes |= {"vocab_size": 4096, "use_cache": False}
        if INTERPRETING:
            sizes |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **tiny}))
        batch = (2, 8) if INTERPRETING else (8, 1024)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dtype = torch.float32 if INTERPRETING else torch.bfloat16
    return model.to(DEVICE, dtype), torch.randint(0, 64, batch, device=DEVICE), targets


def training_rows(of: str, method: str) -> tuple[list[dict], list[str]]:
    """Steps by HF PEFT and accelerated in turn: forward, backward and AdamW; the rows, and what was left out."""
    import peft

    torch.manual_seed(0)
    base, ids, targets = model_of(of)
    found = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=targets, **TRAINED[method]))
    models = {"peft": found, "accelerated": fp.accelerate(copy.deepcopy(found))}
    runs, graphs, peak, left = {}, {}, {}, []
    for name, model in models.items():
        model.train()
        runs[name] = stepper(of, model, ids)
        runs[name](0)
        if not INTERPRETING:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            runs[name](1)
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() / 2**20
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for i in range(3):
                        runs[name](i)
                    graphs[name] = captured(runs[name], 1)
            except Exception as e:
                left.append(f"graph of {name} {of} {method}: {type(e).__name__}: {e}".splitlines()[0][:200])
    rows = []
    for graph, steps in (("no", runs), ("yes", graphs)):
        times = interleaved(steps, seconds=4.0) if steps else {}
        for name, seconds in times.items():
            spread = {f"ms_p{q}": 1e3 * quantile(seconds, q / 100) for q in (20, 50, 80)}
            ratio = [s / p for s, p in zip(seconds, times["peft"], strict=True)] if "peft" in times else []
            rows.append(
                {
                    "model": of, "method": method, "contender": name, "graph": graph, "tokens": ids.numel(), **spread,
                    "tokens_per_second": ids.numel() / quantile(seconds, 0.5),
                    "ratio_p50": quantile(ratio, 0.5) if ratio else "", "peak_mb": peak.get(name, ""),
                }
            )  # fmt: skip
    return rows, left


def stepper(of: str, model: nn.Module, ids: Tensor) -> Step:
    """A training step that a CUDA graph can hold."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-4, capturable=not INTERPRETING)
    labels = ids if of != "MiniLM" else torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    return step


RUN = {1: first, 2: second, 3: third}


def main() -> int:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=RUN, required=True)
    parser.add_argument("--seconds", type=float, help="150 for stage 1, 240 for the others")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(*(f"{name} {value};" for name, value in environment().items()), flush=True)
    with Pool(1 if INTERPRETING else max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        left = RUN[args.stage](args.out, pool, begin, args.seconds or SECONDS[args.stage])
    for what, n in list(Counter(left).items())[:60]:
        print("left out:", what, f"({n} times)" if n > 1 else "")
    failed = []
    for file in ("correctness.csv", "sanitizer.csv") if args.stage != 2 else ():
        if (args.out / file).exists():
            failed += [row for row in tables.read(args.out / file) if row["ok"] == "false"]
    for row in failed[:20]:
        print("FAILED", *(f"{k}={v}" for k, v in row.items() if v))
    print(f"{time.time() - begin:.0f} s in all")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
