"""DeLoRA: W' = W + (λ/r) B diag(1 / (‖Aᵢ‖ ‖Bᵢ‖)) A diag(w), w the column norms of W: the angle and the strength train
apart.

Bini et al., arXiv 2503.18225, as Hugging Face PEFT computes it (norms below 1e-4 count as 1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..core.factors import Factors
from .base import Init, Method, PeftConfig, matching_pattern, naming, positive, positive_int, probability
from .defaults import LORA_TARGETS
from .low_rank import kaiming_a_zero_b


@dataclass(kw_only=True)
class DeloraConfig(PeftConfig):
    """DeLoRA.

    r: rank.
    delora_lambda: start of the trained bound λ.
    module_dropout: probability on the input of A.
    rank_pattern, lambda_pattern: {name or regular expression: value} for layers that differ.
    """

    peft_type: ClassVar[str] = "DELORA"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}

    training_only: ClassVar[frozenset[str]] = frozenset({"delora_lambda", "lambda_pattern", "module_dropout"})

    r: int = 8
    delora_lambda: float = 15.0
    module_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=naming("pattern"))
    lambda_pattern: dict[str, float] = field(default_factory=dict, metadata=naming("pattern"))

    def __post_init__(self):
        super().__post_init__()
        positive_int("r", self.r)
        positive("delora_lambda", self.delora_lambda)
        probability("module_dropout", self.module_dropout)

    def for_module(self, name: str) -> DeloraConfig:
        return replace(
            self,
            target_modules=None,
            target_parameters=None,
            r=matching_pattern(self.rank_pattern or {}, name, self.r),
            delora_lambda=matching_pattern(self.lambda_pattern or {}, name, self.delora_lambda),
            rank_pattern={},
            lambda_pattern={},
        )


def init(W, bias, config, new):
    start = kaiming_a_zero_b(W, config.r, new)
    params = {
        "delora_A": start["lora_A"],
        "delora_B": start["lora_B"],
        "delora_lambda": new(1).fill_(config.delora_lambda),
    }
    wide = torch.promote_types(W.dtype, torch.float32)
    norm = new(W.shape[1]) if W.is_meta else torch.linalg.vector_norm(W, dim=0, dtype=wide)
    return Init(params, {"delora_w_norm": norm})


def factors(layer):
    A, B = layer.delora_A, layer.delora_B
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    return Factors(
        A=A * layer.delora_w_norm,
        B=B,
        G=layer.delora_lambda / layer.config.r / norms,
        p=layer.config.module_dropout,
    )


_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

DELORA = Method(
    name="delora",
    stacks=False,
    group="combine",
    config=DeloraConfig,
    A="delora_A",
    B="delora_B",
    example=lambda r: DeloraConfig(r=r),
    init=init,
    factors=factors,
    from_weight=True,
    disk={name: name for name in _NAMES},
    disk_buffers=("delora_w_norm",),
)
