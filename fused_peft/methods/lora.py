"""LoRA: W' = W + s·B A, s = alpha / r, or alpha / √r with use_rslora.

Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732; extension group of arXiv 2407.05417.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..factors import Factors
from .base import Method, PeftConfig, matching_pattern, option, positive, positive_int, probability
from .defaults import LORA_TARGETS


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """r: rank. lora_alpha: s = lora_alpha / r. lora_dropout: probability on the input of A. lora_bias: a trained bias
    on B. rank_pattern, alpha_pattern: {name or regular expression: value} for layers that differ. init_lora_weights:
    True (A kaiming_uniform(√5), B 0), "gaussian" (A N(0, 1/r²), B 0) or False (both random, not the identity: for
    tests).
    """

    peft_type: ClassVar[str] = "LORA"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = option({})
    alpha_pattern: dict[str, float] = option({})
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive_int("r", self.r)
        positive("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name, check in (("rank_pattern", positive_int), ("alpha_pattern", positive)):
            for pattern, value in getattr(self, name).items():
                self._compiles(name, pattern)
                check(f"{name}[{pattern!r}]", value)
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} must be True, False or 'gaussian'")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_module(self, name: str) -> LoraConfig:
        return replace(
            self,
            r=matching_pattern(self.rank_pattern, name, self.r),
            lora_alpha=matching_pattern(self.alpha_pattern, name, self.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )


def init(W, bias, config):
    out_features, in_features = W.shape
    if config.r > min(W.shape):
        raise ValueError(
            f"r={config.r} must not exceed min(in_features, out_features)={min(W.shape)} of a layer with "
            f"in_features={in_features}, out_features={out_features}; lower r, or set it in rank_pattern"
        )
    A, B = W.new_empty(config.r, in_features), W.new_zeros(out_features, config.r)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if config.init_lora_weights is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    params = {"lora_A": A, "lora_B": B}
    if config.lora_bias:
        params["lora_B_bias"] = W.new_zeros(out_features)
    return params


def factors(layer):
    config, s, bias = layer.config, layer.config.scaling, None
    if config.lora_bias:
        bias = s * layer.lora_B_bias if layer.bias is None else torch.add(layer.bias, layer.lora_B_bias, alpha=s)
    return Factors(A=layer.lora_A, B=layer.lora_B, bias=bias, s=s, p=config.lora_dropout)


LORA = Method(
    name="lora",
    group="extend",
    config=LoraConfig,
    init=init,
    factors=factors,
    disk={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"},
)
