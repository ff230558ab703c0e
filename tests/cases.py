"""The shapes and configs that every method, backend and benchmark is checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
WIDE = Shape((150,), 65, 72, 5)  # several tiles each way, none of them full, and several row shares


@dataclass(frozen=True)
class Case:
    """One method variant: r -> its config, and (layer, config) -> the constants its formula needs."""

    name: str
    method: str
    make: Callable
    constants: Callable = lambda layer, config: {}


NONLINEAR = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda t: t}


def _s(layer, config):
    s = 1.0 if config.lora_alpha is None else config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {"s": s, "h": NONLINEAR[config.nonlinearity]}


def _adalora(layer, config):
    return {"s": config.lora_alpha / (config.init_r + 1e-5), "h": NONLINEAR[config.nonlinearity]}


def _bottleneck(layer, config):
    return {"s": config.scaling, "h": NONLINEAR[config.nonlinearity]}


def _dash(layer, config):
    return {**_s(layer, config), "U": layer.dash_U, "Vh": layer.dash_Vh}


def _vera(layer, config):
    return {"A0": layer.vera_A, "B0": layer.vera_B}


def _low_rank(name, config, **kwargs):
    """LoRA's hyper-parameters on another method."""
    return Case(name, name.partition("+")[0], lambda r: config(r=r, lora_alpha=2.5 * r, **kwargs), _s)


def _ada(r, **kwargs):
    return fp.AdaLoraConfig(init_r=r, target_r=r, lora_alpha=3, total_step=10, **kwargs)


CASES = (
    _low_rank("lora", fp.LoraConfig),
    Case("rslora", "lora", lambda r: fp.LoraConfig(r=r, lora_alpha=3, use_rslora=True), _s),
    _low_rank("lora+bias", fp.LoraConfig, lora_bias=True),
    _low_rank("lora+dropout", fp.LoraConfig, lora_dropout=0.4),
    _low_rank("lora+n", fp.LoraConfig, nonlinearity="silu"),
    Case("pissa", "pissa", lambda r: fp.PissaConfig(r=r, lora_alpha=2 * r), _s),
    Case("milora", "milora", lambda r: fp.MiloraConfig(r=r, lora_alpha=2 * r), _s),
    Case("olora+dropout", "olora", lambda r: fp.OloraConfig(r=r, lora_dropout=0.3), _s),
    Case("ia3", "ia3", lambda r: fp.IA3Config()),
    Case("ia3+unscaled_bias", "ia3", lambda r: fp.IA3Config(scale_bias=False), lambda *_: {"scale_bias": False}),
    Case("ia3+feedforward", "ia3", lambda r: fp.IA3Config(feedforward_modules=".*"), lambda *_: {"feedforward": True}),
    Case("ssl", "ssl", lambda r: fp.SSLConfig()),
    Case("ssb", "ssb", lambda r: fp.SSBConfig()),
    Case("bitfit", "bitfit", lambda r: fp.BitFitConfig()),
    Case("sam_parser", "sam_parser", lambda r: fp.SamParserConfig()),
    Case("svdiff", "svdiff", lambda r: fp.SVDiffConfig()),
    Case("diff_pruning", "diff_pruning", lambda r: fp.DiffPruningConfig(density=0.3)),
    Case("adalora", "adalora", lambda r: _ada(r), _adalora),
    Case("adalora+dropout", "adalora", lambda r: _ada(r, lora_dropout=0.3), _adalora),
    Case("adalora+n", "adalora", lambda r: _ada(r, nonlinearity="relu"), _adalora),
    Case("trilora", "trilora", lambda r: fp.TriLoraConfig(r=r), _s),
    _low_rank("trilora+dropout", fp.TriLoraConfig, lora_dropout=0.3),
    _low_rank("flora", fp.FloraConfig),
    _low_rank("flora+dropout+n", fp.FloraConfig, lora_dropout=0.3, nonlinearity="gelu"),
    _low_rank("moslora", fp.MosLoraConfig),
    _low_rank("kasa", fp.KasaConfig),
    _low_rank("liera", fp.LieraConfig),
    *(_low_rank(f"parallel_adapter+{h}", fp.ParallelAdapterConfig, nonlinearity=h) for h in NONLINEAR),
    _low_rank("parallel_adapter+all", fp.ParallelAdapterConfig, use_bias=True, learn_scale=True, lora_dropout=0.2),
    Case("houlsby", "houlsby", lambda r: fp.BottleneckConfig(kind="houlsby", r=min(r, 4)), _bottleneck),
    Case(
        "pfeiffer+gelu",
        "pfeiffer",
        lambda r: fp.BottleneckConfig(r=min(r, 4), nonlinearity="gelu", use_bias=False, scaling=0.7),
        _bottleneck,
    ),
    _low_rank("dora", fp.DoraConfig),
    _low_rank("dora+dropout", fp.DoraConfig, lora_dropout=0.4),
    _low_rank("spectral_adapter", fp.SpectralAdapterConfig),
    Case("lora_dash", "lora_dash", lambda r: fp.LoraDashConfig(r=r, directions=min(r, 3), warmup=3), _dash),
    _low_rank("lora_xs", fp.LoraXsConfig),
    Case("vera", "vera", lambda r: fp.VeraConfig(r=2 * r), _vera),
    Case("vera+dropout", "vera", lambda r: fp.VeraConfig(r=2 * r, vera_dropout=0.3), _vera),
    Case("delora", "delora", lambda r: fp.DeloraConfig(r=r)),
)
