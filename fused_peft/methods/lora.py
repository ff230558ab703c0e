"""LoRA: W' = W + s·B A, s = alpha / r, or alpha / √r with use_rslora; and the starts that take from W what A, B add.

Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PiSSA (top r singular triplets), arXiv 2404.02948; MiLoRA (bottom
r), arXiv 2406.09044; OLoRA (QR), arXiv 2406.01775. Extension and reconstruction groups of arXiv 2407.05417. For the
last three W' = (W − s·B₀A₀) + s·B A: W stays as it is, and A₀, −B₀ are frozen beside A, B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..core.factors import Factors
from .base import Init, Method
from .low_rank import LowRankConfig, kaiming_a_zero_b, rank_fits
from .svd import decomposed, finite

_FROM_W = ("pissa", "milora", "olora")


@dataclass(kw_only=True)
class LoraConfig(LowRankConfig):
    """LoRA.

    lora_bias: a trained bias on B.
    use_dora: weight-decomposed (DoRA).
    init_lora_weights: True (A kaiming_uniform(√5), B 0), "gaussian" (A N(0, 1/r²), B 0), "pissa", "pissa_niter_<n>"
        (randomised SVD), "milora", "olora", or False (both random, not the identity: for tests).
    """

    peft_type: ClassVar[str] = "LORA"

    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        how = self.init_lora_weights
        named = how in ("gaussian", *_FROM_W) or re.fullmatch(r"pissa_niter_\d+", str(how))
        if not isinstance(how, bool) and not named:
            raise ValueError(
                f"init_lora_weights={how!r} must be True, False, 'gaussian', 'pissa', 'pissa_niter_<n>', 'milora' or "
                "'olora'"
            )
        if self.use_dora and (
            self.lora_bias or self.nonlinearity != "identity" or str(how).partition("_")[0] in _FROM_W
        ):
            raise ValueError("use_dora=True excludes lora_bias, nonlinearity and initialisations that change the base")

    @property
    def method_name(self) -> str:
        how = str(self.init_lora_weights).partition("_")[0]
        return "dora" if self.use_dora else how if how in _FROM_W else "lora"


@dataclass(kw_only=True)
class PissaConfig(LoraConfig):
    """LoRA started from the r largest singular triplets of W."""

    init_lora_weights: bool | str = "pissa"


@dataclass(kw_only=True)
class MiloraConfig(LoraConfig):
    """LoRA started from the r smallest singular triplets of W."""

    init_lora_weights: bool | str = "milora"


@dataclass(kw_only=True)
class OloraConfig(LoraConfig):
    """LoRA started from the first r columns of W = QR."""

    init_lora_weights: bool | str = "olora"


def init(W, bias, config, new):
    params = kaiming_a_zero_b(W, config.r, new)
    if config.init_lora_weights == "gaussian":
        params["lora_A"].normal_(std=1 / config.r)
    if config.init_lora_weights is False:
        nn.init.kaiming_uniform_(params["lora_B"], a=5**0.5)
    if config.lora_bias:
        params["lora_B_bias"] = new(W.shape[0]).zero_()
    return params


def init_lookup(W, bias, config, new):
    """As Hugging Face PEFT on embeddings: A 0, so that a row that is never looked up stays, and B N(0, 1)."""
    params = {**init(W, bias, config, new), "lora_B": new(W.shape[0], config.r).normal_()}
    params["lora_A"].normal_() if config.init_lora_weights is False else params["lora_A"].zero_()
    return params


def init_from_weight(W, bias, config, new):
    rank_fits(config.r, W)
    how, r, s = config.init_lora_weights, config.r, config.scaling
    if how == "olora":
        Q, R = (new(W.shape[0], r), new(r, W.shape[1])) if W.is_meta else torch.linalg.qr(finite(W))
        A, B = R[:r], Q[:, :r]
    else:
        niter = int(how.rpartition("_")[2]) if how.startswith("pissa_niter") else None
        U, S, Vh = decomposed(W, new, rank=None if how == "milora" else r, niter=niter)
        part = slice(-r, None) if how == "milora" else slice(r)
        root = (S[part] / s).sqrt()
        A, B = root[:, None] * Vh[part], U[:, part] * root
    params = {"lora_A": A.contiguous(), "lora_B": B.contiguous()}
    if config.lora_bias:
        params["lora_B_bias"] = new(W.shape[0]).zero_()
    # what A, B start from, as they will be rounded: at the start the two products cancel
    frozen = {"residual_A": new(r, W.shape[1]).copy_(A), "residual_B": new(W.shape[0], r).copy_(B).neg_()}
    return Init(params, frozen)


def factors(layer):
    config, s, bias = layer.config, layer.config.scaling, None
    if config.lora_bias:
        bias = s * layer.lora_B_bias if layer.bias is None else torch.add(layer.bias, layer.lora_B_bias, alpha=s)
    return Factors(A=layer.lora_A, B=layer.lora_B, bias=bias, s=s, h=config.nonlinearity, p=config.lora_dropout)


def residual(layer):
    return Factors(A=layer.residual_A, B=layer.residual_B, s=layer.config.scaling)


DISK = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}

LORA = Method(
    name="lora",
    group="extend",
    config=LoraConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: LoraConfig(r=r, lora_alpha=2 * r),
    init=init,
    init_lookup=init_lookup,
    factors=factors,
    disk=DISK,
    disk_lookup={"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
)
PISSA, MILORA, OLORA = (
    Method(
        name=name,
        group="extend",
        config=config,
        A="lora_A",
        B="lora_B",
        example=lambda r, config=config: config(r=r, lora_alpha=2 * r),
        init=init_from_weight,
        factors=factors,
        residual=residual,
        from_weight=True,
        disk_buffers=("residual_A", "residual_B"),
        remade=lambda config: not str(config.init_lora_weights).startswith("pissa_niter"),
        disk=DISK,
    )
    for name, config in (("pissa", PissaConfig), ("milora", MiloraConfig), ("olora", OloraConfig))
)
