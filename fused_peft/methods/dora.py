"""DoRA: W' = diag(m / ‖W + sBA‖_row) (W + s·B A), the norm not differentiated.

Liu et al., arXiv 2402.09353; combination group of arXiv 2407.05417. ‖W + sBA‖² per row is ‖W‖² + 2s Σ_r (WAᵀ)⊙B + s²
Σ_r (B AAᵀ)⊙B, in at least fp32 from the kept ‖W‖², so nothing of W's shape is made. With dropout on, y = (x −
drop(x))Wᵀ + g ⊙ (drop(x)Wᵀ + s·drop(x)AᵀBᵀ) + b with g = m / norm: Hugging Face PEFT's formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.factors import Factors
from ..core.ops import row_norm
from .base import Init, Method
from .lora import DISK, LoraConfig
from .lora import init as lora_init


@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """DoRA: LoraConfig with use_dora=True."""

    use_dora: bool = True


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def init(W, bias, config, new):
    params = lora_init(W, bias, config, new)
    squared = new(W.shape[0]) if W.is_meta else torch.linalg.vector_norm(W, dim=1, dtype=_wide(W[:0]).dtype).square_()
    magnitude = row_norm(W, squared, params["lora_A"], params["lora_B"], config.scaling)
    return Init({**params, "magnitude": magnitude}, {"base_norm2": squared})


def factors(layer):
    config = layer.config
    norm = row_norm(layer.matrix, layer.base_norm2, layer.lora_A, layer.lora_B, config.scaling)
    return Factors(
        A=layer.lora_A,
        B=layer.lora_B,
        d_out=layer.magnitude / norm,
        s=config.scaling,
        p=config.lora_dropout,
        drop_base=True,
    )


DORA = Method(
    name="dora",
    group="combine",
    config=DoraConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: DoraConfig(r=r, lora_alpha=2 * r),
    init=init,
    factors=factors,
    from_weight=True,
    reads_weight=True,
    disk={**DISK, "magnitude": "lora_magnitude_vector"},
)
