"""What one linear layer is compared with: the frozen layer, HF PEFT's, and the same method written out in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

import fused_peft as fp
from fused_peft.tools import verify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# what the roofline predicts and a GPU times
TIMED = (
    "lora", "lora+dropout", "dora", "dora+dropout", "ia3", "ssl", "ssb", "parallel_adapter", "flora", "trilora",
    "liera", "svdiff", "bitfit",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """M tokens, in_features K, out_features N, rank r."""

    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N} r={self.r}"


def config(label: str, r: int) -> fp.methods.PeftConfig:
    """A method's config by its name, "+dropout" as a suffix."""
    name, _, dropout = label.partition("+")
    found = fp.methods.METHODS[name].example(r)
    return replace(found, lora_dropout=0.1) if dropout else found


def our_configs(r: int) -> dict[str, fp.methods.PeftConfig]:
    """``verify``'s configs, and DoRA's with dropout."""
    return dict(sorted({**verify.configs(r), "dora+dropout": config("dora+dropout", r)}.items()))


def peft_configs(r: int) -> dict:
    """HF PEFT's config of the methods that it has, for a model whose only layer is named "0"."""
    import peft

    lora = {"r": r, "lora_alpha": 2 * r, "target_modules": ["0"]}
    return {
        "lora": peft.LoraConfig(**lora),
        "lora+dropout": peft.LoraConfig(**lora, lora_dropout=0.1),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "dora+dropout": peft.LoraConfig(**lora, use_dora=True, lora_dropout=0.1),
        "pissa": peft.LoraConfig(**lora, init_lora_weights="pissa_niter_2"),
        "olora": peft.LoraConfig(**lora, init_lora_weights="olora"),
        "adalora": peft.AdaLoraConfig(
            init_r=r, target_r=r, lora_alpha=2 * r, total_step=100, target_modules=["0"]
        ),
        "ia3": peft.IA3Config(feedforward_modules=[], target_modules=["0"]),
        "ia3 (input)": peft.IA3Config(feedforward_modules=["0"], target_modules=["0"]),
        "vera": peft.VeraConfig(r=r, target_modules=["0"]),
        "delora": peft.DeloraConfig(r=r, target_modules=["0"]),
        "liera": peft.HiraConfig(r=r, target_modules=["0"]),
    }  # fmt: skip


@cache
def right(name: str, dtype: torch.dtype) -> None:
    """Raises AssertionError where ours is wrong, not merely rounded otherwise: a wrong result has no speed. On a shape
    large enough for every way that the eager backend takes."""
    found = verify.measure(our_configs(8)[name], dtype, shape=(1100, 64, 2100), draws=2)
    method = our_configs(8)[name].method_name
    for tensor, (error, plain) in found.items():
        limit = 4 * max(verify.Row(method, dtype, tensor, error, plain).limit, plain)  # of few numbers: they scatter
        assert error <= limit, f"{name}: {tensor} is off by {error:.1e}, {limit:.1e} is allowed"


def linear_for(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape.K, shape.N, device=device, dtype=dtype).requires_grad_(False)


def ours(name: str, linear: nn.Linear, r: int) -> fp.PeftLinear:
    """Adapters in the base's dtype, as every contender has them."""
    return fp.PeftLinear.from_linear(linear, our_configs(r)[name], adapter_dtype=linear.weight.dtype)


def peft_layer(name: str, linear: nn.Linear, r: int, **options) -> nn.Module:
    """HF PEFT's layer around ``linear``. KeyError for a method that it lacks."""
    import peft

    return peft.get_peft_model(nn.Sequential(linear), peft_configs(r)[name], **options).base_model.model[0]


def has_peer(name: str) -> bool:
    """Whether the installed HF PEFT has the method."""
    try:
        return name in peft_configs(8)
    except (ImportError, AttributeError):
        return False


class Written(nn.Module):
    """A method as its authors write it: the formula in PyTorch, autograd through it, dropout drawn by PyTorch."""

    def __init__(self, layer: fp.PeftLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        drops = layer.training and layer.method.output is None
        p = getattr(layer.config, "lora_dropout", 0.0) if drops else 0.0
        keep = torch.rand_like(x) >= p if p else None
        return verify.written_out(layer, x, x.dtype, keep, layer.forms_weight(x.shape[0]))


class Addmm(nn.Module):
    """LoRA with the library's GEMM and one addmm on top."""

    def __init__(self, layer: fp.PeftLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.layer.factors()
        return torch.addmm(F.linear(x, self.layer.weight, self.layer.bias), F.linear(x, f.A), f.B.t(), alpha=f.s)


COMPILED = ("lora", "dora", "ssb")  # compiling takes longer than timing


def layers(name: str, shape: Shape, dtype: torch.dtype, compiled: bool = False) -> dict[str, nn.Module]:
    """{contender: its layer}: frozen, ours, HF PEFT's, written out, that compiled, LoRA with addmm."""
    base = lambda: linear_for(shape, dtype)  # noqa: E731
    found = {"frozen": base(), "ours": ours(name, base(), shape.r)}
    if name in peft_configs(shape.r):
        found["peft"] = peft_layer(name, base(), shape.r, autocast_adapter_dtype=False).train()
    found["written"] = Written(ours(name, base(), shape.r))
    if name == "lora":
        found["addmm"] = Addmm(ours(name, base(), shape.r))
    if compiled and name in COMPILED:
        found["compiled"] = torch.compile(Written(ours(name, base(), shape.r)))
    return found


def step(layer: nn.Module, shape: Shape, dtype: torch.dtype, backward: bool = True) -> Callable[[], object]:
    """Forward, and backward, of one layer whose input needs a gradient, as inside a network."""
    x = torch.randn(shape.M, shape.K, dtype=dtype, requires_grad=True)
    dy = torch.randn(shape.M, shape.N, dtype=dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    if backward:
        return lambda: torch.autograd.grad(layer(x), wanted, dy)
    return lambda: layer(x)
