"""FLoRA and MoSLoRA: W' = W + s·B M A with M (r, r); they differ in what starts at zero.

FLoRA, arXiv 2405.14739: M 0. MoSLoRA, arXiv 2406.11909: B 0. Extension group of arXiv 2407.05417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method
from .low_rank import LowRankConfig, gated_factors, normal_a_b


@dataclass(kw_only=True)
class FloraConfig(LowRankConfig):
    """FLoRA: LoRA's fields, with a trained mixer lora_M (r, r) that starts at 0."""

    peft_type: ClassVar[str] = "FLORA"


@dataclass(kw_only=True)
class MosLoraConfig(LowRankConfig):
    """MoSLoRA: LoRA's fields, with a trained mixer lora_M (r, r)."""

    peft_type: ClassVar[str] = "MOSLORA"


def _init(zero):
    def init(W, bias, config, new):
        params = {**normal_a_b(W, config.r, new), "lora_M": new(config.r, config.r).normal_(std=0.02)}
        params[zero].zero_()
        return params

    return init


FLORA, MOSLORA = (
    Method(
        name=name,
        group="extend",
        config=config,
        A="lora_A",
        B="lora_B",
        example=lambda r, config=config: config(r=r, lora_alpha=2 * r),
        init=_init(zero),
        factors=lambda layer: gated_factors(layer, layer.lora_A, layer.lora_M, layer.lora_B),
    )
    for name, config, zero in (("flora", FloraConfig, "lora_M"), ("moslora", MosLoraConfig, "lora_B"))
)
