"""How the cost of a layer grows with tokens M, width K = N and rank r, one at a time, and what the machine can do.

    python -m pytest bench/bench_scaling.py --results bench/results/cpu

fp32, forward and forward + backward: the frozen layer, ours, HF PEFT's; for LoRA also addmm on the library's GEMM, and
the weight W + s·BA formed anew in every call. ``scaling.py`` fits these times; ``ceiling.csv`` has the rate of a large
matrix product and of a copy.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baselines import DTYPES, Shape, layers, linear_for, ours, right, step
from clock import compared, environment, seconds, spread
from torch import nn

import fused_peft as fp

M, WIDTH, R = 1024, 1024, 16
SHAPES = [Shape(m, WIDTH, WIDTH, R) for m in (16, 64, 256, 1024, 4096)]
SHAPES += [Shape(M, k, k, R) for k in (256, 512, 2048)]
SHAPES += [Shape(M, WIDTH, WIDTH, r) for r in (4, 64, 128, 256)]
TINY = Shape(4, 64, 64, 4)
METHODS = ("lora", "lora+dropout", "dora", "ssb")


class Formed(nn.Module):
    """LoRA through its merged weight, formed in every call."""

    def __init__(self, layer: fp.PeftLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f, layer = self.layer.factors(), self.layer
        return F.linear(x, torch.addmm(layer.weight, f.B, f.A, alpha=f.s), layer.bias)


def contenders(name: str, shape: Shape) -> dict[str, nn.Module]:
    found = layers(name, shape, torch.float32)
    del found["written"]
    if name == "lora":
        found["formed"] = Formed(ours(name, linear_for(shape, torch.float32), shape.r))
    return found


@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape).replace(" ", "-"))
def test_scaling(benchmark, in_turn, measured, tiny, shape, name, what):
    right(name, torch.float32)
    torch.manual_seed(0)
    shape = TINY if tiny else shape
    runs = {k: step(v, shape, torch.float32, what != "forward") for k, v in contenders(name, shape).items()}
    for _ in range(3):
        once = seconds(runs["frozen"])
    calls = 1 if tiny else max(1, round(3e-3 / once))  # 3 ms a sample
    benchmark.group = f"{name} {what}"
    times = in_turn(runs, "ours", calls)
    for who, each in times.items():
        about = {"method": name, "step": what, "contender": who, **vars(shape)}
        measured("scaling", **about, **spread("ms", [1e3 * s for s in each], 4), **compared(times, who))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ceiling(benchmark, in_turn, measured, tiny, dtype):
    """GFLOP/s of a 2048 x 2048 x 2048 product, GB/s of a copy that no cache holds (read and written bytes)."""
    n = 64 if tiny else 2048
    a, b = (torch.randn(n, n, dtype=DTYPES[dtype]) for _ in range(2))
    large = torch.randn(16 * n * n, dtype=DTYPES[dtype])
    there = torch.empty_like(large)
    times = in_turn({"product": lambda: a @ b, "copy": lambda: there.copy_(large)}, "product")
    figures = spread("gflops_per_second", [2e-9 * n**3 / s for s in times["product"]], 1)
    figures |= spread("gb_per_second", [2e-9 * large.nbytes / s for s in times["copy"]], 1)
    benchmark.extra_info |= figures
    measured("ceiling", dtype=dtype, **figures, **environment())
