"""What get_peft_model leaves on a model, and who may act on it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from torch import Tensor, nn

from ..methods import PeftConfig
from .adapted import STATE, few, is_adapted, is_pefts, unwrap
from .holder import DEFAULT
from .parts import about_parts, adapted_parts, guard
from .trainable_tokens import TrainableTokens

_P = ParamSpec("_P")
_R = TypeVar("_R")

# what Hugging Face PEFT's own models have in place of the functions here
_PEFT_CALLS = {
    "merge": "merge_adapter()",
    "unmerge": "unmerge_adapter()",
    "merge_and_unload": "merge_and_unload()",
    "disable_adapter": "disable_adapter()",
    "save_pretrained": "save_pretrained(path)",
    "merged_state_dict": "merge_and_unload().state_dict() of a copy",
    "save_merged": "merge_and_unload().save_pretrained(path)",
    "export_lora": "save_pretrained(path)",
    "load_adapter": "load_adapter(path, adapter_name)",
    "add_adapter": "add_adapter(adapter_name, config)",
    "set_adapter": "set_adapter(adapter_name)",
    "delete_adapter": "delete_adapter(adapter_name)",
    "adapter_batch": "forward(..., adapter_names=names)",
}


@dataclass
class AdapterState:
    """What get_peft_model leaves on the model beside its layers: the config, and how to see the base again."""

    config: PeftConfig
    saved: dict[str, nn.Module] = field(default_factory=dict)  # modules_to_save: name -> frozen original
    biases: dict[str, Tensor] = field(default_factory=dict)  # trained in place: parameter name -> base value
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # brought along by a loaded adapter: name -> base value
    tokens: dict[str, TrainableTokens] = field(default_factory=dict)  # rows that train: name of the embedding -> those
    disabled: int = 0  # how many disable_adapter contexts are open
    layers: tuple[str, ...] = ()  # the names of the adapted layers, by which a vanished one is noticed
    told: tuple[str, ...] = ()  # the vanished ones that on_step has warned of
    added: dict[str, PeftConfig] = field(default_factory=dict)  # further adapters: name -> config

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model's adapters."""
        return (DEFAULT, *self.added)

    def of(self, name: str) -> AdapterState:
        """What an adapter has to be saved and loaded by. ValueError for an unknown name."""
        if name == DEFAULT:
            return self
        if name not in self.added:
            raise ValueError(f"adapter_name={name!r} is none of the model's: {', '.join(self.names)}")
        return AdapterState(self.added[name])

    def __getstate__(self) -> dict:
        self.refuse_while_exchanged("pickling the model")
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        """As it was pickled, by an older version too: what that did not have was empty."""
        empty = vars(AdapterState(config=None))
        self.__dict__.update(empty | {key: value for key, value in state.items() if key in empty})
        if not isinstance(self.embeddings, dict):
            self.embeddings = {}
        guard()

    def __deepcopy__(self, memo: dict) -> AdapterState:
        return replace(self, **{key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})

    def refuse_while_exchanged(self, what: str) -> None:
        """RuntimeError where base values stand in for trained heads and biases."""
        if self.disabled and (self.saved or self.biases):
            names = few([*self.saved, *self.biases])
            raise RuntimeError(
                f"{what} inside disable_adapter would take the base values of {names} for the trained ones; leave the "
                "context first"
            )


def refuse_while_disabled(model: nn.Module, what: str) -> None:
    """RuntimeError inside disable_adapter, where base values stand in for the trained ones."""
    state = getattr(unwrap(model), STATE, None)
    if state is not None and state.disabled:
        raise RuntimeError(f"{what} inside disable_adapter would act on the base values; leave the context first")


def refuse_pefts(model: nn.Module, what: str) -> None:
    """ValueError where the adapters of the model are Hugging Face PEFT's, not get_peft_model's; names PEFT's call."""
    if not is_adapted(model) and is_pefts(model):
        raise ValueError(
            f"model={type(model).__name__} is Hugging Face PEFT's, and fused_peft.{what} is for models of "
            f"fused_peft.get_peft_model; call {_PEFT_CALLS[what]} of the model that peft.get_peft_model returned"
        )


def state_of(model: nn.Module, what: str = "save_pretrained") -> AdapterState:
    """The model's adapter state; ValueError when get_peft_model has not run on it, for the function ``what``."""
    state = getattr(unwrap(model), STATE, None)
    if state is None:
        refuse_pefts(model, what)
        if parts := adapted_parts(unwrap(model)):
            raise ValueError(f"{what}: {about_parts(unwrap(model), parts)}")
        raise ValueError(f"model={type(model).__name__} has no adapter; call get_peft_model or load_adapter first")
    return state


def by_keyword(instead: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function of (model, something, *, ...) say what to do with a third positional argument: TypeError."""

    def decorate(call: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(call)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if len(args) > 2:
                raise TypeError(
                    f"{call.__name__} got {args[2]!r} as a third positional argument: {instead}; its other settings go "
                    "by keyword"
                )
            return call(*args, **kwargs)

        return checked

    return decorate
