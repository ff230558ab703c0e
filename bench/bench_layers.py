"""One layer, every method: forward, and forward + backward, against what else computes it.

    python -m pytest bench/bench_layers.py --results bench/results/cpu

Contenders of a method run in turn, a round each: the frozen layer, ours, HF PEFT's, the formula written out in PyTorch,
that under torch.compile (some methods), LoRA as F.linear and addmm. pytest-benchmark shows ours; the rows have them
all, as multiples of the frozen layer's time in the same round. Ours is not timed before it is right.
"""

from __future__ import annotations

import pytest
import torch
from baselines import DTYPES, Shape, layers, our_configs, right, step
from clock import compared, spread

SQUARE, WIDE, TINY = Shape(2048, 2048, 2048, 16), Shape(2048, 768, 3072, 8), Shape(4, 64, 48, 4)
MAIN = ("lora", "lora+dropout", "dora", "ia3", "ia3 (input)", "ssl", "ssb", "bitfit")  # timed on the square shape too
METHODS = tuple(our_configs(8))
CASES = [(name, WIDE) for name in METHODS] + [(name, SQUARE) for name in MAIN]


@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_layer(benchmark, in_turn, measured, tiny, name, shape, dtype, what):
    torch.manual_seed(0)
    right(name, DTYPES[dtype])
    shape = TINY if tiny else shape
    compiled = not tiny and shape == WIDE and dtype == "fp32"
    found = layers(name, shape, DTYPES[dtype], compiled)
    benchmark.group = f"{shape} {dtype} {what}"
    seconds = in_turn(
        {who: step(layer, shape, DTYPES[dtype], what != "forward") for who, layer in found.items()}, "ours"
    )
    for who in found:
        about = {"shape": str(shape), "dtype": dtype, "step": what, "method": name, "contender": who}
        figures = {**spread("ms", [1e3 * s for s in seconds[who]]), **compared(seconds, who)}
        measured("layers", **about, **figures)
        benchmark.extra_info[who] = figures["ratio_p50"]
