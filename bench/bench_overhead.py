"""What the library costs beside the arithmetic: a call, wrapping a large model, saving and loading its adapter, the SVD
that a method starts from.

    python -m pytest bench/bench_overhead.py --results bench/results/cpu

A call: host time at a size where the arithmetic is nothing, one thread; overhead is the fused call less the bare torch
functions that it runs. Wrapping: a model of Llama 3 8B's shapes on the meta device, LoRA r = 16 on all linear layers.
Saving and loading that adapter: against safetensors' own functions on the same tensors.
"""

from __future__ import annotations

import gc
import statistics
import tracemalloc

import estimate
import pytest
import torch
import torch.nn.functional as F
from baselines import Shape, linear_for, ours, peft_layer, right
from bench_memory import peak
from bench_training import one_thread
from clock import environment, relative, seconds, spread
from safetensors.torch import load_file, save_file
from torch import nn

import fused_peft as fp
from fused_peft.core import ops
from fused_peft.methods import svd

TINY, CALLS = Shape(4, 16, 16, 2), 500
LORA = {"r": 16, "target_modules": "all-linear"}


def cases() -> dict:
    torch.manual_seed(0)
    linear = linear_for(TINY, torch.float32)
    w, b = linear.weight, linear.bias
    trained = w.clone().requires_grad_()
    mine = ours("lora", linear_for(TINY, torch.float32), TINY.r)
    peer = peft_layer("lora", linear_for(TINY, torch.float32), TINY.r)
    f = mine.factors()
    A, B = f.A.detach(), f.B.detach()
    x = torch.randn(TINY.M, TINY.K, requires_grad=True)
    plain = x.detach()
    dy = torch.randn(TINY.M, TINY.N)

    def bare_forward():
        with torch.no_grad():
            y = F.linear(plain, w, b)
            S = torch.mm(plain, A.t())
            return y.addmm_(S, B.t(), alpha=f.s), S

    S = bare_forward()[1]

    def bare_both():
        bare_forward()
        with torch.no_grad():
            P = torch.mm(dy, B).mul_(f.s)
            torch.mm(dy, w).addmm_(P, A)
            P.t().mm(plain)
            dy.t().mm(S).mul_(f.s)

    def fused():
        return ops.linear(x, w, f, b)

    return {
        "F.linear forward": lambda: F.linear(x, trained, b),
        "F.linear forward + backward": lambda: F.linear(x, trained, b).backward(dy),
        "bare forward": bare_forward,
        "bare forward + backward": bare_both,
        "fused forward": fused,
        "fused forward + backward": lambda: fused().backward(dy),
        "nn.Linear layer forward": lambda: linear(x),
        "PeftLinear layer forward": lambda: mine(x),
        "HF PEFT layer forward": lambda: peer(x),
        "PeftLinear layer forward + backward": lambda: mine(x).backward(dy),
        "HF PEFT layer forward + backward": lambda: peer(x).backward(dy),
    }


def test_call(benchmark, in_turn, measured, tiny):
    """Overhead / F.linear: the bar is twice its own autograd path."""
    right("lora", torch.float32)
    calls = 20 if tiny else CALLS
    with one_thread():
        times = in_turn(cases(), "fused forward + backward", calls, warmup=100)
        micros = {name: [1e6 * s for s in each] for name, each in times.items()}
        for kind in ("forward", "forward + backward"):
            less = [a - b for a, b in zip(micros[f"fused {kind}"], micros[f"bare {kind}"], strict=True)]
            micros[f"fused {kind}: overhead"] = less
            ratio = statistics.median(less) / statistics.median(micros[f"F.linear {kind}"])
            benchmark.extra_info[f"{kind}: overhead / F.linear"] = round(ratio, 2)
        for name, each in micros.items():
            measured("overhead", case=name, **spread("us", each, 2), **environment())


def wrap(who: str, model: nn.Module) -> nn.Module:
    """The model, adapted on the meta device by ``who``."""
    import peft

    if who == "ours":
        return fp.get_peft_model(model, fp.LoraConfig(**LORA))
    return peft.get_peft_model(model, peft.LoraConfig(**LORA), low_cpu_mem_usage=True)


