"""Host time of a layer's forward and backward on a stand-in for the CUDA driver (``standin``): what the CPU does until
every launch is made, one thread. No GPU is needed, and none takes part.

    python bench/host.py --out bench/results/cpu

Ours: 72 x 64 x 64, r = 16, bf16, adapters in fp32, every launch that an H100 would get; with calls replayed, and
through Python alone. HF PEFT's layer, and the frozen one: 4 x 16 x 16, r = 2, where PyTorch's CPU kernels stand for
launches. Contenders in turn, a sample is CALLS calls. With ``--backend cuda`` ours launch csrc/'s GEMM.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import standin
import tables
import torch
from baselines import Shape, config, has_peer, peft_layer
from clock import environment, spread
from torch import nn

import fused_peft as fp
from fused_peft.backends import replay
from fused_peft.core import ops

METHODS = ("lora", "lora+dropout", "dora", "dora+dropout", "ssb", "ia3")
FULL, TINY, CALLS = Shape(72, 64, 64, 16), Shape(4, 16, 16, 2), 100


def base(shape: Shape) -> nn.Linear:
    return nn.Linear(shape.K, shape.N, bias=False, dtype=torch.bfloat16).requires_grad_(False)


class Call:
    """What a layer's forward calls, ``ops.linear``, without the layer's own Python around it."""

    def __init__(self, layer: fp.PeftLinear):
        self.layer, self.factors, self.parameters = layer, layer.factors(), layer.parameters

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.layer.weight, self.factors, self.layer.bias)


def contenders(method: str, backend: str) -> dict[str, tuple[nn.Module | Call, Shape, bool]]:
    """{name: layer, its shape, whether calls are replayed}; of LoRA the call alone too."""
    mine, of = (
        fp.PeftLinear.from_linear(base(FULL), config(method, FULL.r)),
        "" if backend == "triton" else f"@{backend}",
    )
    found = {"frozen": (base(TINY), TINY, False), f"ours{of}": (mine, FULL, True), f"python{of}": (mine, FULL, False)}
    if method == "lora":
        found[f"call{of}"] = Call(mine), FULL, True
    if has_peer(method) and not of:
        found["peft"] = peft_layer(method, base(TINY), TINY.r).train(), TINY, False
        model = nn.Sequential(peft_layer(method, base(FULL), FULL.r).train())
        fp.accelerate(model)
        found["accelerated"] = model[0], FULL, True
    return found


def microseconds(run: Callable[[], object]) -> float:
    run()
    start = time.thread_time()
    for _ in range(CALLS):
        run()
    return 1e6 * (time.thread_time() - start) / CALLS


def steps(layer: nn.Module | Call, shape: Shape) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and the backward of one forward."""
    x = torch.zeros(shape.M, shape.K, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.zeros(shape.M, shape.N, dtype=torch.bfloat16)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for _ in range(3):  # a plan is made the second time
        y = layer(x)
        torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return lambda: layer(x), lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def measured(methods: list[str], rounds: int, backend: str) -> list[dict]:
    """The rows of every contender; each has its turn in every round."""
    fp.set_backend(backend)
    module, runs, times = ops.host, {}, {}
    for method in methods:
        for name, (layer, shape, replayed) in contenders(method, backend).items():
            ops.host = module if replayed else None
            runs[method, name] = steps(layer, shape), ops.host
    for _ in range(rounds):
        for key, (both, ops.host) in runs.items():
            for step, run in zip(("forward", "backward"), both, strict=True):
                times.setdefault((*key, step), []).append(microseconds(run))
    ops.host = module
    return [
        {"method": method, "contender": name, "step": step, **spread("us", values, 1), **environment()}
        for (method, name, step), values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--backend", default="triton", help="cuda: csrc/'s GEMM; needs NVRTC")
    args = parser.parse_args()
    torch.set_num_threads(1)
    standin.take_csrc(standin.install())
    replay.load(standin.NAME)
    rows = measured(args.methods, args.rounds, args.backend)
    for r in rows:
        print(f"{r['method']:<14}{r['contender']:<12}{r['step']:<9}{r['us_p50']:7.1f} µs", flush=True)
    tables.write(args.out and args.out / "host.csv", rows)


if __name__ == "__main__":
    main()
