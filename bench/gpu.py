"""Proof and timing of the kernels on one NVIDIA GPU, an H100 or an H200, in three stages of a few minutes.

    bench/gpu.sh 1|2|3 [SECONDS]
    python bench/gpu.py --stage N [--seconds S] [--out out/gpu] [--without-csrc] [--dry-run]

stage 1, 150 s   correctness.csv  the calls that are timed, every plan of csrc/, then every case, dtype and shape
                                  (bench/correctness.py)
                 speed.csv        forward, backward and both of the five layers that matter, beside the frozen layer in
                                  the same rounds: Triton, cuBLAS, csrc/, eager, HF PEFT with fp32 adapters (its
                                  default, and ours) and with bf16 ones (peft_half); then the same in a CUDA graph
                 launches.csv     the GPU's time in each kernel of a step of them, as PyTorch's profiler has it
                 gemm.csv         the GEMM itself beside cuBLAS's (bench/gemm.py)
stage 2, 240 s   the record (JSON, for kernels/records) of Llama-3-8B's four shapes: every backend's self-test and time
                 (fused_peft.calibrate)
stage 3, 240 s   checks.csv       losses and gradients of the accelerated models against HF PEFT's; compute-sanitizer's
                                  memcheck on csrc/'s kernel alone
                 experts.csv      a layer of Transformers' experts with LoRA on both stacks (bench/bench_experts.py),
                                  forward + backward over the frozen layer: Triton, eager, HF PEFT
                 training.csv     steps of a BERT of MiniLM's size and of the small Llama of examples/causal_lm.py, HF
                                  PEFT's and the same accelerated: tokens per second, peak memory; then in a CUDA graph

Every case runs in a process of its own, with a time-out: one that crashes or hangs is a row with a note, and costs no
other. Rows are on disk as soon as they are made. Rows with graph = no include the host's time where that is more than
the GPU's, as it is on few rows; those with graph = yes do not. Exit status 1 if a row of correctness.csv or checks.csv
is wrong. Without a GPU, or with --dry-run: tiny shapes in Triton's interpreter on the CPU, and rows whose gpu is
"interpreter".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import correctness
import gemm
import torch
from baselines import Shape as Layer
from baselines import config, has_peer, linear_for, peft_layer
from correctness import DTYPES, ready, shaken
from timing import (
    CPU_OR_GPU,
    DEVICE,
    FACTS,
    INTERPRETING,
    ROOT,
    Step,
    Table,
    captured,
    cases,
    copies_of,
    facts,
    interleaved,
    spread,
)
from torch import Tensor, nn

import fused_peft as fp
from fused_peft.core import dispatch, operands
from fused_peft.tools import calibrate, isolated
from fused_peft.tools.isolated import Failure, Pool

SECONDS = {1: 150.0, 2: 240.0, 3: 240.0}  # of a stage
EACH = 300.0 if INTERPRETING else 60.0  # of a case
BUILD = 600.0 if INTERPRETING else 90.0  # of compiling csrc/
GRACE = 10.0  # that a stage keeps for what has begun by its deadline
SPREADS = "ms_p20 ms_p50 ms_p80 ratio_p20 ratio_p50 ratio_p80 peak_mb note " + FACTS
SPEED = "method contender M K N r dtype graph step " + SPREADS
LAUNCHES = "method contender M K N r dtype kernel calls us note " + FACTS
TRAINING = "model method contender graph tokens tokens_per_second_p20 tokens_per_second_p50 tokens_per_second_p80 "
TRAINING += SPREADS
EXPERTS = "experts hidden width tokens top r dtype contender " + SPREADS
MOES = ((128, 2048, 768, 4096, 8), (8, 4096, 14336, 4096, 2))  # of Qwen3-30B-A3B, of Mixtral 8x7B
STEPS = ("forward", "backward", "both")
FUSED = (*correctness.BACKENDS, "eager")
CONTENDERS = ("frozen", *FUSED, "peft", "peft_half")
GRAPHS = ("no",) if INTERPRETING else ("no", "yes")
DTYPE = "fp16" if INTERPRETING else "bf16"
METHODS = ("lora", "lora+dropout", "dora", "ssb")
LARGE, SMALL = Layer(8192, 4096, 4096, 16), Layer(2048, 4096, 4096, 16)
LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # K, N
ROWS = (8192, 2048, 1024, 4096, 16384, 256)  # what matters most first
if INTERPRETING:
    MOES = ((4, 16, 8, 8, 2),)
    LARGE, SMALL, LLAMA_3_8B, ROWS = Layer(72, 72, 64, 8), Layer(64, 72, 64, 8), ((72, 64),), (64,)
TIMINGS = [*((method, LARGE) for method in METHODS), ("lora", SMALL)]
MODELS = ("MiniLM", "small Llama")
TRAINED = {"lora": {}, "lora+dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}
OFF = 1e-4 if INTERPRETING else 2e-2  # by so much a loss or a norm of gradients may differ; models are in bf16 on a GPU
CLOSE = 2e-2  # by so much may a layer's result in half precision


def enter(contender: str) -> None:
    fp.set_backend(contender if contender in FUSED else None)


def awake() -> None:
    """That a process has imported all this."""


# Stage 1


def first(pool: Pool, out: Path, deadline: float) -> tuple[list[str], Table | None]:
    begin, seconds = time.time(), deadline - time.time()
    proof = Table(out / "correctness.csv", correctness.COLUMNS)
    told = lambda jobs, share, of="check": cases(  # noqa: E731
        proof, pool, f"correctness:{of}", jobs, EACH, begin + share * seconds
    )
    own, early = exact_jobs(), correctness.first()
    of_cuda = lambda jobs: [job for job in jobs if job[0]["backend"] == "cuda"]  # noqa: E731
    others = lambda jobs: [job for job in jobs if job[0]["backend"] != "cuda"]  # noqa: E731
    with ThreadPoolExecutor(1) as beside:
        building = beside.submit(built, deadline)
        left = told(others(own), 0.4, "exact") + told(others(early), 0.4)
        there = building.result()
    if there:
        left += told(of_cuda(early), 0.5) + told(of_cuda(own), 0.55, "exact")
    late = [job for job in correctness.rest() if there or job[0]["backend"] != "cuda"]
    left += told(late, 0.55)
    print(f"{time.time() - begin:5.0f} s  tested: {dict(Counter(row['ok'] for row in proof.rows))}", flush=True)
    wrong = {(r["case"], r["shape"], r["backend"]) for r in proof.rows if r["ok"] == "false"}
    speed, jobs = Table(out / "speed.csv", SPEED), []
    for about in timings():
        if (about["method"], named(about), about["contender"]) in wrong:
            speed.add(**about, note="its self-test failed")
        elif there or about["contender"] != "cuda":
            jobs.append((about,))
    left += cases(speed, pool, "gpu:timed", jobs, EACH, begin + 0.9 * seconds, workers=1)
    launches = Table(out / "launches.csv", LAUNCHES)
    jobs = [({n: v for n, v in about.items() if n != "graph"},) for (about,) in jobs if about["graph"] == "no"]
    left += cases(launches, pool, "gpu:launched", jobs, EACH, begin + 0.95 * seconds, workers=1)
    print(f"{time.time() - begin:5.0f} s  timed", flush=True)
    table = Table(out / "gemm.csv", gemm.COLUMNS)
    jobs = [job for job in gemm.jobs() if there or "cuda" not in job[0]["contender"]]
    return left + cases(table, pool, "gemm:rows", jobs, EACH, deadline, workers=1), proof


def built(deadline: float) -> bool:
    """Whether csrc/ compiles, which it does once for all processes; says why not."""
    if "--without-csrc" in sys.argv:  # it compiles for a minute
        print("csrc/ is left out, as asked")
        return False
    answers = dict(isolated.run("correctness:build", [()], BUILD, deadline))
    why = answers.get(0, Failure("out of time"))
    if why is not None:
        print(f"csrc/ is left out: {why.why}", flush=True)
    return why is None


def named(about: dict) -> str:
    return "{M}x{K}x{N} r={r}".format(**about)


def timings() -> list[dict]:
    """The columns that name each timing; CUDA graphs last."""
    return [
        {
            "method": method, "contender": contender, "M": at.M, "K": at.K, "N": at.N,
            "r": 0 if method == "ssb" else at.r, "dtype": DTYPE, "graph": graph,
        }
        for graph in GRAPHS for method, at in TIMINGS for contender in CONTENDERS
        if has_peer(method) or not contender.startswith("peft")
    ]  # fmt: skip


def exact_jobs() -> list[tuple[dict, operands.Problem]]:
    """The jobs of ``correctness.exact`` for every call that is timed; their kernels are compiled on the way."""
    jobs = []
    for about in timings():
        if about["graph"] == "no" and about["contender"] in correctness.BACKENDS:
            case = {"case": about["method"], "backend": about["contender"], "dtype": DTYPE, "shape": named(about)}
            jobs.append((case, problem_of(about)))
    return [job for job in jobs if job[0]["case"] == "lora"] if INTERPRETING else jobs


def problem_of(about: dict) -> operands.Problem:
    """The call that the layer makes."""
    M, K, N, dtype = about["M"], about["K"], about["N"], DTYPES[DTYPE]
    with dispatch.forcing("eager"):
        model = fp.PeftLinear(K, N, config=config(about["method"], LARGE.r), dtype=dtype, device="meta")
        x = torch.empty(M, K, dtype=dtype, device="meta")
        return operands.foreseen(model.factors(), x, model.weight, model.bias, None, True, CPU_OR_GPU)


def build(contender: str, method: str, linear: nn.Linear) -> nn.Module:
    if contender == "frozen":
        return linear
    if not contender.startswith("peft"):
        return shaken(fp.PeftLinear.from_linear(linear, config(method, LARGE.r)))
    return shaken(peft_layer(method, linear, LARGE.r, autocast_adapter_dtype=contender == "peft"))


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


def drawn(about: dict) -> tuple[list[nn.Linear], list[Tensor], list[Tensor]]:
    """Frozen layers, inputs and gradients, as many of each as exceed the cache."""
    M, K, N, dtype = about["M"], about["K"], about["N"], DTYPES[DTYPE]
    copies = copies_of((M * (K + N) + K * N) * dtype.itemsize)
    draw = lambda n: [torch.randn(M, n, device=DEVICE, dtype=dtype) for _ in range(copies)]  # noqa: E731
    linears = [linear_for(Layer(M, K, N, LARGE.r), dtype, DEVICE) for _ in range(copies)]
    return linears, [x.requires_grad_() for x in draw(K)], draw(N)


def launched(about: dict) -> list[dict]:
    """A row a kernel of forward and backward: how often it runs in a step, and for how long."""
    ready()
    linears, xs, dys = drawn(about)
    enter(about["contender"])
    run = steps([build(about["contender"], about["method"], linear) for linear in linears], xs, dys)["both"]
    for i in range(4):
        run(i)
    if INTERPRETING:
        return [{"kernel": "none on a CPU"}]
    torch.cuda.synchronize()
    rounds = 2 * len(xs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(rounds):
            run(i)
        torch.cuda.synchronize()
    found = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    return [{"kernel": e.key[:100], "calls": e.count / rounds, "us": e.self_device_time_total / rounds} for e in found]


def timed(about: dict) -> list[dict]:
    """The rows of one contender, beside the frozen layer in the same rounds."""
    ready()
    contender, (linears, xs, dys) = about["contender"], drawn(about)
    runs, graph, copies = {}, about["graph"] == "yes", len(xs)
    with stream_for(graph):
        for name in dict.fromkeys(("frozen", contender)):
            enter(name)
            runs[name] = steps([build(name, about["method"], linear) for linear in linears], xs, dys)
        peak = None if INTERPRETING else peak_of(runs[contender]["both"]) - torch.cuda.memory_allocated() / 2**20
        for name, own in runs.items() if graph else ():
            enter(name)
            runs[name] = {step: graph_of(run, copies) for step, run in own.items()}
        found = {step: interleaved({name: own[step] for name, own in runs.items()}, enter) for step in STEPS}
    rows = []
    for step, times in found.items():
        ratio = [s / f for s, f in zip(times[contender], times["frozen"], strict=True)]
        ms = [1e3 * s / (copies if graph else 1) for s in times[contender]]
        rows.append({"step": step, **spread("ms", ms), **spread("ratio", ratio), "peak_mb": peak})
    return rows


@contextmanager
def stream_for(graph: bool) -> Iterator[None]:
    """For a CUDA graph a stream of its own, on which all of its work must run from the start."""
    if not graph:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def peak_of(step: Step) -> float:
    """MB that are allocated at most in a step's second call."""
    step(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(1)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def graph_of(step: Step, copies: int) -> Step:
    """The step, once warm, as a CUDA graph."""
    for i in range(3):
        step(i)
    return captured(step, copies)


# Stage 2


def second(pool: Pool, out: Path, deadline: float) -> tuple[list[str], Table | None]:
    built(deadline)
    layers = nn.ModuleList(
        fp.PeftLinear(K, N, bias=False, config=config(method, LARGE.r), dtype=DTYPES[DTYPE], device=DEVICE)
        for method in METHODS for K, N in LLAMA_3_8B
    )  # fmt: skip
    try:
        found = calibrate.calibrate(layers, ROWS, max(10.0, deadline - time.time()), folder=out)
    except RuntimeError as e:
        return [f"calibration: {e}"], None
    print(f"{found}\nrecord: {found.file}")
    return [f"calibration: {what}" for what in found.left], None


# Stage 3


def third(pool: Pool, out: Path, deadline: float) -> tuple[list[str], Table | None]:
    begin, seconds = time.time(), deadline - time.time()
    there = built(deadline)
    checks = Table(out / "checks.csv", correctness.COLUMNS)
    jobs = [({"case": f"{method}, {of}", "backend": "accelerated"}, of, method) for of in MODELS for method in TRAINED]
    left = cases(checks, pool, "gpu:agree", jobs, EACH, begin + 0.3 * seconds)
    wrong = {r["case"] for r in checks.rows if r["ok"] == "false"}
    table, jobs = Table(out / "training.csv", TRAINING), []
    for graph, of, method, who in product(GRAPHS, MODELS, TRAINED, ("peft", "accelerated")):
        about = {"model": of, "method": method, "contender": who, "graph": graph}
        if who == "accelerated" and f"{method}, {of}" in wrong:
            table.add(**about, note="it does not agree with HF PEFT's")
        else:
            jobs.append((about,))
    left += cases(table, pool, "gpu:trained", jobs, EACH, begin + 0.6 * seconds, workers=1)
    names, table = ("experts", "hidden", "width", "tokens", "top"), Table(out / "experts.csv", EXPERTS)
    jobs = [(dict(zip(names, sizes, strict=True)),) for sizes in MOES]
    left += cases(table, pool, "gpu:routed", jobs, EACH, begin + 0.8 * seconds, workers=1)
    print(f"{time.time() - begin:5.0f} s  trained", flush=True)
    if there:
        checks.add(**correctness.sanitize(max(10.0, deadline - time.time())))
    return left, checks


def routed(about: dict) -> list[dict]:
    """A row a contender: one layer of experts, forward and backward, beside the frozen one in the same rounds."""
    import bench_experts

    ready()
    fp.set_backend(None)
    experts, hidden, width, tokens, top = about.values()
    dtype = DTYPES[DTYPE]
    with torch.device(DEVICE):
        made = bench_experts.contenders(experts, hidden, width, dtype)
        x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
        index = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)])
        weights, dy = torch.rand(tokens, top).to(dtype).requires_grad_(), torch.randn_like(x)
    layers = {"frozen": made["frozen"], "triton": made["ours"], "eager": made["ours"], "peft": made["peft"]}
    trained_of = lambda m: [p for p in m.parameters() if p.requires_grad]  # noqa: E731
    runs = {
        name: lambda i, m=m: torch.autograd.grad(m(x, index, weights), [x, weights, *trained_of(m)], dy)
        for name, m in layers.items()
    }
    ys = {}
    for name, layer in layers.items():
        enter(name)
        ys[name] = layer(x, index, weights).detach().float()
    off = {n: ((y - ys["peft"]).norm() / ys["peft"].norm()).item() for n, y in ys.items() if n in FUSED}
    if max(off.values()) > CLOSE:
        raise RuntimeError(f"it does not agree with HF PEFT's: {off}")
    peaks = {}
    for name, run in runs.items():
        enter(name)
        peaks[name] = None if INTERPRETING else peak_of(run) - torch.cuda.memory_allocated() / 2**20
    times = interleaved(runs, enter, seconds=3.0)
    rows = []
    for name, own in times.items():
        ratio = [s / f for s, f in zip(own, times["frozen"], strict=True)]
        row = {"r": bench_experts.RANK, "dtype": DTYPE, "contender": name, "peak_mb": peaks[name]}
        rows.append({**row, **spread("ms", [1e3 * s for s in own]), **spread("ratio", ratio)})
    return rows


