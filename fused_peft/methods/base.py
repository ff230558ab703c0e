"""What a method is: a config, an ``init`` that makes every parameter once, and ``factors`` for the forward.

A method file imports ``factors`` and this file, declares one ``Method`` and nothing else; no other file knows its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from ..factors import Factors

METHODS: dict[str, Method] = {}


def option(default: Any = None, **kwargs):
    """A config field; mutable defaults are copied per instance."""
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), **kwargs)
    return field(default=default, **kwargs)


@dataclass(kw_only=True)
class PeftConfig:
    """Fields common to all methods, named and meant as in Hugging Face PEFT.

    target_modules: names (a module matches when its full name equals one or ends with "." + one), a regular expression
        for the full name, "all-linear", or None for the architecture's usual modules.
    exclude_modules: names or a regular expression, never adapted even when targeted.
    layers_to_transform, layers_pattern: restrict to these indices of the ModuleList, with target_modules as names.
    modules_to_save: modules trained and saved whole (a classifier head); a copy, so tied weights stay untouched.
    bias: which biases train: "none", "all", or "<method>_only" for those of adapted layers.
    task_type: SEQ_CLS, TOKEN_CLS and QUESTION_ANS add their heads to modules_to_save, as PEFT's model classes do.

    Raises ValueError or TypeError that names the field, the value and what is allowed.
    """

    peft_type: ClassVar[str]
    # field -> {model_type: the architecture's value}, used where the field is None
    target_defaults: ClassVar[dict[str, Any]] = {}
    # fields that PEFT's config of this peft_type lacks: stored only when they are set
    beyond_peft: ClassVar[frozenset[str]] = frozenset()

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self):
        self.task_type = getattr(self.task_type, "value", self.task_type)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                self._compiles(name, value)
            elif value is not None:
                setattr(self, name, self._names(name, value))
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list of names, not a string")
            self.modules_to_save = self._names("modules_to_save", self.modules_to_save)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names; with a "
                f"regular expression ({self.target_modules!r}) put the layer indices into it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform to be given too")
        only = f"{self.peft_type.lower()}_only"
        if self.bias not in ("none", "all", only):
            raise ValueError(f"bias={self.bias!r} must be 'none', 'all' or {only!r}")

    @staticmethod
    def _compiles(name: str, value: str) -> None:
        try:
            re.compile(value)
        except re.error as e:
            raise ValueError(f"{name}={value!r} is not a valid regular expression: {e}") from e

    @staticmethod
    def _names(name: str, value) -> list[str]:
        names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
        if not all(isinstance(n, str) and n for n in names):
            raise TypeError(f"{name}={value!r} must hold non-empty strings")
        return names

    def resolved(self, **found) -> PeftConfig:
        """The config with a model's own values filled in."""
        return replace(self, **found)

    def for_module(self, name: str) -> PeftConfig:
        """The config of one layer, with every per-name pattern resolved."""
        return self

    def describe(self) -> str:
        """The hyper-parameters shown in a layer's repr."""
        common = {f.name for f in fields(PeftConfig)} | {"fan_in_fan_out"}
        defaults = type(self)()
        shown = [f.name for f in fields(self) if f.name not in common]
        return ", ".join(
            f"{n}={getattr(self, n)!r}"
            for n in shown
            if n in ("r", "lora_alpha") or getattr(self, n) != getattr(defaults, n)
        )


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    init(W, bias, config) -> {name: tensor}: every trainable tensor of a layer, made once; W is (out, in), bias (out,)
        or None; tensors come in any dtype, on W's device. Raises ValueError when the shapes cannot carry the config.
    factors(layer) -> Factors: reads the layer's parameters by attribute and ``layer.config``, ``layer.bias``.
    disk: parameter name -> key suffix in a checkpoint, where Hugging Face PEFT has the method.
    disk_shape(shape, config): the shape a one-dimensional parameter has on disk, where PEFT's differs.
    """

    name: str
    group: str
    config: type[PeftConfig]
    init: Callable[[Tensor, Tensor | None, PeftConfig], dict[str, Tensor]]
    factors: Callable[[Any], Factors]
    disk: dict[str, str] = field(default_factory=dict)
    disk_shape: Callable[[tuple[int, ...], PeftConfig], tuple[int, ...]] = lambda shape, config: shape
    # True when the biases of layers without a weight matrix (LayerNorm) belong to the method
    trains_other_biases: bool = False

    def __post_init__(self):
        METHODS[self.name] = self

    def __reduce__(self):
        return method, (self.name,)

    def disk_key(self, param: str) -> str:
        return self.disk.get(param, f"{self.name}_{param.removeprefix(self.name + '_')}")


def method(name: str) -> Method:
    """The registered method; ValueError lists the known names."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method {name!r} is unknown; known methods: {', '.join(sorted(METHODS))}") from None


def method_of(config: PeftConfig) -> Method:
    """The method a config belongs to; TypeError when it is not one of this library's configs."""
    for m in METHODS.values():
        if type(config) is m.config:
            return m
    raise TypeError(
        f"config is a {type(config).__module__}.{type(config).__qualname__}, but must be one of fused_peft's: "
        + ", ".join(sorted(m.config.__name__ for m in METHODS.values()))
    )


def positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive finite number")


def probability(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1)")


def matching_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT's rank_pattern does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


__all__ = ["METHODS", "Method", "PeftConfig", "method", "method_of", "replace"]
