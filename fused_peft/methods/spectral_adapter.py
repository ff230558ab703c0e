"""Spectral adapter: W' = (U + [A 0]) Σ (V + [Bᵀ 0])ᵀ = W + s·(AΣᵣB + UᵣΣᵣB + AΣᵣVᵣᵀ), on the r largest triplets.

Zhang and Pilanci, arXiv 2405.13952; combination group of arXiv 2407.05417. lora_A is (out, r) and lora_B (r, in)
here, as in the paper. Computed as (A + Uᵣ)ΣᵣB + AΣᵣVᵣᵀ: one product of rank 2r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.factors import Factors
from .base import Init, Method
from .low_rank import LowRankConfig, rank_fits
from .svd import decomposed


@dataclass(kw_only=True)
class SpectralAdapterConfig(LowRankConfig):
    """Spectral adapter: LoRA's fields, s = 1 unless lora_alpha is given."""

    peft_type: ClassVar[str] = "SPECTRAL_ADAPTER"

    lora_alpha: float | None = None


def init(W, bias, config, new):
    r = config.r
    rank_fits(r, W)
    U, S, Vh = decomposed(W, new, rank=r)
    params = {"lora_A": new(W.shape[0], r).zero_(), "lora_B": new(r, W.shape[1]).zero_()}
    return Init(params, {"top_U": U.contiguous(), "top_S": S.contiguous(), "top_Vh": Vh.contiguous()})


def factors(layer):
    A, B, S = layer.lora_A, layer.lora_B, layer.top_S
    return Factors(
        A=torch.cat([B, layer.top_Vh]),
        B=torch.cat([(A + layer.top_U) * S, A * S], dim=1),
        s=layer.config.scaling,
        p=layer.config.lora_dropout,
    )


SPECTRAL_ADAPTER = Method(
    name="spectral_adapter",
    stacks=False,
    group="combine",
    config=SpectralAdapterConfig,
    A="lora_B",
    B="lora_A",
    example=lambda r: SpectralAdapterConfig(r=r),
    init=init,
    factors=factors,
    from_weight=True,
    disk_buffers=("top_U", "top_S", "top_Vh"),
)
