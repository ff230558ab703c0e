"""The state dict of the model that get_peft_model was given, read from the adapted one."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from .adapted import STATE, layers, plain_name
from .holder import Holder
from .parameter import SUFFIX, PeftParameter
from .trainable_tokens import KEY, TrainableTokens


def plain_state(model: nn.Module, found: list[tuple[str, Holder]]) -> dict[str, Tensor]:
    """The model's state dict without what adapters have added to it."""
    own = {f"{name}.{t}" for name, layer in found for t in (*layer.tensor_names, *layer.buffer_names)}
    within = [f"{n}{SUFFIX}." if isinstance(layer, PeftParameter) else f"{n}.added." for n, layer in found]
    within += [f"{plain_name(name)}.{KEY}." for name, _ in token_rows(model)]
    state = {plain_name(key): t for key, t in model.state_dict().items()}
    return {key: t for key, t in state.items() if key not in own and not key.startswith(tuple(within))}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model that get_peft_model was given, of the adapted one, in the dtypes that it had."""
    state = model.__dict__[STATE]
    found = plain_state(model, [(plain_name(name), layer) for name, layer in layers(model)])
    for name, original in state.saved.items():
        found |= {f"{name}.{key}": t for key, t in original.state_dict().items()}
    before = {found[name].data_ptr(): value for name, value in (state.biases | state.embeddings).items()}
    return {key: before.get(t.data_ptr(), t) for key, t in found.items()}


def token_rows(model: nn.Module) -> list[tuple[str, TrainableTokens]]:
    """(embedding, its rows that train)"""
    return [(n.rpartition(".")[0], m) for n, m in model.named_modules() if isinstance(m, TrainableTokens)]


def writer(model: nn.Module) -> Callable | None:
    """What writes a Transformers model's folder, given a state dict; None for another model."""
    write = getattr(type(model), "save_pretrained", None)
    if write is None or "state_dict" not in inspect.signature(write).parameters:
        return None
    return write.__wrapped__ if hasattr(write, "guarded") else write  # it keeps adapted models from losing adapters