def test_wrap(benchmark, measured, rounds):
    """get_peft_model on 224 linear layers: seconds, and the most host memory that it takes, PyTorch's and Python's."""
    found: dict[str, list[float]] = {"ours": [], "peft": []}

    def each() -> None:
        for who, times in found.items():
            model = estimate.llama("Llama-3-8B")
            gc.collect()
            times.append(seconds(lambda: wrap(who, model)))  # noqa: B023

    benchmark.pedantic(each, rounds=rounds, warmup_rounds=1)
    for who, times in found.items():
        model = estimate.llama("Llama-3-8B")
        tracemalloc.start()
        allocated = peak(lambda: wrap(who, model))  # noqa: B023
        megabytes = (allocated + tracemalloc.get_traced_memory()[1]) / 2**20
        tracemalloc.stop()
        figures = {**spread("seconds", times[1:], 4), "mb": round(megabytes, 1)}
        benchmark.extra_info[who] = figures
        measured("wrap", contender=who, **figures, **environment())


def test_checkpoint(in_turn, measured, tmp_path):
    """save_pretrained and load_adapter of that adapter (fp32, 160 MB) against safetensors' save_file, and load_file and
    a copy into the same tensors."""
    model = wrap("ours", estimate.llama("Llama-3-8B"))
    adapter = {n: torch.randn(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({n: t.clone() for n, t in adapter.items()}, strict=False, assign=True)
    tensors = dict(model.named_parameters())

    def load() -> None:
        with torch.no_grad():
            for name, t in load_file(tmp_path / "bare.safetensors").items():
                tensors[name].copy_(t)

    runs = {
        "save": lambda: fp.save_pretrained(model, tmp_path / "adapter"),
        "safetensors save": lambda: save_file(adapter, tmp_path / "bare.safetensors"),
        "load": lambda: fp.load_adapter(model, tmp_path / "adapter"),
        "safetensors load": load,
    }
    for prefix in ("", "safetensors "):  # what was saved comes back, by either
        runs[f"{prefix}save"]()
        with torch.no_grad():
            for name in adapter:
                tensors[name].fill_(torch.nan)
        runs[f"{prefix}load"]()
        assert all(torch.equal(tensors[name], t) for name, t in adapter.items())
    times = in_turn(runs, "save")
    for name, each in times.items():
        ratio = spread("ratio", relative(times, name, f"safetensors {name.split()[-1]}"))
        measured("checkpoint", step=name, **spread("ms", [1e3 * s for s in each]), **ratio, **environment())


@pytest.mark.parametrize("weight", ["nn.Linear, untrained", "singular values as 1 / sqrt(i)"])
def test_init(benchmark, measured, tiny, weight):
    """The leading triplets that PiSSA starts from, r = 16, against a full decomposition: seconds, the largest angle
    (radians) between the two left subspaces, and the largest relative difference of a singular value."""
    torch.manual_seed(0)
    n, r = 1024 if tiny else 4096, 16
    W = nn.Linear(n, n).weight.detach()
    if weight != "nn.Linear, untrained":
        left, right = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
        W = left * torch.arange(1, n + 1).rsqrt() @ right
    times, found = [], []
    benchmark.pedantic(lambda: times.append(seconds(lambda: found.append(svd.leading(W, r)))), rounds=1 if tiny else 3)
    full = seconds(lambda: found.append(torch.linalg.svd(W, full_matrices=False)))
    (U, S, _), (left, values, _) = found[0], found[-1]
    left, U = left[:, :r].double(), U.double()
    angle = torch.linalg.matrix_norm(U - left @ (left.t() @ U), 2).asin().item()
    figures = {**spread("ms", [1e3 * s for s in times]), "full_ms": round(1e3 * full)}
    figures |= {"angle": f"{angle:.1e}", "values_differ": f"{((S - values[:r]) / values[:r]).abs().max().item():.1e}"}
    benchmark.extra_info |= figures
    measured("init", weight=weight, **figures, **environment())
