"""KaSA's diagonal: W' = W + s·B diag(E) A with E started at N(0, 1) and B at 0.

Wang et al., arXiv 2412.06071, without its truncation of W's smallest singular values, so it starts as the identity.
Hugging Face PEFT's LoraConfig(kasa_config=...) truncates: the same update, on another W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method
from .low_rank import LowRankConfig, gated_factors, kaiming_a_zero_b


@dataclass(kw_only=True)
class KasaConfig(LowRankConfig):
    """KaSA: LoRA's fields."""

    peft_type: ClassVar[str] = "KASA"


KASA = Method(
    name="kasa",
    group="extend",
    config=KasaConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: KasaConfig(r=r, lora_alpha=2 * r),
    init=lambda W, bias, config, new: {**kaiming_a_zero_b(W, config.r, new), "lora_diag": new(config.r).normal_()},
    factors=lambda layer: gated_factors(layer, layer.lora_A, layer.lora_diag, layer.lora_B),
)
