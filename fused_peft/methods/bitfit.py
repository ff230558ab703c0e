"""BitFit: W' = W, and the bias trains.

Ben Zaken et al., arXiv 2106.10199; reconstruction group of arXiv 2407.05417. A layer trains a copy of its bias (zeros
where it had none), so the base stays restorable; the biases of layers without a weight matrix train in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.factors import Factors
from .base import Method, PeftConfig


@dataclass(kw_only=True)
class BitFitConfig(PeftConfig):
    """target_modules=None trains every bias of the model; else those of the matched linear layers train."""

    peft_type: ClassVar[str] = "BITFIT"


BITFIT = Method(
    name="bitfit",
    stacks=False,
    group="reconstruct",
    config=BitFitConfig,
    example=lambda r: BitFitConfig(),
    init=lambda W, bias, config, new: {
        "bitfit_bias": new(W.shape[0]).zero_() if bias is None else bias.detach().clone()
    },
    factors=lambda layer: Factors(bias=layer.bitfit_bias),
    trains_other_biases=True,
)
