"""SSL: W' = W diag(d_in).  SSB: W' = diag(d_out) W diag(d_in), the bias outside.

Scale the right, or both, singular subspaces: arXiv 2407.05417, reconstruction group (torch layout, the paper has xW).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.factors import Factors
from .base import Method, PeftConfig
from .defaults import IA3_TARGETS


@dataclass(kw_only=True)
class SSLConfig(PeftConfig):
    """No hyper-parameters: one trained scale per input feature, started at 1."""

    peft_type: ClassVar[str] = "SSL"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": IA3_TARGETS}


@dataclass(kw_only=True)
class SSBConfig(PeftConfig):
    """No hyper-parameters: one trained scale per input and per output feature, started at 1."""

    peft_type: ClassVar[str] = "SSB"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": IA3_TARGETS}


SSL = Method(
    name="ssl",
    group="reconstruct",
    config=SSLConfig,
    example=lambda r: SSLConfig(),
    init=lambda W, bias, config, new: {"d_in": new(W.shape[1]).fill_(1)},
    factors=lambda layer: Factors(d_in=layer.d_in),
)

SSB = Method(
    name="ssb",
    group="reconstruct",
    config=SSBConfig,
    example=lambda r: SSBConfig(),
    init=lambda W, bias, config, new: {"d_in": new(W.shape[1]).fill_(1), "d_out": new(W.shape[0]).fill_(1)},
    factors=lambda layer: Factors(d_in=layer.d_in, d_out=layer.d_out),
)
