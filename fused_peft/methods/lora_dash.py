"""LoRA-Dash: W' = W + s·B A, and after ``warmup`` steps + U_t diag(dash) V_tᵀ along the t directions of W that ΔW
uses most.

Si et al., arXiv 2409.01035; combination group of arXiv 2407.05417. The directions are those with the largest |uᵢᵀ ΔW
vᵢ| / σᵢ at step ``warmup``, or the first step after it that is not left out. The parameter dash (t,) exists from the
start; until then its directions are zero.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.factors import Factors
from .base import Init, Method, positive_int
from .low_rank import LowRankConfig, kaiming_a_zero_b
from .svd import decomposed

_CHOSEN = weakref.WeakSet()  # layers known to have their directions, so that no later step has to look


@dataclass(kw_only=True)
class LoraDashConfig(LowRankConfig):
    """LoRA-Dash.

    directions: t.
    warmup: the step of ``fused_peft.on_step`` after which the directions are chosen.
    """

    peft_type: ClassVar[str] = "LORA_DASH"

    training_only: ClassVar[frozenset[str]] = LowRankConfig.training_only | {"warmup"}

    directions: int = 8
    warmup: int = 100

    def __post_init__(self):
        super().__post_init__()
        positive_int("directions", self.directions)
        positive_int("warmup", self.warmup)
        if self.nonlinearity != "identity":
            raise ValueError(
                f"nonlinearity={self.nonlinearity!r}: LoRA-Dash adds two products, so it must be 'identity'"
            )


def init(W, bias, config, new):
    t = config.directions
    if t > min(W.shape):
        raise ValueError(f"directions={t} must not exceed min(in_features, out_features)={min(W.shape)} of the layer")
    params = {**kaiming_a_zero_b(W, config.r, new), "dash": new(t).zero_()}
    return Init(params, {"dash_U": new(W.shape[0], t).zero_(), "dash_Vh": new(t, W.shape[1]).zero_()})


def factors(layer):
    config = layer.config
    lora = Factors(A=layer.lora_A, B=layer.lora_B, s=config.scaling, p=config.lora_dropout)
    return lora + Factors(A=layer.dash_Vh, B=layer.dash_U, G=layer.dash, p=config.lora_dropout)


def acts(layer, step):
    warmup = layer.config.warmup
    return step == warmup or (step > warmup and layer not in _CHOSEN)


@torch.no_grad()
def on_step(layers, step):
    """At the warm-up step, or the first one after it where that was left out, write each layer's directions into its
    buffers."""
    for name, layer in layers:
        own = getattr(layer, "_layer", layer)  # behind a gathered copy
        if step > layer.config.warmup and layer.dash_U.any():  # resumed
            _CHOSEN.add(own)
            continue
        try:
            U, S, Vh = decomposed(layer.matrix, layer.matrix.new_empty)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        A, B = (t.to(U.dtype) for t in (layer.lora_A, layer.lora_B))
        used = ((U.T @ B) * (Vh @ A.T)).sum(1).abs() * layer.config.scaling / S.clamp_min(torch.finfo(S.dtype).tiny)
        chosen = used.topk(layer.config.directions).indices
        layer.dash_U.copy_(U[:, chosen])
        layer.dash_Vh.copy_(Vh[chosen])
        _CHOSEN.add(own)


LORA_DASH = Method(
    name="lora_dash",
    group="combine",
    config=LoraDashConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: LoraDashConfig(r=r, lora_alpha=2 * r, directions=min(r, 8)),
    init=init,
    factors=factors,
    acts=acts,
    on_step=on_step,
    decomposes_later=True,
    disk_buffers=("dash_U", "dash_Vh"),
)
