"""AdaLoRA: W' = W + s·B diag(E) A, and a budget of ranks that moves to where they matter.

Zhang et al., arXiv 2303.10512; extension group of arXiv 2407.05417. s = alpha / (init_r + 1e-5), as Hugging Face PEFT.
After each step, ``on_step`` smooths the sensitivity |p · ∂p| of every entry and its uncertainty, scores each triplet
(Aᵢ, Eᵢ, Bᵢ) and sets E to zero outside the budget, which falls from init_r to target_r a layer along a cubic.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..core.factors import ACTIVATIONS
from .base import Init, Method, PeftConfig, positive, positive_int, probability
from .defaults import ADALORA_TARGETS
from .low_rank import gated_factors, normal_a_b

_PARTS = ("lora_A", "lora_E", "lora_B")
_SCHEDULE = frozenset({"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"})


@dataclass(kw_only=True)
class AdaLoraConfig(PeftConfig):
    """AdaLoRA.

    init_r, target_r: rank at the start, and on average in the end.
    lora_alpha: s = lora_alpha / (init_r + 1e-5).
    lora_dropout: probability on the input of A.
    tinit, tfinal: steps before the budget falls, and after it has fallen.
    deltaT: steps between allocations.
    beta1, beta2: smoothing of sensitivity and uncertainty.
    total_step: steps of the whole training.
    orth_reg_weight: weight of the penalty that ``fused_peft.orthogonality_penalty(model)`` returns.
    rank_pattern: the allocation of a stored adapter.
    nonlinearity: one between A and B: identity, relu, gelu, silu or tanh.
    fan_in_fan_out: as PEFT stores it; how a layer stores its weight is read from the layer.
    """

    peft_type: ClassVar[str] = "ADALORA"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": ADALORA_TARGETS}
    training_only: ClassVar[frozenset[str]] = _SCHEDULE | {"lora_dropout"}
    beyond_peft: ClassVar[frozenset[str]] = frozenset({"nonlinearity"})

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    nonlinearity: str = "identity"
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("init_r", "target_r", "deltaT"):
            positive_int(name, getattr(self, name))
        positive("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"total_step={self.total_step!r} must be the positive number of training steps")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} must lie below total_step - tfinal = {self.total_step - self.tfinal}, or the "
                "budget has no step in which to fall; lower tinit or tfinal, or raise total_step"
            )
        if self.nonlinearity not in ACTIVATIONS:
            raise ValueError(f"nonlinearity={self.nonlinearity!r} must be one of {', '.join(ACTIVATIONS)}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in (0, 1)")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight!r} must not be negative")
        pattern = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(pattern, dict) or not all(isinstance(kept, list | tuple) for kept in pattern.values()):
            raise TypeError(
                f"rank_pattern={self.rank_pattern!r} must be a stored allocation, {{name: [kept, ...]}}, or None"
            )
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} must not exceed init_r={self.init_r}")

    def for_module(self, name: str) -> AdaLoraConfig:
        """A stored adapter holds only the ranks it kept, scaled as before."""
        kept = (self.rank_pattern or {}).get(f"{name}.lora_E")
        if not name:
            return self
        rank_pattern = {"lora_E": kept} if kept else None
        return replace(self, target_modules=None, target_parameters=None, rank_pattern=rank_pattern)

    @property
    def r(self) -> int:
        kept = (self.rank_pattern or {}).get("lora_E")
        return sum(kept) if kept else self.init_r

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.init_r + 1e-5)

    def budget(self, step: int, initial: int, target: int) -> tuple[int, bool]:
        """(ranks in all, whether to allocate) at a step; ``initial`` and ``target`` are sums over layers."""
        end = self.total_step - self.tfinal
        if step <= self.tinit:
            return initial, False
        if step > end:
            return target, True
        left = 1 - (step - self.tinit) / (end - self.tinit)
        return int((initial - target) * left**3 + target), step % self.deltaT == 0


def init(W, bias, config, new):
    params = {**normal_a_b(W, config.r, new), "lora_E": new(config.r).zero_()}
    state = {
        f"{kind}_{name}": torch.zeros_like(params[name]) for name in _PARTS for kind in ("sensitivity", "uncertainty")
    }
    return Init(params, {**state, "kept": torch.ones_like(params["lora_E"], dtype=torch.bool)})


def _observe(layer):
    """Smooth |p ∂p| and its distance from the mean, entry by entry."""
    config = layer.config
    for name in _PARTS:
        p = getattr(layer, name)
        now = (p * p.grad).abs()
        mean, spread = getattr(layer, f"sensitivity_{name}"), getattr(layer, f"uncertainty_{name}")
        mean.mul_(config.beta1).add_(now, alpha=1 - config.beta1)
        spread.mul_(config.beta2).add_((now - mean).abs_(), alpha=1 - config.beta2)


def _scores(layer):
    """One score a triplet: that of E, and the means of those of A's row and B's column."""
    A, E, B = (getattr(layer, f"sensitivity_{n}") * getattr(layer, f"uncertainty_{n}") for n in _PARTS)
    return (E + A.mean(-1) + B.mean(-2)).flatten()


@torch.no_grad()
def on_step(layers, step):
    """After optimizer.step() and before zero_grad(): observe, and allocate when the schedule says so."""
    config = layers[0][1].config
    end = config.total_step - config.tfinal
    if step < end:
        for path, layer in layers:  # all of them first: a refused step must not have been counted
            for name in _PARTS:
                if getattr(layer, name).grad is None:
                    raise RuntimeError(
                        f"on_step needs the gradients, and {path}.{name} has none: call it after backward and before "
                        "zero_grad"
                    )
        grads = [getattr(layer, name).grad for _, layer in layers for name in _PARTS]
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            warnings.warn(
                f"step {step}: AdaLoRA passes over gradients that are not finite, as a scaled step skipped has"
            )
            return
        for _, layer in layers:
            _observe(layer)
    if step <= end:
        initial = sum(layer.lora_E.numel() for _, layer in layers)
        target = sum(config.target_r * layer.lora_E.shape[:-1].numel() for _, layer in layers)
        budget, allocate = config.budget(step, initial, target)
        if (allocate or step == end) and budget < initial:
            scores = [_scores(layer) for _, layer in layers]
            bar = torch.cat(scores).kthvalue(initial - budget).values
            for (_, layer), score in zip(layers, scores, strict=True):
                layer.kept.copy_((score > bar).view_as(layer.kept))
                layer.lora_E.mul_(layer.kept)
    else:
        for _, layer in layers:
            layer.lora_E.mul_(layer.kept)


ADALORA = Method(
    name="adalora",
    group="extend",
    config=AdaLoraConfig,
    A="lora_A",
    B="lora_B",
    example=lambda r: AdaLoraConfig(init_r=r, target_r=r, lora_alpha=2 * r, total_step=100),
    init=init,
    factors=lambda layer: gated_factors(layer, layer.lora_A, layer.lora_E, layer.lora_B),
    on_step=on_step,
    disk={name: name for name in _PARTS},
    disk_shape=lambda shape, config: (*shape, 1),
)
