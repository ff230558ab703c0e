"""The proof that bench/gpu.py runs: the calls that it times, csrc/'s plans, then every case, dtype and shape.

A call that is timed is held to the formula as the package's self-test has it, on its very sizes. A case is held to the
paper formula in fp64 (where it runs in fp64 or fp32 on a small shape: half precision rounds what some formulas start
from), and to the expression in fp64 on the same rounded inputs, beside plain PyTorch's error. Two runs must be bitwise
equal. Then the dropout mask, decoded weights, CUDA graph replay and compute-sanitizer. The column ok: "true", "false",
"refused" with the backend's or the config's reason, or "skipped" with the script's.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from baselines import config
from timing import CPU_OR_GPU, DEVICE, FACTS, INTERPRETING, captured
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import oracle
import triton
from cases import CASES, SHAPES, Case, Shape
from fused_peft.kernels import dropout as kernel
from plans import Gemm, clusters

import fused_peft as fp
from fused_peft.backends import extension, replay
from fused_peft.backends.plans import PLANS, Plan
from fused_peft.core import dispatch, ops
from fused_peft.core.dropout import keep_mask, new_seed, threshold
from fused_peft.core.operands import Problem, foreseen
from fused_peft.tools import selftest, stored, verify
from fused_peft.tools.compile_triton import weights

COLUMNS = f"case backend dtype shape tensor against error limit plain ok repeat note {FACTS}"
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("triton", "cublas", "cuda") if INTERPRETING else ("triton", "cublas", "gluon", "cuda")
# rows, columns and ranks that csrc/ takes: no tile is full, then many tiles
WHOLE = ((130, 136, 72, 16), (257, 1024, 1000, 8), (1000, 336, 776, 64), (513, 520, 264, 24), (2048, 1024, 4096, 16))
ODD = ((130, 136, 72), (257, 1024, 1000), (1000, 333, 777))  # M, K, N; TMA can address the first two
PAPER = {"fp64": 1e-6, "fp32": 1e-4}  # scalars reach a kernel in fp32; tf32 or a wrong term is above 1e-4
PAPER_SIZE = 20_000  # entries of a weight whose SVD in fp64 on the CPU costs little
POOLED, SLACK = 1000, 4  # an error pooled over fewer numbers scatters, and may be this multiple of its limit
KINK = 0.1  # gradients through relu in half precision: a number that rounds across the kink moves a row's gradient
SANITIZE = ("--target-processes", "application-only", "--error-exitcode", "9", "--tool", "memcheck")


def ready() -> None:
    """How every process that proves something begins."""
    torch.set_num_threads(1)
    replay.ready()
    fp.set_backend("triton")
    fp.set_strict(True)


def shaken(layer: nn.Module) -> nn.Module:
    """The layer with its trainable tensors moved off their start, where some are zero."""
    for p in layer.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.01)
    return layer


def first() -> list[tuple[dict]]:
    """The jobs of ``check`` that tell most: the dropout mask, decoded weights, a CUDA graph with each backend, csrc/'s
    plans."""
    plans = PLANS[3::13] if INTERPRETING else PLANS
    asked = [(case, "triton", "") for case in ("dropout mask", "decode", "replay")]
    asked += [("CUDA graph", name, "") for name in BACKENDS]
    asked += [(plan.name, "cuda", plan.dtype) for plan in plans]
    return [({"case": case, "backend": backend, "dtype": dtype, "shape": ""},) for case, backend, dtype in asked]


def rest() -> list[tuple[dict]]:
    """The jobs of ``check`` for every case, dtype and shape, what tells most first."""
    whole = [Shape((M,), K, N, r) for M, K, N, r in WHOLE]
    odd = lambda r: [Shape((M,), K, N, r) for M, K, N in ODD]  # noqa: E731
    halves, dtypes = ("bf16", "fp16"), ("bf16", "fp16", "fp32")
    near, far = (SHAPES[0], *odd(16)), (*SHAPES[1:], *(s for r in (5, 64, 130, 1) for s in odd(r)))
    groups = [("triton", near, dtypes), ("gluon", whole, halves), ("cuda", whole, halves), ("cublas", near, dtypes)]
    groups.append(("triton", far, dtypes))
    names = [case.name for case in CASES]
    if INTERPRETING:
        names = [name for name in names if name in ("lora+dropout", "dora+dropout", "ssb")]
        groups = [("triton", SHAPES[1:2], DTYPES), ("cublas", SHAPES[1:2], ("fp16",)), ("cuda", whole[:1], halves)]
    return [
        ({"case": name, "backend": backend, "dtype": dtype, "shape": shape},)
        for backend, shapes, dtypes in groups for shape in shapes for dtype in dtypes for name in names
    ]  # fmt: skip


def check(about: dict) -> list[dict]:
    """The rows of one job, but for the columns ``about``, which name it."""
    name, backend, dtype, shape = about.values()
    ready()
    if INTERPRETING and dtype == "bf16" and shape:
        return [{"ok": "skipped", "note": "Triton's interpreter truncates to bf16 instead of rounding"}]
    try:
        with dispatch.forcing(backend):
            if plan := next((p for p in PLANS if p.name == name), None):
                return planned(plan)
            return EXTRAS[name]() if name in EXTRAS else _compared(_case(name), dtype, shape)
    except (fp.StrictError, _Refused) as e:
        return [{"ok": "refused", "note": str(e).rpartition(f"{backend}: ")[2]}]
    except Exception as e:
        if "CUDA error" in str(e):  # this process is of no more use
            raise
        return [{"ok": "false", "note": f"{type(e).__name__}: {e}"[:500]}]


def exact(about: dict, problem: Problem) -> list[dict]:
    """The row of one call on its very sizes: against the formula, as the package's self-test has it."""
    ready()
    backend = dispatch.backends()[about["backend"]]
    with dispatch.forcing(backend.name):
        if reasons := backend.available() or backend.reasons(problem):
            return [{"ok": "refused", "note": ", ".join(reasons)}]
        wrong = selftest.disagreement(backend, *selftest.draw(problem, CPU_OR_GPU))
    return [{"against": "formula", "ok": _word(not wrong), "note": wrong or ""}]


