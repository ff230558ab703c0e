"""One training step of a single linear layer, as every contender computes it: the frozen layer, HF PEFT and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fused_peft as fp


@dataclass(frozen=True)
class Shape:
    """M tokens, in_features K, out_features N, rank r."""

    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N} r={self.r}"


CPU_SHAPES = (Shape(2048, 2048, 2048, 16), Shape(2048, 768, 3072, 8))
TINY = Shape(4, 16, 16, 2)


def _ours(config: Callable[[Shape], fp.methods.PeftConfig]):
    def build(linear: nn.Linear, shape: Shape) -> nn.Module:
        return fp.PeftLinear.from_linear(linear, config(shape), adapter_dtype=linear.weight.dtype)

    return build


def _peft(config: Callable[[Shape], object]):
    def build(linear: nn.Linear, shape: Shape) -> nn.Module:
        import peft

        model = peft.get_peft_model(nn.Sequential(linear), config(shape), autocast_adapter_dtype=False)
        return model.base_model.model[0]

    return build


def _peft_config(kind: str, **kwargs):
    def make(shape: Shape):
        import peft

        rank = {"r": shape.r, "lora_alpha": 2 * shape.r} if kind == "LoraConfig" else {}
        return getattr(peft, kind)(target_modules=["0"], **rank, **kwargs)

    return make


# pair -> (ours, the peer it is held against, or None where HF PEFT lacks the method)
PAIRS = {
    "lora": (
        _ours(lambda s: fp.LoraConfig(r=s.r, lora_alpha=2 * s.r)),
        _peft(_peft_config("LoraConfig")),
    ),
    "lora_dropout": (
        _ours(lambda s: fp.LoraConfig(r=s.r, lora_alpha=2 * s.r, lora_dropout=0.1)),
        _peft(_peft_config("LoraConfig", lora_dropout=0.1)),
    ),
    "ia3": (_ours(lambda s: fp.IA3Config()), _peft(_peft_config("IA3Config", feedforward_modules=[]))),
    "ia3_feedforward": (
        _ours(lambda s: fp.IA3Config(feedforward_modules=".*")),
        _peft(_peft_config("IA3Config", feedforward_modules=["0"])),
    ),
    "ssl": (_ours(lambda s: fp.SSLConfig()), None),
    "ssb": (_ours(lambda s: fp.SSBConfig()), None),
    "bitfit": (_ours(lambda s: fp.BitFitConfig()), None),
}


def linear_for(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape.K, shape.N, device=device, dtype=dtype).requires_grad_(False)


def step(layer: nn.Module, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Callable[[], None]:
    """Forward and backward of one layer whose input needs a gradient, as inside a network."""
    x = torch.randn(shape.M, shape.K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(shape.M, shape.N, device=device, dtype=dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(layer(x), wanted, dy)

    return run


def contenders(shape: Shape, dtype: torch.dtype, names=tuple(PAIRS), peers: bool = True) -> dict[str, Callable]:
    """{name: one training step}: frozen, then ours and HF PEFT's for every pair."""
    steps = {"frozen": step(linear_for(shape, dtype), shape, dtype)}
    for name in names:
        ours, peer = PAIRS[name]
        steps[f"{name} ours"] = step(ours(linear_for(shape, dtype), shape), shape, dtype)
        if peers and peer is not None:
            steps[f"{name} peft"] = step(peer(linear_for(shape, dtype), shape), shape, dtype)
    return steps
