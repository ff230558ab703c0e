"""TriLoRA: W' = W + s·B diag(E) A, s = 1 unless lora_alpha is given.

arXiv 2405.11252; extension group of arXiv 2407.05417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method
from .low_rank import LowRankConfig, gated_factors, kaiming_a_b


@dataclass(kw_only=True)
class TriLoraConfig(LowRankConfig):
    """TriLoRA: LoRA's fields, s = 1 unless lora_alpha is given."""

    peft_type: ClassVar[str] = "TRILORA"

    lora_alpha: float | None = None


TRILORA = Method(
    name="trilora",
    group="extend",
    config=TriLoraConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: TriLoraConfig(r=r),
    init=lambda W, bias, config, new: {**kaiming_a_b(W, config.r, new), "lora_E": new(config.r).zero_()},
    factors=lambda layer: gated_factors(layer, layer.lora_A, layer.lora_E, layer.lora_B),
)
