"""The shapes and configs that every method, backend and benchmark is checked on."""

from __future__ import annotations

from dataclasses import dataclass

import fused_peft as fp


@dataclass(frozen=True)
class Shape:
    """lead: leading dimensions of x; K in, N out, rank r."""

    lead: tuple[int, ...]
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.lead)) or '1-D'}-{self.K}-{self.N}-r{self.r}"


SHAPES = (
    Shape((5,), 7, 11, 3),  # odd everywhere, r not a power of two
    Shape((2, 3), 8, 4, 1),  # r = 1
    Shape((1,), 33, 17, 4),  # a single row
    Shape((0,), 6, 5, 2),  # an empty batch
    Shape((), 9, 6, 6),  # 1-D input, r = min(in, out)
    Shape((2, 1, 3), 13, 16, 5),
)
SMALL = SHAPES[0]


@dataclass(frozen=True)
class Case:
    """One method variant: its config for a rank, and the constants its formula needs."""

    name: str
    method: str
    config: object  # r -> config
    constants: object = None  # config -> dict

    def make(self, r: int):
        return self.config(r)

    def formula_constants(self, config) -> dict:
        return self.constants(config) if self.constants else {}


def _s(config):
    return {"s": config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)}


CASES = (
    Case("lora", "lora", lambda r: fp.LoraConfig(r=r, lora_alpha=2.5 * r), _s),
    Case("rslora", "lora", lambda r: fp.LoraConfig(r=r, lora_alpha=3, use_rslora=True), _s),
    Case("lora_bias", "lora", lambda r: fp.LoraConfig(r=r, lora_alpha=3, lora_bias=True), _s),
    Case("lora_dropout", "lora", lambda r: fp.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.4), _s),
    Case("ia3", "ia3", lambda r: fp.IA3Config()),
    Case("ia3_unscaled_bias", "ia3", lambda r: fp.IA3Config(scale_bias=False), lambda c: {"scale_bias": False}),
    Case(
        "ia3_feedforward",
        "ia3",
        lambda r: fp.IA3Config(feedforward_modules=".*"),
        lambda c: {"feedforward": True},
    ),
    Case("ssl", "ssl", lambda r: fp.SSLConfig()),
    Case("ssb", "ssb", lambda r: fp.SSBConfig()),
    Case("bitfit", "bitfit", lambda r: fp.BitFitConfig()),
)
