"""Adapters with a bottleneck h( · Aᵀ + a) Bᵀ: beside a layer, or behind it.

Parallel adapter (He et al., arXiv 2110.04366): y = xWᵀ + b + s·h(xAᵀ + a)Bᵀ (+ c).
Houlsby (arXiv 1902.00751) and Pfeiffer (arXiv 2005.00247): y = z + h(zAᵀ + a)Bᵀ + c on a block's output z = xWᵀ + b,
out -> r -> out, before the residual connection. Extension group of arXiv 2407.05417.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..core.factors import ACTIVATIONS, Factors
from .base import Method, PeftConfig, positive, positive_int
from .defaults import BOTH_OUTPUTS, FFN_OUTPUTS
from .low_rank import LowRankConfig, kaiming_a_zero_b


@dataclass(kw_only=True)
class ParallelAdapterConfig(LowRankConfig):
    """A bottleneck beside a layer.

    nonlinearity: one between A and B: identity, relu, gelu, silu or tanh.
    use_bias: trained biases a (r,) and c (out,).
    learn_scale: a trained factor beside s, started at 1.
    """

    peft_type: ClassVar[str] = "PARALLEL_ADAPTER"

    nonlinearity: str = "relu"
    use_bias: bool = False
    learn_scale: bool = False


def parallel_init(W, bias, config, new):
    params = kaiming_a_zero_b(W, config.r, new)
    if config.use_bias:
        params |= {"down_bias": new(config.r).zero_(), "up_bias": new(W.shape[0]).zero_()}
    if config.learn_scale:
        params["scale"] = new(1).fill_(1)
    return params


def parallel_factors(layer):
    config, bias, gate = layer.config, None, None
    if config.use_bias:
        bias = layer.up_bias if layer.bias is None else layer.bias + layer.up_bias
    if config.learn_scale:
        gate = layer.scale.expand(config.r)
    return Factors(
        A=layer.lora_A,
        B=layer.lora_B,
        G=gate,
        a=layer.down_bias if config.use_bias else None,
        bias=bias,
        s=config.scaling,
        h=config.nonlinearity,
        p=config.lora_dropout,
    )


@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """A bottleneck behind a block; target_modules=None takes the architecture's output layers.

    kind: "houlsby" (after the attention and the feed-forward output) or "pfeiffer" (after the feed-forward output
        only); AdapterHub's double_seq_bn and seq_bn are aliases, and ``fused_peft.bottleneck`` makes a
        ParallelAdapterConfig of its par_bn and scaled_par_bn.
    r: width of the bottleneck.
    nonlinearity: one between its two products: identity, relu, gelu, silu or tanh.
    use_bias: trained biases a (r,) and c (out,).
    scaling: s.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    kind: str = "pfeiffer"
    r: int = 16
    nonlinearity: str = "relu"
    use_bias: bool = True
    scaling: float = 1.0

    def __post_init__(self):
        self.kind = {"double_seq_bn": "houlsby", "seq_bn": "pfeiffer"}.get(self.kind, self.kind)
        super().__post_init__()
        if self.kind not in ("houlsby", "pfeiffer"):
            raise ValueError(f"kind={self.kind!r} must be houlsby (double_seq_bn) or pfeiffer (seq_bn)")
        positive_int("r", self.r)
        positive("scaling", self.scaling)
        if self.nonlinearity not in ACTIVATIONS:
            raise ValueError(f"nonlinearity={self.nonlinearity!r} must be one of {', '.join(ACTIVATIONS)}")

    @property
    def target_defaults(self) -> dict[str, Any]:
        return {"target_modules": BOTH_OUTPUTS if self.kind == "houlsby" else FFN_OUTPUTS}

    @property
    def method_name(self) -> str:
        return self.kind


def bottleneck(kind: str, **kwargs) -> PeftConfig:
    """A config by AdapterHub's name: double_seq_bn, seq_bn, par_bn or scaled_par_bn (with a learned scale)."""
    if kind in ("par_bn", "scaled_par_bn"):
        return ParallelAdapterConfig(use_bias=True, learn_scale=kind == "scaled_par_bn", **kwargs)
    return BottleneckConfig(kind=kind, **kwargs)


def bottleneck_init(W, bias, config, new):
    width = W.shape[0]
    down = new(config.r, width)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    params = {"down": down, "up": new(width, config.r).zero_()}
    if config.use_bias:
        params |= {"down_bias": new(config.r).zero_(), "up_bias": new(width).zero_()}
    return params


def bottleneck_output(layer):
    config = layer.config
    return Factors(
        A=layer.down,
        B=layer.up,
        a=layer.down_bias if config.use_bias else None,
        bias=layer.up_bias if config.use_bias else None,
        s=config.scaling,
        h=config.nonlinearity,
    )


PARALLEL_ADAPTER = Method(
    name="parallel_adapter",
    stacks=False,
    group="extend",
    config=ParallelAdapterConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: ParallelAdapterConfig(r=r, lora_alpha=r, nonlinearity="gelu"),
    init=parallel_init,
    factors=parallel_factors,
)
HOULSBY, PFEIFFER = (
    Method(
        name=kind,
        group="extend",
        config=BottleneckConfig,
        A="down",
        B="up",
        example=lambda r, kind=kind: BottleneckConfig(kind=kind, r=r, nonlinearity="gelu"),
        init=bottleneck_init,
        output=bottleneck_output,
    )
    for kind in ("houlsby", "pfeiffer")
)
