"""Several adapters on one model, by name: added, made active together, removed.

The adapter of get_peft_model is "default". Active adapters act one after the other in the order given, as merging them
in that order would; each has its own method. Those that are not active cost nothing and do not train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.sharded import is_spread
from ..methods import PeftConfig, method_of
from . import prompt
from .adapted import few, layers, unwrap
from .adapter import Adapter, why_not_together
from .convert import adapted_parameter, install, shape, shown, unload, warn_tied
from .embedding import layer_class
from .holder import DEFAULT
from .layer import PeftLayer
from .parameter import SUFFIX, PeftParameter, matrix_shape
from .state import AdapterState, refuse_while_disabled, state_of
from .targets import check_parameters, find_parameters, find_targets, resolve
from .trainable_tokens import FIELD
from .unmet import warn_of_unmet


@dataclass
class Addition:
    """A further adapter, made and checked before the model is touched."""

    name: str
    config: PeftConfig
    layers: dict[str, PeftLayer | PeftParameter]  # every layer that gets it
    new: dict[str, PeftLayer | PeftParameter]  # those that were not adapted before
    adapters: dict[str, Adapter]


def add_adapter(
    model: nn.Module, adapter_name: str, config: PeftConfig, *, adapter_dtype: torch.dtype | None = None
) -> None:
    """Give a model of get_peft_model a further adapter, inactive until ``set_adapter``.

    Its modules may be others than the first one's. adapter_dtype: as for get_peft_model. Raises ValueError or TypeError
    with the model unchanged: a name that is taken, no match, biases, token rows or modules_to_save (only the first has
    those), soft prompts, sharded weights; RuntimeError while merged or disabled.
    """
    put_addition(unwrap(model), addition(model, adapter_name, config, adapter_dtype))


def addition(model: nn.Module, name: str, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> Addition:
    """What ``add_adapter`` would do. Raises what it raises."""
    model = unwrap(model)
    state = state_of(model, "add_adapter")
    refuse_while_disabled(model, "add_adapter")
    method = method_of(config)
    if not isinstance(name, str) or not name or "." in name or name in state.names:
        raise ValueError(
            f"adapter_name={name!r} is taken, empty or holds a dot (the model has {', '.join(state.names)}); choose "
            "another name"
        )
    if isinstance(state.config, prompt.SoftPromptConfig):
        raise ValueError(f"adapter_name={name!r}: a model with a soft prompt takes no further adapter")
    for field, value, none in (
        ("modules_to_save", config.modules_to_save, None),
        (FIELD, config.trainable_token_indices, None),
        ("bias", config.bias, "none"),
        ("target_modules", config.target_modules if method.trains_other_biases else True, True),
    ):
        if value != none and value != []:
            raise ValueError(
                f"{field}={value!r}: only the first adapter of a model trains heads, biases and rows; leave it out of "
                f"{name!r}, or put it into the config of get_peft_model"
            )
    if merged := [n for n, layer in layers(model) if layer.merged]:
        raise RuntimeError(f"{merged[0]} is merged; call unmerge before add_adapter")
    if any(is_spread(p) for p in model.parameters()):
        raise ValueError("the model is sharded over several processes; add adapters before sharding it")
    asked = config
    config = resolve(model, replace(config))
    targets = find_targets(model, config, asked, again=True)
    parameters = find_parameters(model, config)
    check_parameters(parameters, asked, again=True)
    if heads := [n for n in (*targets, *parameters) for s in state.saved if n == s or n.startswith(f"{s}.")]:
        raise ValueError(f"target_modules means {few(heads)}, which the first adapter trains whole; exclude it")
    matrices = (matrix_shape(owner, key) for owner, key in parameters.values())
    config = config.for_targets([*(shape(m) for m in targets.values()), *matrices])
    around, new, adapters = {}, {}, {}
    for layer_name, module in shown(targets, method):
        try:
            if isinstance(module, PeftLayer):
                layer = module
            else:
                layer = new[layer_name] = layer_class(module).around(module, method)
            adapters[layer_name] = layer.made_adapter(name, config.for_module(layer_name), adapter_dtype)
        except (ValueError, TypeError) as e:
            raise type(e)(f"{layer_name}: {e}") from e
        around[layer_name] = layer
    for layer_name, (owner, key) in shown(parameters, method):
        layer = owner._modules.get(key + SUFFIX)
        if layer is None:
            layer = new[layer_name] = adapted_parameter(layer_name, owner, key, None, None)
        try:
            adapters[layer_name] = layer.made_adapter(name, config.for_module(layer_name), adapter_dtype)
        except (ValueError, TypeError) as e:
            raise type(e)(f"{layer_name}: {e}") from e
        around[layer_name] = layer
    warn_tied(model, new)
    warn_of_unmet(model, asked, config, adapters)
    return Addition(name, config, around, new, adapters)


def put_addition(model: nn.Module, added: Addition) -> None:
    """Carry out what ``addition`` planned."""
    state: AdapterState = state_of(model)
    for layer in added.new.values():
        layer.freeze_base()
    install(model, added.new)
    for name, adapter in added.adapters.items():
        adapter.requires_grad_(False)
        added.layers[name].take_adapter(added.name, adapter)
    state.added[added.name] = added.config.in_use()
    state.layers = tuple(dict.fromkeys((*state.layers, *added.new)))


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make one adapter active, or several, in this order; the others are off. Active ones train, unless their config
    has inference_mode: build the optimizer after this.

    A layer that has none of them computes what its base does. Raises ValueError for an unknown name, and for methods
    that cannot act behind another one; RuntimeError while merged or disabled; each with nothing changed.
    """
    model = unwrap(model)
    state = state_of(model, "set_adapter")
    refuse_while_disabled(model, "set_adapter")
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if unknown := [name for name in names if name not in state.names]:
        raise ValueError(f"adapter_name={unknown[0]!r} is none of the model's: {', '.join(state.names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"adapter_name={names} names an adapter twice")
    found = []
    for layer_name, layer in layers(model):
        own = [name for name in names if name in layer.adapters]
        if layer.merged:
            raise RuntimeError(f"{layer_name} is merged; call unmerge before set_adapter")
        if reason := why_not_together([layer.adapters[name] for name in own]):
            raise ValueError(f"adapter_name={names}: {reason}, in {layer_name}")
        found.append((layer, own))
    for layer, own in found:
        layer.set_adapter(own)
        for name, adapter in layer.adapters.items():
            trains = name in own and not adapter.config.inference_mode
            for tensor in adapter.adapter_tensors():
                tensor.requires_grad_(trains)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an added adapter; layers that had no other one turn back into what they were. Where it was active, the
    rest of the active ones stay so, and "default" does if none is left.

    Raises ValueError for "default" or an unknown name, RuntimeError while merged or disabled, with nothing changed.
    """
    model = unwrap(model)
    state = state_of(model, "delete_adapter")
    refuse_while_disabled(model, "delete_adapter")
    if adapter_name not in state.added:
        why = "is the one that the model was adapted with" if adapter_name == DEFAULT else "is none of the model's"
        raise ValueError(f"adapter_name={adapter_name!r} {why}; it can be one of: {', '.join(state.added) or 'none'}")
    if merged := [n for n, layer in layers(model) if layer.merged]:
        raise RuntimeError(f"{merged[0]} is merged; call unmerge before delete_adapter")
    active = [n for n in state.names if any(n in layer.active_names for _, layer in layers(model))]
    if adapter_name in active:
        set_adapter(model, [n for n in active if n != adapter_name] or DEFAULT)
    plain = {}
    for name, layer in layers(model):
        if adapter_name in layer.adapters:
            layer.delete_adapter(adapter_name)
            if not layer.adapters:
                plain[name] = layer
    unload(model, plain.values(), merge=False)
    del state.added[adapter_name]
    state.layers = tuple(name for name in state.layers if name not in plain)