def build() -> None:
    """Compile csrc/, once, before processes need it. Raises BuildError."""
    extension.library(INTERPRETING)
    if not INTERPRETING:
        extension.prepare()


class _Refused(ValueError):
    """A config that fits no layer of the shape."""


def _case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def _layer(case: Case, dtype: str, shape: Shape) -> fp.PeftLinear:
    """The oracle's layer; a half-precision one with fp32 adapters, others rounded from fp64."""
    half = DTYPES[dtype].itemsize == 2
    try:
        layer = oracle.build(case, shape, dtype=DTYPES[dtype] if half else torch.float64)
    except ValueError as e:
        raise _Refused(str(e)) from e
    return layer.to(DEVICE) if half else layer.to(DEVICE, DTYPES[dtype])


def _compared(case: Case, dtype: str, shape: Shape) -> list[dict]:
    layer = _layer(case, dtype, shape)
    x, dy = (t.to(DEVICE, DTYPES[dtype]) for t in oracle.inputs(shape))
    named = lambda results: {n if n == "y" else f"d{n}": t for n, t in results.items()}  # noqa: E731
    got, again = (named(oracle.layer_results(layer, x, dy)) for _ in range(2))
    same = {n: torch.equal(_bits(t), _bits(again[n])) for n, t in got.items()}
    small, found = shape.K * shape.N <= PAPER_SIZE, []
    if dtype in PAPER and small:
        for n, reference in named(_paper(case, layer, x, dy)).items():
            off, size = (got[n].double().cpu() - reference).norm().item(), reference.norm().item()
            found.append((n, "paper", off / size if size else off, PAPER[dtype], None))
    if DTYPES[dtype] in verify.LIMITS and x.numel():
        draws, sizes = 6 if small else 2, (math.prod(shape.lead), shape.K, shape.N)
        errors = verify.measure(case.make(shape.r), DTYPES[dtype], DEVICE, shape=sizes, draws=draws)
        for n, (error, plain) in errors.items():
            few = draws * got[n].numel() < POOLED
            found.append((n, "expression", error, _limit(case, layer, dtype, n, plain, few), plain))
    return [
        {"tensor": n, "against": against, "error": error, "limit": limit, "plain": plain,
         "ok": _word(error <= limit and same[n]), "repeat": _word(same[n])}
        for n, against, error, limit, plain in found or [(n, "itself", 0.0, 0.0, None) for n in same]
    ]  # fmt: skip


