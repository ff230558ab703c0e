"""A batch whose samples use different adapters, on one layer: PEFT's mixed forward, and ours in its place.

    python -m pytest bench/bench_batch.py --results bench/results/cpu

Samples take the adapters in turn, so none are in order. PEFT refuses such a batch in training mode at its model alone:
its layer's own forward is timed with gradients too.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from baselines import DTYPES
from clock import compared, spread

SAMPLES, WIDTH, RANK = 16, 1024, 16


def layers(adapters: int, width: int, dtype: torch.dtype) -> dict:
    import peft

    import fused_peft as fp

    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    net = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False, dtype=dtype))
    model = peft.get_peft_model(net, config, adapter_name="x0", autocast_adapter_dtype=False)
    for i in range(1, adapters):
        model.add_adapter(f"x{i}", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter([f"x{i}" for i in range(adapters)])
    ours = fp.accelerate(copy.deepcopy(model))
    return {"peft": model.base_model.model[0], "ours": ours.base_model.model[0]}


@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 4, 16])
@pytest.mark.parametrize("tokens", [128, 1])
def test_batch(benchmark, in_turn, measured, tiny, tokens, adapters, dtype, what):
    if tokens == 1 and what != "forward":
        pytest.skip("a token a sample is decoding")
    torch.manual_seed(0)
    width, threads = 64 if tiny else WIDTH, torch.get_num_threads()
    found = layers(adapters, width, DTYPES[dtype])
    names = [f"x{i % adapters}" for i in range(SAMPLES)]
    x = torch.randn(SAMPLES, 2 if tiny else tokens, width, dtype=DTYPES[dtype], requires_grad=True)
    dy = torch.randn_like(x)
    W = found["ours"].base_layer.weight.detach()
    runs = {
        "frozen": lambda: F.linear(x, W),
        **{who: lambda m=m: m(x, adapter_names=names) for who, m in found.items()},
    }
    with torch.no_grad():
        want, got = runs["peft"](), runs["ours"]()
        assert (got - want).norm() <= (1e-5 if dtype == "fp32" else 1e-2) * want.norm()
    if what == "forward":
        for m in found.values():
            m.eval().requires_grad_(False)
        x.requires_grad_(False)
    else:
        trained = {who: [p for p in m.parameters() if p.requires_grad] for who, m in found.items()}
        runs = {
            who: lambda who=who, y=y: torch.autograd.grad(y(), [x, *trained.get(who, ())], dy)
            for who, y in runs.items()
        }
    torch.set_num_threads(1)
    try:
        seconds = in_turn(runs, "ours", calls=1 if tiny or tokens > 1 else 20)
        benchmark.group = f"{SAMPLES} x {tokens} x {width} {dtype} {what}"
        for who in runs:
            about = {"samples": SAMPLES, "tokens": tokens, "K": width, "N": width, "r": RANK, "adapters": adapters}
            figures = {**spread("ms", [1e3 * s for s in seconds[who]]), **compared(seconds, who)}
            measured("batch", **about, dtype=dtype, step=what, contender=who, **figures)
    finally:
        torch.set_num_threads(threads)
