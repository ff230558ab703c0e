"""VeRA: W' = W + diag(b) B diag(d) A with A, B random, frozen and shared by all layers; only d (r,) and b (out,) train.

Kopiczko et al., arXiv 2310.11454. A and B come from ``projection_prng_key`` exactly as in Hugging Face PEFT, sized
for the largest adapted layer; a layer reads their first in_features columns and out_features rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from ..core.factors import Factors
from .base import Init, Method, PeftConfig, positive_int, probability
from .defaults import LORA_TARGETS


@dataclass(kw_only=True)
class VeraConfig(PeftConfig):
    """VeRA.

    r: rank of A and B.
    d_initial: start of d.
    vera_dropout: probability on the input of A.
    projection_prng_key: seed of A and B.
    save_projection: store A and B; else they are made again from the key.
    init_weights: b at 0 (True), or N(0, 1) (False): not the identity, for tests.
    projection_shape: (largest out, largest in) of the adapted layers, found by get_peft_model.
    fan_in_fan_out: as PEFT stores it; how a layer stores its weight is read from the layer.
    """

    peft_type: ClassVar[str] = "VERA"
    target_defaults: ClassVar[dict[str, Any]] = {
        "target_modules": {**LORA_TARGETS, "phi": ["q_proj", "v_proj"]},
    }
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"d_initial", "vera_dropout", "save_projection", "init_weights", "projection_shape"}
    )
    beyond_peft: ClassVar[frozenset[str]] = frozenset(
        {"projection_shape", "target_parameters", "trainable_token_indices"}
    )

    r: int = 256
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    projection_prng_key: int = 0
    save_projection: bool = False
    init_weights: bool = True
    fan_in_fan_out: bool = False
    projection_shape: tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        positive_int("r", self.r)
        probability("vera_dropout", self.vera_dropout)
        if not isinstance(self.projection_prng_key, int):
            raise TypeError(f"projection_prng_key={self.projection_prng_key!r} must be an integer, the seed of A and B")

    def for_targets(self, shapes: list[tuple[int, int]]) -> VeraConfig:
        return replace(self, projection_shape=tuple(map(max, zip(*shapes, strict=True))))

    def stored(self) -> dict[str, Any]:
        return {**super().stored(), "projection_shape": None}


@lru_cache(maxsize=4)
def projection(r: int, out_features: int, in_features: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in), B (out, r): kaiming uniform from the key, on the CPU."""
    generator = torch.Generator().manual_seed(key)
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / r)
    A = torch.empty(r, in_features).uniform_(-a, a, generator=generator)
    return A, torch.empty(out_features, r).uniform_(-b, b, generator=generator)


def init(W, bias, config, new):
    r, (N, K) = config.r, W.shape
    b, d = new(N).zero_(), new(r).fill_(config.d_initial)
    if not config.init_weights:
        b.normal_()
    if W.is_meta:
        A, B = new(r, K), new(N, r)
    else:
        A, B = projection(r, *(config.projection_shape or (N, K)), config.projection_prng_key)
        A, B = A[:, :K].to(d, copy=True), B[:N].to(d, copy=True)  # loading writes into them, and the cache is shared
    return Init({"vera_lambda_d": d, "vera_lambda_b": b}, {"vera_A": A, "vera_B": B})


VERA = Method(
    name="vera",
    group="extend",
    config=VeraConfig,
    example=lambda r: VeraConfig(r=r),
    init=init,
    factors=lambda layer: Factors(
        A=layer.vera_A,
        B=layer.vera_B * layer.vera_lambda_b[..., None],
        G=layer.vera_lambda_d,
        p=layer.config.vera_dropout,
    ),
    disk={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
    disk_shared=("vera_A", "vera_B"),
)
