"""What a config asks for and no adapter will do: the warnings of get_peft_model, given before the model is changed."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from ..methods import PeftConfig
from ..methods.base import matching_pattern
from .checks import few
from .reads import read_directly, routers
from .targets import (
    asked_for,
    ends,
    ends_with_any,
    expert_layers,
    experts_asked_for,
    find_parameters,
    given,
    layer_index,
    left_out,
    nearest,
    second_names,
    shown,
    target_set,
    trained_whole,
    wants_all_linear,
)

_MOST = 4  # how many entries without a match get a hint

# how an entry of a field means a module's name, by the rule that the field declares (methods.base.naming)
_RULES: dict[str, Callable[[Any, str, PeftConfig], bool]] = {
    "end": lambda entry, name, config: ends_with_any(name, (entry,)),
    "parameter": lambda entry, name, config: ends_with_any(name, (entry,)),
    "text": lambda entry, name, config: name.endswith(entry),
    "whole": lambda entry, name, config: name == entry,
    "pattern": lambda entry, name, config: matching_pattern({entry: True}, name, False),
    "index": lambda entry, name, config: layer_index(name, config.layers_pattern) == entry,
    "container": lambda entry, name, config: layer_index(name, [entry]) is not None,
    "expression": lambda entry, name, config: bool(re.fullmatch(entry, name)),
}


def warn_of_unmet(model: nn.Module, asked: PeftConfig, config: PeftConfig, adapted: Iterable[str]) -> None:
    """Warn of entries that match nothing, of weights that are no linear layers, and of adapted layers whose weight the
    model reads without a call.

    asked: the user's config. config: the resolved one. adapted: names of the layers it adapts.
    """
    found = (_about_entries(model, asked, config, list(adapted)), _about_held(model, asked, config))
    for message in filter(None, (*found, _about_reads(model, adapted))):
        warnings.warn(message, stacklevel=5)  # the caller of get_peft_model


def _about_entries(model: nn.Module, asked: PeftConfig, config: PeftConfig, adapted: list[str]) -> str:
    missing = unmatched(model, asked, config, adapted)
    return f"{type(asked).__name__} asks for what is not there: {'; '.join(missing)}" if missing else ""


def unmatched(model: nn.Module, asked: PeftConfig, config: PeftConfig, adapted: list[str]) -> list[str]:
    """What to say of each field of the user's config in which an entry matches nothing."""
    names, listed = [name for name, _ in model.named_modules() if name], target_set(config)
    second = second_names(model)
    # what the entries of a field can mean, where that is not the adapted layers
    scopes = {
        "target_modules": lambda: [
            *(n for n in names if asked_for(config, n, listed) and not trained_whole(asked, n)),
            *expert_layers(model),
        ],
        "exclude_modules": lambda: set(names) - {end for name in adapted for end in (name, *_around(name))},
        "modules_to_save": lambda: names,
        "target_parameters": lambda: [name for name, _ in model.named_parameters()],
    }
    found = []
    for f in fields(asked):
        rule = f.metadata.get("names")
        entries = given(model, asked, f.name) if rule else []
        if not entries or not isinstance(entries[0], int if rule == "index" else str):
            continue
        if rule in ("end", "text") and isinstance(getattr(asked, f.name), str):
            rule = "expression"
        scope = set(scopes.get(f.name, lambda: adapted)())
        if f.name in scopes:
            scope |= {name for name, first in second.items() if first in scope}
        plain = {end for name in scope for end in ends(name)} if rule in ("end", "text", "pattern", "parameter") else ()
        missing = [e for e in entries if e not in plain and not any(_RULES[rule](e, n, config) for n in scope)]
        if missing:
            parts = [f"{e!r}{_hint(f.name, rule, e, names, second, config)}" for e in missing[:_MOST]]
            what = "adapted layer" if f.name not in scopes else "parameter" if rule == "parameter" else "module"
            found.append(f"{f.name} has no {what} for {few([*parts, *missing[_MOST:]], _MOST)}")
    return found


def _around(name: str) -> list[str]:
    """The names of the modules that hold this one."""
    return [name[:i] for i, c in enumerate(name) if c == "."]


def _hint(field: str, rule: str, entry: Any, names: list[str], second: dict[str, str], config: PeftConfig) -> str:
    """What an entry without a match means instead, or may have been meant for."""
    if rule == "index":
        indices = {i for name in names if (i := layer_index(name, config.layers_pattern)) is not None}
        return f" (the model has {min(indices)} to {max(indices)})" if indices else ""
    if meant := [name for name in names if _RULES[rule](entry, name, config)]:
        if field == "target_modules" and all(trained_whole(config, name) for name in meant):
            return " (modules_to_save trains it whole)"
        return {
            "target_modules": " (there are some outside layers_to_transform)",
            "exclude_modules": " (what it names holds adapted layers; a regular expression can exclude those)",
        }.get(field, " (there are modules of that name, but they are not adapted)")
    if first := next((first for name, first in second.items() if _RULES[rule](entry, name, config)), None):
        return f" (another name of {first!r}, and a module is matched by its first name)"
    near = nearest(entry, names)
    return f" (nearest: {', '.join(near)})" if near else ""


def _about_held(model: nn.Module, asked: PeftConfig, config: PeftConfig) -> str:
    """Modules that target_modules mean and that are no linear layers: experts, and with "all-linear" routers."""
    held = list(experts_asked_for(model, asked, config))
    if wants_all_linear(asked):
        adapted = find_parameters(model, config)
        held += [n for n in routers(model) if not left_out(config, n) and f"{n}.weight" not in adapted]
    if not held:
        return ""
    kinds = Counter(type(model.get_submodule(name)).__name__ for name in held)
    return (
        f"target_modules={shown(asked.target_modules)} does not reach {few(f'{n} {k}' for k, n in kinds.items())} "
        f"(first: {held[0]}): they are no linear layers, so they stay frozen. target_parameters adapts the stacks that "
        "hold experts, and a router's weight, by the parameter's name"
    )


def _about_reads(model: nn.Module, adapted: Iterable[str]) -> str:
    reads = [f"{method} uses {few(weights)}" for method, weights in read_directly(model, adapted).items()]
    if not reads:
        return ""
    return (
        f"{few(reads, between='; ')} without calling the layer: that path passes an adapter by, and if there is no "
        "other it trains nothing. Leave the layer out of target_modules, or look at the adapter's gradient after a "
        "backward"
    )