def _limit(case: Case, layer: fp.PeftLinear, dtype: str, tensor: str, plain: float, few: bool) -> float:
    """verify's limit, or plain PyTorch's error where that is larger."""
    row = verify.Row(case.method, DTYPES[dtype], tensor, 0.0, plain)
    limit = max(row.limit, verify.EAGER_FACTOR * plain) * (SLACK if few else 1)
    kinked = getattr(layer.config, "nonlinearity", "") == "relu" and tensor != "y" and DTYPES[dtype].itemsize == 2
    return max(limit, KINK) if kinked else limit


def _paper(case: Case, layer: fp.PeftLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The formula's results in fp64 on the CPU, with the dropout seed that the layer draws on its device."""
    twin = copy.deepcopy(layer).double().cpu()
    torch.manual_seed(7)
    seed = new_seed(x.device).cpu()
    with patch.object(oracle, "new_seed", lambda device: seed):
        return oracle.paper_results(case, twin, x.double().cpu(), dy.double().cpu())


def _word(holds: bool) -> str:
    return "true" if holds else "false"


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def masks() -> list[dict]:
    """The kernels' dropout mask against PyTorch's, bit for bit, and the fraction kept."""
    rows = []
    for n, p in ((1023, 0.5), (4099 if INTERPRETING else (1 << 22) + 3, 0.1), (2048, 0.9)):
        seed, out = new_seed(torch.device(DEVICE)), torch.empty(n, dtype=torch.int8, device=DEVICE)
        kernel.keep_mask[(triton.cdiv(n, 1024),)](out, seed, n, threshold(p), BLOCK=1024)
        differ = (out.bool() != keep_mask(seed, (n,), p)).double().mean().item()
        rows.append({"shape": n, "tensor": f"p={p}", "against": "PyTorch's", "error": differ, "limit": 0.0})
        off, limit = abs(out.double().mean().item() - (1 - p)), 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
        rows.append({"shape": n, "tensor": f"kept, p={p}", "against": "1 - p", "error": off, "limit": limit})
    return [{**row, "ok": _word(row["error"] <= row["limit"])} for row in rows]


def decoded() -> list[dict]:
    """Frozen weights of every format, decoded by the kernel, against PyTorch's, bit for bit."""
    rows, device = [], torch.device(DEVICE)
    table, more = (torch.randn(n, device=device) for n in (16, 256))
    for label, w in weights(4096, 4096):
        dtypes = ("bf16", "fp16", "fp32") if w.nested else ("bf16",)
        nested = w.nested and (more, None, torch.tensor(0.3, device=device), w.nested[3])
        w = w._replace(codes=torch.empty(0, dtype=w.codes.dtype, device=device), nested=nested,
                       table=None if w.table is None else table)  # fmt: skip
        for dtype in dtypes[1:2] if INTERPRETING else dtypes:
            wrong = stored.decoding(w, DTYPES[dtype])
            rows.append({"tensor": f"{label} {dtype}", "against": "PyTorch's", "error": float(bool(wrong)),
                         "limit": 0.0, "ok": _word(not wrong), "note": wrong or ""})  # fmt: skip
    return rows


def without_python() -> list[dict]:
    """Calls that csrc/replay.cpp replays against the same ones through Python, bit for bit, by every backend."""
    if ops.host is None:
        return [{"ok": "skipped", "note": f"replay is {replay.state()}"}]
    rows = []
    for method in ("lora", "lora+dropout", "dora", "ssb"):
        layer = fp.PeftLinear(1024, 4096, config=config(method, 16), dtype=torch.bfloat16, device="meta")
        x = torch.empty(2048, 1024, dtype=torch.bfloat16, device="meta")
        with dispatch.forcing("eager"):
            problem = foreseen(layer.factors(), x, layer.weight, layer.bias, None, True, CPU_OR_GPU)
        wrong = selftest.failure("replay", problem, CPU_OR_GPU)
        rows.append({"tensor": method, "against": "Python", "ok": _word(not wrong), "note": wrong or ""})
    return rows


def replayed() -> list[dict]:
    """A captured LoRA forward + backward, replayed on new inputs, against the same step launched anew."""
    if INTERPRETING:
        return [{"ok": "skipped", "note": "no GPU"}]
    layer = shaken(fp.PeftLinear(512, 384, config=config("lora", 16), device=DEVICE, dtype=torch.bfloat16))
    x, dy = (torch.randn(128, n, device=DEVICE, dtype=torch.bfloat16) for n in (512, 384))
    leaves, found = [x.requires_grad_(), layer.lora_A, layer.lora_B], []
    step = lambda: (y := layer(x), *torch.autograd.grad(y, leaves, dy))  # noqa: E731
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        again = captured(lambda i: found.extend(step()), 1)
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        again(0)
        same = [torch.equal(a, b) for a, b in zip(found, step(), strict=True)]
    about = {"dtype": "bf16", "shape": "128-512-384-r16", "against": "launches"}
    return [{**about, "tensor": n, "ok": _word(ok)} for n, ok in zip(("y", "dx", "dA", "dB"), same, strict=True)]


EXTRAS = {"dropout mask": masks, "decode": decoded, "replay": without_python, "CUDA graph": replayed}


def planned(plan: Plan) -> list[dict]:
    """A plan of csrc/'s GEMM with every cluster, at edges and on many tiles a block: against fp64, twice the same."""
    rows, R = [], plan.inner or 24
    small = (2 * plan.BM + 72, plan.BN + 40, 328, R)
    shapes = (small,) if INTERPRETING else (small, (20 * plan.BM + 8, 21 * plan.BN + 8, 1032, R))
    processors = 4 if INTERPRETING else torch.cuda.get_device_properties(0).multi_processor_count
    for cluster, shape in product(clusters(plan), shapes):
        gemm = Gemm(plan, *shape, device=DEVICE)
        wrong = gemm.disagreement(cluster=cluster, processors=processors)
        first, again = (gemm.run(cluster=cluster, processors=processors) for _ in range(2))
        same = all(torch.equal(first[name], again[name]) for name in first)
        sizes = "x".join(map(str, (*shape, *cluster)))
        rows.append(
            {"tensor": sizes, "against": "fp64", "note": wrong, "ok": _word(not wrong and same), "repeat": _word(same)}
        )
    return rows


def tiny() -> None:
    """What compute-sanitizer watches: csrc/'s kernel at edges inside tiles, with clusters: one tile size in every form,
    one form in every tile size."""
    watched = [p for p in PLANS if p.dtype == "bf16" and ((p.BM, p.BN) == (128, 192) or p.form == "LATE")]
    for plan, way in ((p, way) for p in watched for way in clusters(p)):
        wrong = Gemm(plan, 2 * plan.BM + 8, plan.BN + 8, 136, 8, device=DEVICE).disagreement(cluster=way)
        assert not wrong, (plan, wrong)


def sanitize(seconds: float) -> dict:
    """The row of compute-sanitizer's memcheck over ``tiny``; its racecheck and synccheck report TMA kernels falsely."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    about = {"case": "compute-sanitizer", "backend": "cuda", "dtype": "bf16", "tensor": "memcheck"}
    if INTERPRETING or tool is None:
        return {**about, "ok": "skipped", "note": "no GPU" if INTERPRETING else "compute-sanitizer is not installed"}
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["timeout", "-k", "5", f"{seconds:.0f}", tool, *SANITIZE, sys.executable, "-c"]
    command.append("import correctness; correctness.tiny()")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    late = done.returncode in (124, 137)
    last = " | ".join((done.stdout + done.stderr).splitlines()[-4:])[-400:]
    return {**about, "ok": "skipped" if late else _word(done.returncode == 0), "note": "out of time; " * late + last}