def model_of(of: str) -> tuple[nn.Module, Tensor, list[str]]:
    """The model with random weights, token ids (batch, length), and the names of what is adapted."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sys.path.append(str(ROOT / "bench/examples"))
    import causal_lm

    tiny = {"num_hidden_layers": 1} if INTERPRETING else {}
    if of == "MiniLM":
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        model = BertForSequenceClassification(BertConfig(**{**sizes, **tiny}))
        batch, targets = (128, 128), ["query", "key", "value", "dense"]
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**causal_lm.CONFIG.to_dict(), **tiny}))
        batch, targets = (causal_lm.BATCH, causal_lm.BLOCK + 1), causal_lm.TARGETS
    if INTERPRETING:
        batch = (2, 8)
    dtype = torch.float32 if INTERPRETING else torch.bfloat16
    return model.to(DEVICE, dtype), torch.randint(0, 256, batch, device=DEVICE), targets


def adapted(of: str, method: str, contender: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's model, accelerated or not, with the same weights every time, and what it is called with."""
    import peft

    torch.manual_seed(0)
    base, ids, targets = model_of(of)
    model = shaken(peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=targets, **TRAINED[method])))
    labels = ids if of != "MiniLM" else torch.zeros(len(ids), dtype=torch.long, device=DEVICE)
    return fp.accelerate(model) if contender == "accelerated" else model, {"input_ids": ids, "labels": labels}


