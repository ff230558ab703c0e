"""What a method is: a config, an ``init`` that makes every parameter once, and ``factors`` for the forward.

A method file imports ``factors`` and this file, declares one ``Method`` and nothing else; no other file knows its name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..core.factors import Factors

METHODS: dict[str, Method] = {}
# makes an uninitialised tensor of a shape, in the adapter's dtype on the weight's device
New = Callable[..., Tensor]


class Init(NamedTuple):
    """What a layer starts from: trainable tensors, and frozen tensors kept in its state."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor] = {}


# Hugging Face PEFT's TaskType
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def naming(rule: str) -> dict[str, str]:
    """Metadata of a field whose entries (or keys) name modules: get_peft_model reports those that match nothing.

    rule, how an entry means a module's name: "end" (equal, or its last parts; a string instead of a list is a regular
    expression for the whole name), "text" (its last characters), "whole" (equal), "pattern" (as ``matching_pattern``),
    "index" (the layer's index), "container" (what holds the numbered layers) or "parameter" (as "end", of parameters).
    """
    return {"names": rule}


class Root:
    """What configs derive from until Hugging Face PEFT is imported: then its own PeftConfig takes this one's place."""


@dataclass(kw_only=True)
class PeftConfig(Root):
    """Fields common to all methods, named and meant as in Hugging Face PEFT, of whose PeftConfig it is a subclass once
    PEFT is imported (``integrations.configs``).

    target_modules: names (a module matches when its full name equals one or ends with "." + one), a regular expression
        for the full name, "all-linear", or None for the architecture's usual modules.
    target_parameters: names of parameters to adapt where they are: stacks of experts (experts, out, in) and matrices
        that a module multiplies by itself (a router's weight); equal to the full name, or to its end.
    exclude_modules: names or a regular expression, never adapted even when targeted.
    layers_to_transform, layers_pattern: restrict to these indices of the ModuleList, with target_modules as names.
    modules_to_save: modules trained and saved whole (a classifier head); a copy, so tied weights stay untouched.
    trainable_token_indices: token ids whose rows of the input embeddings train, or {embedding: ids}; a head that is
        tied to the embeddings follows.
    bias: which biases train: "none", "all", or "<method>_only" for those of adapted layers.
    task_type: SEQ_CLS, TOKEN_CLS and QUESTION_ANS add their heads to modules_to_save, as PEFT's model classes do.
    inference_mode: the adapter is for use alone: it does not train.
    base_model_name_or_path, revision: where the base model comes from; written by save_pretrained where known.

    An entry that names modules and matches none is named in a warning of get_peft_model. Raises ValueError or TypeError
    that names the field, the value and what is allowed.
    """

    peft_type: ClassVar[str]
    # field -> {model_type: the architecture's value}, used where the field is None
    target_defaults: ClassVar[dict[str, Any]] = {}
    # fields that say how to train and nothing of what trained values compute
    training_only: ClassVar[frozenset[str]] = frozenset()
    # fields that PEFT's config of this peft_type lacks: stored only when they are set
    beyond_peft: ClassVar[frozenset[str]] = frozenset({"target_parameters", "trainable_token_indices"})

    target_modules: list[str] | str | None = field(default=None, metadata=naming("end"))
    target_parameters: list[str] | None = field(default=None, metadata=naming("parameter"))
    exclude_modules: list[str] | str | None = field(default=None, metadata=naming("end"))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=naming("index"))
    layers_pattern: list[str] | str | None = field(default=None, metadata=naming("container"))
    modules_to_save: list[str] | None = field(default=None, metadata=naming("text"))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __init_subclass__(cls, **options) -> None:
        """``help`` of a config shows its method's equation and source, and every field, inherited ones too."""
        super().__init_subclass__(**options)
        if not cls.__module__.startswith(f"{__package__.partition('.')[0]}."):
            return
        base, method = cls.__mro__[1], sys.modules[cls.__module__].__doc__
        known = base.__module__ == cls.__module__ or not hasattr(cls, "peft_type")
        said = [cls.__doc__, None if known else method, base.__doc__]
        cls.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in said if text) or None

    def __post_init__(self):
        for f in fields(self):  # None is an empty table, a tuple a list: what a file gives back
            value = getattr(self, f.name)
            if value is None and f.default_factory is dict:
                setattr(self, f.name, {})
            elif isinstance(value, dict):
                setattr(self, f.name, dict(value))  # the caller's own may change later
            elif f.default_factory is dict and not isinstance(value, dict):
                raise TypeError(f"{f.name}={value!r} must be a dict, {{name or regular expression: value}}")
            elif f.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{f.name}={value!r} must be True or False")
            elif isinstance(value, (tuple, range)):
                setattr(self, f.name, list(value))
        self.task_type = getattr(self.task_type, "value", self.task_type)
        if self.task_type is not None and self.task_type not in TASKS:
            raise ValueError(f"task_type={self.task_type!r} is none of PEFT's task types: {', '.join(TASKS)}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                self._compiles(name, value)
            elif value is not None:
                setattr(self, name, self._names(name, value))
        if self.target_parameters is not None:
            if isinstance(self.target_parameters, str):
                raise TypeError(f"target_parameters={self.target_parameters!r} must be a list of names, not a string")
            self.target_parameters = self._names("target_parameters", self.target_parameters)
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list of names, not a string")
            self.modules_to_save = self._names("modules_to_save", self.modules_to_save)
        if self.trainable_token_indices is not None:
            self._check_tokens(self.trainable_token_indices)
        if self.base_model_name_or_path is not None:
            self.base_model_name_or_path = str(self.base_model_name_or_path)
        indices = self.layers_to_transform
        if isinstance(indices, str) or not all(
            isinstance(i, int) for i in (indices if isinstance(indices, list) else [] if indices is None else [indices])
        ):
            raise TypeError(f"layers_to_transform={indices!r} must be an index or a list of indices")
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
    def _check_tokens(wanted: Any) -> None:
        for ids in wanted.values() if isinstance(wanted, dict) else [wanted]:
            whole = isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
            if not whole or not ids or min(ids) < 0 or len(set(ids)) < len(ids):
                raise ValueError(
                    f"trainable_token_indices={wanted!r} must be a list of different token ids, 0 or more each, or "
                    "{name of an embedding: such a list}"
                )

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

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_in_use"):
            raise AttributeError(
                f"{name}={value!r}: this config belongs to layers that are already built, and an optimizer may hold "
                "their parameters; merge_and_unload, adapt anew with another config and build the optimizer after that"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was pickled, by an older version too: a field that it lacked has its default."""
        self.__dict__.update({f.name: f.default_factory() for f in fields(self) if f.default_factory is not MISSING})
        self.__dict__.update(state)

    def to_peft(self):
        """Hugging Face PEFT's own config of the same method, or this config where PEFT has no such method.

        Raises ImportError without PEFT, ValueError for a setting that PEFT has no counterpart of.
        """
        importlib.import_module("peft")  # whose coming puts integrations.configs.to_peft in this one's place
        if PeftConfig.__bases__ == (Root,):
            raise ImportError("the Hugging Face PEFT installed here does not take this library's configs")
        return self.to_peft()

    def in_use(self) -> PeftConfig:
        """A copy that cannot be changed any more, for a built layer to keep."""
        kept = copy.copy(self)
        kept.__dict__["_in_use"] = True
        return kept

    def resolved(self, **found) -> PeftConfig:
        """The config with a model's own values filled in."""
        return replace(self, **found)

    @property
    def method_name(self) -> str:
        """The method that this config's values select."""
        return next(m.name for m in METHODS.values() if m.config is type(self))

    def for_peft(self) -> dict[str, Any]:
        """The fields that Hugging Face PEFT must read otherwise to compute the same."""
        return {}

    @property
    def dropout(self) -> float:
        """The probability on the input of A, by whichever name ending in "_dropout" PEFT's config has it."""
        return max((getattr(self, f.name) for f in fields(self) if f.name.endswith("_dropout")), default=0.0)

    def stored(self) -> dict[str, Any]:
        """The fields as they go into adapter_config.json."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: sorted(v) if isinstance(v, set) else v for name, v in found.items()}  # PEFT makes sets of lists

    def renamed(self, rename: Callable[[str], str], known: set[str]) -> PeftConfig:
        """The config with the names of modules that a model does not know put as ``rename`` puts them."""

        def now(name: str) -> str:
            new = rename(name)
            if new == name or new not in known or any(n == name or n.endswith(f".{name}") for n in known):
                return name
            return new

        names = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
        lists = {n: getattr(self, n) for n in names}
        tables = {f.name: getattr(self, f.name) for f in fields(self) if f.default_factory is dict}
        if isinstance(self.trainable_token_indices, dict):
            tables["trainable_token_indices"] = self.trainable_token_indices
        return replace(
            self,
            **{n: [*map(now, v)] for n, v in lists.items() if isinstance(v, list)},
            **{n: {now(key): value for key, value in table.items()} for n, table in tables.items()},
        )

    def for_targets(self, shapes: list[tuple[int, int]]) -> PeftConfig:
        """The config once the (out, in) of every adapted layer is known."""
        return self

    def for_module(self, name: str) -> PeftConfig:
        """The config of one layer, with every per-name pattern resolved. A copy made for it names no target_modules:
        thousands of layers would each check and keep a list of thousands."""
        return self

    def describe(self) -> str:
        """The hyper-parameters shown in a layer's repr."""
        common = {f.name for f in fields(PeftConfig)} | {"fan_in_fan_out"}
        shown = [f for f in fields(self) if f.name not in common]
        always = ("r", "lora_alpha", "kind")
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in shown
            if f.name in always or (getattr(self, f.name) != f.default and getattr(self, f.name) != {})
        )


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    A, B: the trained factor on the input's side, (r, in), and on the output's, (out, r), by its name on the layer; None
        where there is none. LoRA+ and MPC go by them.
    example(r) -> config: a valid config of about rank r, for tables and checks.
    init(W, bias, config, new) -> {name: tensor} or Init: every trainable tensor of a layer, made once; W is (out, in)
        in its own dtype, bias (out,) or None, ``new(*shape)`` an uninitialised tensor in the adapter's dtype on W's
        device. Raises ValueError when the shapes cannot carry the config.
    init_lookup: the same of a table that is looked up, W its transpose (N, V), where a method starts otherwise there.
    A method computes in one of three forms, each reading the layer's parameters, buffers, config, weight and bias:
    factors(layer) -> Factors: the expression around the frozen weight.
    weight(layer) -> Tensor (out, in): a weight formed in each forward, for methods without a useful factored form.
    output(layer) -> Factors: the expression on the layer's own output z, y = z + s·h(zAᵀ + a)Bᵀ + bias.
    With both factors and weight, each call takes the form of fewer FLOPs.
    residual(layer) -> Factors: where the method trains on a residual of W, the frozen update that makes it and beside
        which ``factors`` train: W itself is never changed. Dropout does not touch it.
    acts(layer, step): whether on_step has anything to do with a layer at a step.
    on_step([(name, layer)], step): called by ``fused_peft.on_step`` after each optimizer step.
    cost(layer, rows) -> (FLOPs with factors, FLOPs with weight), where both are declared.
    from_weight: init reads W's values, so a layer made on the meta device must be reset once its weight is there.
    reads_weight: its factors depend on the weight in each call.
    decomposes_later: on_step reads the weight.
    replaces_weight: the factors stand in place of xWᵀ instead of beside it.
    stacks: its factors read tensors stacked over experts as they read those of one layer.
    disk_buffers: buffers that belong into a checkpoint, since they cannot be made again exactly.
    remade(config): whether a checkpoint without them (Hugging Face PEFT's) can be read all the same, since init makes
        the same ones again from the same weight.
    disk_shared: buffers that PEFT stores once for the whole model, whole; each layer reads its corner of them.
    disk: parameter name -> key suffix in a checkpoint, where Hugging Face PEFT has the method.
    disk_lookup: the same on a table that is looked up, where PEFT has the method there.
    disk_shape(shape, config): the shape a one-dimensional parameter has on disk, where PEFT's differs.
    """

    name: str
    group: str
    config: type[PeftConfig]
    example: Callable[[int], PeftConfig]
    init: Callable[[Tensor, Tensor | None, PeftConfig, New], dict[str, Tensor] | Init]
    A: str | None = None
    B: str | None = None
    init_lookup: Callable[[Tensor, Tensor | None, PeftConfig, New], dict[str, Tensor]] | None = None
    factors: Callable[[Any], Factors] | None = None
    weight: Callable[[Any], Tensor] | None = None
    output: Callable[[Any], Factors] | None = None
    residual: Callable[[Any], Factors] | None = None
    acts: Callable[[Any, int], bool] = lambda layer, step: True
    on_step: Callable[[list[tuple[str, Any]], int], None] | None = None
    cost: Callable[[Any, int], tuple[float, float]] | None = None
    from_weight: bool = False
    reads_weight: bool = False
    decomposes_later: bool = False
    replaces_weight: bool = False
    stacks: bool = True
    disk_buffers: tuple[str, ...] = ()
    remade: Callable[[PeftConfig], bool] = lambda config: False
    disk_shared: tuple[str, ...] = ()
    disk: dict[str, str] = field(default_factory=dict)
    disk_lookup: dict[str, str] = field(default_factory=dict)
    disk_shape: Callable[[tuple[int, ...], PeftConfig], tuple[int, ...]] = lambda shape, config: shape
    # True when the biases of layers without a weight matrix (LayerNorm) belong to the method
    trains_other_biases: bool = False

    def __post_init__(self):
        if (self.output is None) == (self.factors is None and self.weight is None):
            raise TypeError(f"method {self.name!r} must declare factors, weight or both, or else output")
        if (self.cost is None) != (self.factors is None or self.weight is None):
            raise TypeError(f"method {self.name!r} must declare a cost where it has two forms, and only there")
        METHODS[self.name] = self

    def start(self, W: Tensor, bias: Tensor | None, config: PeftConfig, new: New) -> Init:
        """What ``init`` gives, as an Init."""
        start = self.init(W, bias, config, new)
        return start if isinstance(start, Init) else Init(start)

    def start_lookup(self, W: Tensor, bias: Tensor | None, config: PeftConfig, new: New) -> Init:
        """The same of a table W (N, V)."""
        if self.init_lookup is None:
            return self.start(W, bias, config, new)
        return Init(self.init_lookup(W, bias, config, new))

    @property
    def beside(self) -> bool:
        """Whether its update can be computed beside a product that is there already."""
        return self.weight is None and not self.replaces_weight

    @property
    def stands_alone(self) -> bool:
        """Whether it computes with the frozen weight itself, so that no other adapter can act before it."""
        return not self.beside or self.reads_weight

    @property
    def needs_weight(self) -> bool:
        """Whether it reads the weight's values at any time, beside the frozen product."""
        return self.stands_alone or self.from_weight or self.decomposes_later

    @property
    def form(self) -> str:
        declared = [name for name in ("factors", "weight", "output") if getattr(self, name)]
        return " or ".join(declared)

    def __reduce__(self):
        return method, (self.name,)

    def disk_key(self, param: str, lookup: bool = False) -> str:
        known = self.disk_lookup if lookup and self.disk_lookup else self.disk
        return known.get(param, f"{self.name}_{param.removeprefix(self.name + '_')}")


def method(name: str) -> Method:
    """The registered method; ValueError lists the known names."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method {name!r} is unknown; known methods: {', '.join(sorted(METHODS))}") from None


def method_of(config: PeftConfig) -> Method:
    """The method a config belongs to; TypeError when it is not one of this library's configs."""
    if isinstance(config, PeftConfig) and any(type(config) is m.config for m in METHODS.values()):
        return METHODS[config.method_name]
    raise TypeError(_no_config(config))


def _no_config(config: Any) -> str:
    """The error of something else where a config of this library is needed: what it is, and what to give."""
    of = config if isinstance(config, type) else type(config)
    kind = f"{of.__module__}.{of.__qualname__}"
    if config is None:
        return "config=None, but a config is needed, e.g. fused_peft.LoraConfig(r=16)"
    if isinstance(config, type) and issubclass(config, PeftConfig):
        return f"config={config.__name__} is the class; give an instance of it: fused_peft.{config.__name__}(...)"
    if isinstance(config, dict):
        less = " (without 'peft_type')" if "peft_type" in config else ""
        return f"config={_short(config)} is a dict; give a config made of it: fused_peft.LoraConfig(**config){less}"
    if isinstance(config, (str, os.PathLike)):
        return (
            f"config={_short(config)} is no config; give e.g. fused_peft.LoraConfig(r=16), "
            "fused_peft.load_config(folder) for a stored one, or call fused_peft.load_adapter(model, folder)"
        )
    if kind.startswith("peft."):
        return (
            f"config is a {kind}, Hugging Face PEFT's own; give it to peft.get_peft_model(model, config) and call "
            f"fused_peft.accelerate(model) on what that returns, or give fused_peft's config of the method"
        )
    if isinstance(config, PeftConfig):
        own = next((c.__name__ for c in type(config).__mro__ if any(c is m.config for m in METHODS.values())), None)
        if own is not None:
            return f"config is a {kind}, a subclass that belongs to no method; give a fused_peft.{own} itself"
        return f"config is a {kind}, which no single layer has; give it to fused_peft.get_peft_model(model, config)"
    return f"config={_short(config)} is a {kind}; give a config of fused_peft's, e.g. fused_peft.LoraConfig(r=16)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
