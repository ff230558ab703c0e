"""One layer, every method: forward, and forward + backward, against what else computes it.

    python -m pytest bench/bench_layers.py --csv bench/results/cpu/layers.csv

Contenders of a method run in turn, a round each: the frozen layer, ours, HF PEFT's, the formula written out in PyTorch,
that under torch.compile (some methods), LoRA as F.linear and addmm. pytest-benchmark shows ours; the rows have them
all, as multiples of the frozen layer's time in the same round. Nothing is timed before it is right.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from baselines import Shape, layers, our_configs, step
from clock import environment, relative, spread

from fused_peft import verify

SQUARE, WIDE, TINY = Shape(2048, 2048, 2048, 16), Shape(2048, 768, 3072, 8), Shape(4, 64, 48, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAIN = ("lora", "lora+dropout", "dora", "ia3", "ia3 (input)", "ssl", "ssb", "bitfit")  # timed on the square shape too
METHODS = tuple(our_configs(8))
CASES = [(name, WIDE) for name in METHODS] + [(name, SQUARE) for name in MAIN]


@cache
def right(name: str, dtype: torch.dtype) -> None:
    """Raises AssertionError where a method is wrong, not merely rounded otherwise: a wrong result has no speed."""
    found = verify.measure(our_configs(8)[name], dtype, shape=(64, 96, 80), draws=2)
    method = our_configs(8)[name].method_name
    for tensor, (error, plain) in found.items():
        limit = 4 * max(verify.Row(method, dtype, tensor, error, plain).limit, plain)  # of few numbers: they scatter
        assert error <= limit, f"{name}: {tensor} is off by {error:.1e}, {limit:.1e} is allowed"


@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_layer(benchmark, measured, request, name, shape, dtype, what):
    torch.manual_seed(0)
    right(name, DTYPES[dtype])
    tiny = request.config.getoption("--tiny")
    shape = TINY if tiny else shape
    compiled = not tiny and shape == WIDE and dtype == "fp32"
    found = layers(name, shape, DTYPES[dtype], compiled)
    steps = {who: step(layer, shape, DTYPES[dtype], what != "forward") for who, layer in found.items()}
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for run in steps.values():
        run()

    def others() -> None:
        for who, run in steps.items():
            if who != "ours":
                seconds[who].append(timed(run))

    mine = lambda: seconds["ours"].append(timed(steps["ours"]))  # noqa: E731
    benchmark.group = f"{shape} {dtype} {what}"
    rounds = 2 if tiny else request.config.getoption("--rounds")
    benchmark.pedantic(mine, setup=others, rounds=rounds, warmup_rounds=0)
    for who in steps:
        about = {"shape": str(shape), "dtype": dtype, "step": what, "method": name, "contender": who}
        peer = spread("vs_peft", relative(seconds, who, "peft")) if who == "ours" and "peft" in steps else {}
        none = {"vs_peft_p20": "", "vs_peft_p50": "", "vs_peft_p80": ""}
        ratio = spread("ratio", relative(seconds, who, "frozen"))
        times = spread("ms", [1e3 * s for s in seconds[who]])
        measured.append({**about, **times, **ratio, **(peer or none), **environment()})
        benchmark.extra_info[who] = ratio["ratio_p50"]


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