def agree(about: dict, of: str, method: str) -> list[dict]:
    """The rows of loss and gradients, without dropout, whose masks are each model's own."""
    found = {}
    for who in ("peft", "accelerated"):
        model, asked = adapted(of, method, who)
        model.train()(**asked).loss.backward()  # compiles what training launches
        model.eval().zero_grad()
        loss = model(**asked).loss
        loss.backward()
        grads = [p.grad.float().norm() for p in model.parameters() if p.requires_grad]
        found[who] = {"loss": loss.item(), "gradients": torch.stack(grads).norm().item()}
    rows = []
    for name, exact in found["peft"].items():
        off = abs(found["accelerated"][name] - exact) / abs(exact)
        ok = "true" if off <= OFF else "false"
        rows.append({"tensor": name, "against": "HF PEFT", "error": off, "limit": OFF, "ok": ok})
    return rows


def trained(about: dict) -> list[dict]:
    """The row of one contender's steps, beside HF PEFT's in the same rounds; of a CUDA graph alone, since one that
    cannot be captured may take the other with it."""
    of, method, who, graph = about.values()
    with stream_for(graph == "yes"):
        run, tokens = stepper(*adapted(of, method, who))
        peak, runs = None if INTERPRETING else peak_of(run), {who: run}
        if graph == "yes":
            runs = {who: graph_of(run, 1)}
        elif who != "peft":
            runs["peft"], _ = stepper(*adapted(of, method, "peft"))
        times = interleaved(runs, seconds=1.5)
    ratio = [s / p for s, p in zip(times[who], times["peft"], strict=True)] if "peft" in runs else []
    row = {"tokens": tokens, **spread("ms", [1e3 * s for s in times[who]]), "peak_mb": peak}
    row |= spread("tokens_per_second", [tokens / s for s in times[who]])
    return [row | (spread("ratio", ratio) if ratio else {})]


