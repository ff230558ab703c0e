"""LoRA-XS: W' = W + s·B R A with A = Vᵀ_r and B = U_r Σ_r frozen, only R (r, r) trains, started at 0.

Bałazy et al., arXiv 2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Init, Method
from .low_rank import LowRankConfig, gated_factors, rank_fits
from .svd import decomposed


@dataclass(kw_only=True)
class LoraXsConfig(LowRankConfig):
    """LoRA-XS: LoRA's fields."""

    peft_type: ClassVar[str] = "LORA_XS"


def init(W, bias, config, new):
    r = config.r
    rank_fits(r, W)
    U, S, Vh = decomposed(W, new, rank=r)
    return Init({"lora_R": new(r, r).zero_()}, {"frozen_A": Vh.contiguous(), "frozen_B": U * S})


LORA_XS = Method(
    name="lora_xs",
    group="combine",
    config=LoraXsConfig,
    example=lambda r: LoraXsConfig(r=r, lora_alpha=2 * r),
    init=init,
    factors=lambda layer: gated_factors(layer, layer.frozen_A, layer.lora_R, layer.frozen_B),
    from_weight=True,
    disk_buffers=("frozen_A", "frozen_B"),
)
