"""One layer of the methods that fewer use: PEFT's own, and the same accelerated.

    python -m pytest bench/bench_accelerate.py --results bench/results/cpu

Forward and backward in fp32 on one thread, in turn; kept: the bytes that autograd holds for backward. Not timed before
y and every gradient are PEFT's. Dropout only where the fused call is taken with it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from clock import compared, spread
from kept import kept
from torch import nn

import fused_peft as fp

TOKENS, WIDTH, VOCABULARY, TARGET = 1024, 768, 32000, {"target_modules": ["0"]}


def configs() -> dict[str, object]:
    import peft

    random = {"init_weights": False, **TARGET}
    return {
        "vera r=8": peft.VeraConfig(r=8, **random),
        "vera r=32": peft.VeraConfig(r=32, **random),
        "delora r=8": peft.DeloraConfig(r=8, **random),
        "delora+dropout r=8": peft.DeloraConfig(r=8, module_dropout=0.1, **random),
        "hira r=8": peft.HiraConfig(r=8, **random),
        "miss+dropout r=64": peft.MissConfig(r=64, miss_dropout=0.1, **random),
        "gralora+dropout r=32": peft.GraloraConfig(r=32, gralora_dropout=0.1, **random),
        "mica r=8": peft.LoraConfig(r=8, init_lora_weights="mica", **TARGET),
        "kasa r=8": peft.LoraConfig(r=8, kasa_config=peft.KasaConfig(), **TARGET),
        "lora on nn.Embedding r=8": peft.LoraConfig(r=8, init_lora_weights=False, **TARGET),
    }


def layers(config, base: nn.Module) -> dict[str, nn.Module]:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(base), config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    fast = fp.accelerate(copy.deepcopy(model))
    assert fp.explain(fast)[0].form != "PEFT's", fp.explain(fast)
    return {"frozen": base, "peft": model.base_model.model[0], "accelerated": fast.base_model.model[0]}


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple]:
    wanted = [*([x] if x.is_floating_point() else []), *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy) if wanted else layer(x)


@pytest.mark.parametrize("name", configs())
def test_accelerate(benchmark, in_turn, measured, tiny, name):
    torch.manual_seed(0)
    embeds, tokens, width = "Embedding" in name, 8 if tiny else TOKENS, 256 if tiny else WIDTH
    base = nn.Embedding(100 if tiny else VOCABULARY, width) if embeds else nn.Linear(width, width)
    found = layers(configs()[name], base.requires_grad_(False))
    x = torch.randint(base.weight.shape[0], (tokens,)) if embeds else torch.randn(tokens, width, requires_grad=True)
    dy = torch.randn(tokens, width)
    if "dropout" not in name:  # whose masks differ: tests/test_accelerate_methods.py
        want, got = ((layer(x), *step(layer, x, dy)()) for layer in (found["peft"], found["accelerated"]))
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    held = {who: kept(lambda m=m: m(x), [x, *m.parameters(), *m.buffers()]) for who, m in found.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = in_turn({who: step(layer, x, dy) for who, layer in found.items()}, "accelerated")
    finally:
        torch.set_num_threads(threads)
    for who in found:
        about = {"method": name, "tokens": tokens, "K": width, "N": width, "dtype": "fp32", "contender": who}
        bytes_of = {"x_bytes": x.nbytes, "kept_bytes": held[who]}
        figures = {**spread("ms", [1e3 * s for s in seconds[who]]), **compared(seconds, who)}
        measured("accelerate", **about, **bytes_of, **figures)
    benchmark.extra_info["over PEFT's"] = spread("vs_peft", [a / b for a, b in zip(
        seconds["accelerated"], seconds["peft"], strict=True)])["vs_peft_p50"]  # fmt: skip
