"""What every method with factors A (r, in) and B (out, r) shares: its hyper-parameters and how A and B start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ..core.factors import ACTIVATIONS, Factors
from .base import PeftConfig, matching_pattern, naming, positive, positive_int, probability
from .defaults import LORA_TARGETS


@dataclass(kw_only=True)
class LowRankConfig(PeftConfig):
    """Of methods with factors A (r, in) and B (out, r).

    r: rank.
    lora_alpha: s = lora_alpha / r, or lora_alpha / √r with use_rslora; None means s = 1.
    lora_dropout: probability on the input of A.
    use_rslora: see lora_alpha (arXiv 2312.03732).
    nonlinearity: one between A and B (MPC_n): identity, relu, gelu, silu or tanh.
    rank_pattern, alpha_pattern: {name or regular expression: value} for layers that differ.
    fan_in_fan_out: as PEFT stores it; how a layer stores its weight is read from the layer.
    """

    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}
    training_only: ClassVar[frozenset[str]] = frozenset({"lora_dropout", "init_lora_weights"})
    beyond_peft: ClassVar[frozenset[str]] = frozenset({"nonlinearity"})

    r: int = 8
    lora_alpha: float | None = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    nonlinearity: str = "identity"
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=naming("pattern"))
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=naming("pattern"))
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive_int("r", self.r)
        if self.lora_alpha is not None:
            positive("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name, check in (("rank_pattern", positive_int), ("alpha_pattern", positive)):
            for pattern, value in (getattr(self, name) or {}).items():
                self._compiles(name, pattern)
                check(f"{name}[{pattern!r}]", value)
        if self.nonlinearity not in ACTIVATIONS:
            raise ValueError(f"nonlinearity={self.nonlinearity!r} must be one of {', '.join(ACTIVATIONS)}")

    @property
    def scaling(self) -> float:
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_peft(self) -> dict[str, Any]:
        """PEFT has no lora_alpha=None: with alpha = r, or √r with use_rslora, its scaling is 1 as well."""
        if self.lora_alpha is not None:
            return {}
        alpha = (lambda r: math.sqrt(r)) if self.use_rslora else (lambda r: r)
        ranks = {pattern: alpha(r) for pattern, r in self.rank_pattern.items() if pattern not in self.alpha_pattern}
        return {"lora_alpha": alpha(self.r), "alpha_pattern": self.alpha_pattern | ranks}

    def for_module(self, name: str) -> LowRankConfig:
        return replace(
            self,
            target_modules=None,
            target_parameters=None,
            r=matching_pattern(self.rank_pattern, name, self.r),
            lora_alpha=matching_pattern(self.alpha_pattern, name, self.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )


def rank_fits(r: int, W, name: str = "r") -> None:
    """ValueError when a start that factorises a weight (out, in) asks for more than it has: SVD and QR."""
    if r > min(W.shape):
        raise ValueError(
            f"{name}={r} must not exceed min(in_features, out_features)={min(W.shape)} of a layer with "
            f"in_features={W.shape[1]}, out_features={W.shape[0]}; lower it, or set it in rank_pattern"
        )


def kaiming_a_zero_b(W, r: int, new) -> dict:
    """LoRA's start: A kaiming_uniform(√5), B 0."""
    A = new(r, W.shape[1])
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return {"lora_A": A, "lora_B": new(W.shape[0], r).zero_()}


def normal_a_b(W, r: int, new, std: float = 0.02) -> dict:
    """A and B both N(0, std²), for methods with another factor at zero."""
    return {"lora_A": new(r, W.shape[1]).normal_(std=std), "lora_B": new(W.shape[0], r).normal_(std=std)}


def kaiming_a_b(W, r: int, new) -> dict:
    """A and B both kaiming_uniform(√5), for methods with another factor at zero."""
    params = kaiming_a_zero_b(W, r, new)
    nn.init.kaiming_uniform_(params["lora_B"], a=math.sqrt(5))
    return params


def gated_factors(layer, A, G, B) -> Factors:
    """s·B G h(A ·) with the layer's own scaling, dropout and nonlinearity."""
    config = layer.config
    return Factors(A=A, B=B, G=G, s=config.scaling, h=config.nonlinearity, p=config.lora_dropout)
