"""Throughput of one training step a layer, for pytest-benchmark:

python -m pytest bench/test_layers.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
"""

import pytest
import torch
from baselines import CPU_SHAPES, PAIRS, contenders

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = [
    "frozen",
    *(f"{name} {who}" for name, (_, peer) in PAIRS.items() for who in ("ours", "peft") if who == "ours" or peer),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_forward_backward(benchmark, step, shape, dtype):
    benchmark.group = f"{shape} {dtype}"
    name = step.split(" ", maxsplit=1)[0]
    names = () if name == "frozen" else (name,)
    benchmark(contenders(shape, DTYPES[dtype], names, peers=step.endswith("peft"))[step])
