"""(IA)³: W' = diag(l) W, or W diag(l) where the layer is a feed-forward module; the bias is scaled too.

Liu et al., arXiv 2205.05638; reconstruction group of arXiv 2407.05417, where it scales the left subspace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..core.factors import Factors
from .base import Method, PeftConfig, naming
from .defaults import IA3_FEEDFORWARD, IA3_TARGETS


@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    """(IA)³.

    feedforward_modules: names or a regular expression of the layers whose input, not output, is scaled; None takes
        the architecture's.
    scale_bias: l multiplies the bias too, as PEFT does.
    init_ia3_weights: False starts from N(0, 1).
    fan_in_fan_out: as PEFT stores it; how a layer stores its weight is read from the layer.
    """

    peft_type: ClassVar[str] = "IA3"
    target_defaults: ClassVar[dict[str, Any]] = {
        "target_modules": IA3_TARGETS,
        "feedforward_modules": IA3_FEEDFORWARD,
    }
    training_only: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights"})
    beyond_peft: ClassVar[frozenset[str]] = frozenset(
        {"bias", "scale_bias", "layers_to_transform", "layers_pattern", "target_parameters", "trainable_token_indices"}
    )

    feedforward_modules: list[str] | str | None = field(default=None, metadata=naming("text"))
    scale_bias: bool = True
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        feedforward = self.feedforward_modules
        if isinstance(feedforward, str):
            self._compiles("feedforward_modules", feedforward)
        elif feedforward is not None:
            self.feedforward_modules = self._names("feedforward_modules", feedforward)
            if isinstance(self.target_modules, list):
                missing = sorted(set(self.feedforward_modules) - set(self.target_modules))
                if missing:
                    raise ValueError(f"feedforward_modules={missing!r} must be in target_modules={self.target_modules}")

    def resolved(self, **found) -> IA3Config:
        """Feed-forward names that are no targets themselves (when those came from "all-linear", say) as a pattern."""
        feedforward = found.get("feedforward_modules", self.feedforward_modules)
        targets = found.get("target_modules", self.target_modules)
        if isinstance(feedforward, list) and isinstance(targets, list) and set(feedforward) - set(targets):
            found["feedforward_modules"] = f".*({'|'.join(map(re.escape, feedforward))})"
        return replace(self, **found)

    def for_module(self, name: str) -> IA3Config:
        """A layer's config: its feedforward_modules matches everything, or is None."""
        feedforward = self.feedforward_modules or []
        if isinstance(feedforward, str):
            found = bool(re.fullmatch(feedforward, name))
        else:
            found = any(name.endswith(end) for end in feedforward)
        return replace(self, target_modules=None, target_parameters=None, feedforward_modules=".*" if found else None)


def init(W, bias, config, new):
    l = new(W.shape[1] if config.feedforward_modules else W.shape[0]).fill_(1)
    return {"ia3_l": l if config.init_ia3_weights else l.normal_()}


def factors(layer):
    if layer.config.feedforward_modules:
        return Factors(d_in=layer.ia3_l)
    return Factors(d_out=layer.ia3_l, scale_bias=layer.config.scale_bias)


IA3 = Method(
    name="ia3",
    group="reconstruct",
    config=IA3Config,
    example=lambda r: IA3Config(),
    init=init,
    factors=factors,
    disk={"ia3_l": "ia3_l"},
    disk_shape=lambda shape, config: (1, *shape) if config.feedforward_modules else (*shape, 1),
)
