"""LieRA: W' = W ⊙ (1 + s·B A).

arXiv 2412.04915; extension group of arXiv 2407.05417. Hugging Face PEFT's HiRA is the case s = 1, without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.factors import Factors
from .base import Method
from .low_rank import LowRankConfig, kaiming_a_zero_b


@dataclass(kw_only=True)
class LieraConfig(LowRankConfig):
    """LieRA: LoRA's fields; dropout and a nonlinearity have no place in a product of weights and are refused."""

    peft_type: ClassVar[str] = "LIERA"

    def __post_init__(self):
        super().__post_init__()
        for name, off in (("lora_dropout", 0.0), ("nonlinearity", "identity")):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for LieRA, which multiplies the weight"
                )


def factors(layer):
    return Factors(A=layer.lora_A, B=layer.lora_B, s=layer.config.scaling, hadamard=True)


LIERA = Method(
    name="liera",
    group="extend",
    config=LieraConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: LieraConfig(r=r, lora_alpha=2 * r),
    init=lambda W, bias, config, new: kaiming_a_zero_b(W, config.r, new),
    factors=factors,
    reads_weight=True,
)