def stepper(model: nn.Module, asked: dict[str, Tensor]) -> tuple[Step, int]:
    """A training step, forward, backward and AdamW, that a CUDA graph can hold; its number of tokens."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-4, capturable=not INTERPRETING)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        model(**asked).loss.backward()
        optimizer.step()

    return step, asked["input_ids"].numel()


RUN = {1: first, 2: second, 3: third}


def main() -> int:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=RUN, required=True)
    parser.add_argument("--seconds", type=float, help="150 for stage 1, 240 for the others")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu")
    parser.add_argument("--without-csrc", action="store_true", help="leave out the backend cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(*(f"{name} {value};" for name, value in facts().items()), flush=True)
    with Pool(1 if INTERPRETING else max(1, min(14, (os.cpu_count() or 2) - 2))) as pool:
        # what a cold disk takes is not to be taken from one part of a stage alone
        list(pool.run("gpu:awake", [()] * pool.workers, EACH))
        left, rows = RUN[args.stage](pool, args.out, begin + (args.seconds or SECONDS[args.stage]) - GRACE)
    for what in left[:60]:
        print("left out:", what)
    if len(left) > 60:
        print(f"and {len(left) - 60} more")
    failed = [row for row in rows.rows if row["ok"] == "false"] if rows else []
    for row in failed[:20]:
        print("FAILED", *(f"{k}={v}" for k, v in row.items() if v))
    print(f"{time.time() - begin:.0f} s in all")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
