"""Bytes of one layer's training step: kept for backward beyond its input, and the most that is allocated at once.

    python -m pytest bench/bench_memory.py --results bench/results/cpu

1024 x 1024, 2048 tokens, r = 16, bf16 base with fp32 adapters (both libraries' default). Exact: autograd's saved
tensors, and every allocation and release of forward and backward. The peak counts what was not there before: y, dx and
the gradients are in it, x, dy and the layer are not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from baselines import Written, our_configs, peft_configs, peft_layer, right
from clock import environment
from kept import kept
from torch import nn

import fused_peft as fp

WIDTH, TOKENS, R = 1024, 2048, 16


def layers(name: str) -> dict[str, nn.Module]:
    """{contender: its layer}, the frozen one among them."""
    base = lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)  # noqa: E731
    torch.manual_seed(0)
    mine = fp.PeftLinear.from_linear(base(), our_configs(R)[name])
    found = {"frozen": base().requires_grad_(False), "ours": mine}
    if name in peft_configs(R):
        found["peft"] = peft_layer(name, base(), R).train()
    # written out, adapters are of the layer's dtype, as an author's script would have them
    found["written"] = Written(fp.PeftLinear.from_linear(base(), our_configs(R)[name], adapter_dtype=torch.bfloat16))
    return found


def peak(run: Callable[[], object]) -> int:
    """The most bytes allocated at once, beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def figures(layer: nn.Module, tokens: int) -> dict[str, int]:
    """tokens: of the step whose peak is taken; what is kept is that of TOKENS."""
    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, WIDTH, dtype=torch.bfloat16)
    every = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    step = lambda: torch.autograd.grad(layer(x), trained, dy)  # noqa: E731
    step()
    return {
        "x_bytes": x.nbytes,
        "kept_bytes": kept(lambda: layer(every), [every, *layer.parameters(), *layer.buffers()]),
        "peak_bytes": peak(step),
    }


@pytest.mark.parametrize("name", our_configs(R))
def test_memory(benchmark, measured, tiny, name):
    right(name, torch.bfloat16)
    found, tokens = layers(name), 32 if tiny else TOKENS  # some CPUs multiply bf16 slowly
    benchmark.group = "bytes"
    bytes_of = {"ours": benchmark.pedantic(figures, args=(found["ours"], tokens), rounds=1)}
    bytes_of |= {who: figures(layer, tokens) for who, layer in found.items() if who != "ours"}
    for who, each in bytes_of.items():
        measured("memory", method=name, contender=who, **each, **environment())
        benchmark.extra_info[who] = each
    assert bytes_of["ours"]["kept_bytes"] <= bytes_of.get("peft", bytes_of["ours"])["kept_bytes"]
