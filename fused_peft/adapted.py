"""Finding what is adapted: through wrappers, in this library's models and in Hugging Face PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from .linear import PeftLinear

STATE = "_fused_peft"  # the attribute under which get_peft_model leaves its AdapterState


# what activation checkpointing, FSDP and torch.compile put between a name's parts
_WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}


def plain_name(name: str, parallel: bool = False) -> str:
    """A module's or parameter's name as it was before any such wrapper was put in. parallel: without DataParallel's
    "module" too, which a part of the model may be called itself: for comparing names, not for a file's keys."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS and not (parallel and part == "module"))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def layers(model: nn.Module) -> Iterator[tuple[str, PeftLinear]]:
    """(name, layer) of every adapted layer."""
    return ((name, m) for name, m in unwrap(model).named_modules() if isinstance(m, PeftLinear))


def active_layers(model: nn.Module) -> Iterator[tuple[str, PeftLinear]]:
    """As ``layers``, and in a Hugging Face PEFT model the active adapters of the methods registered there."""
    tuners = sys.modules.get("fused_peft.integrations.tuners")
    for name, m in unwrap(model).named_modules():
        if isinstance(m, PeftLinear):
            yield name, m
        elif tuners and isinstance(m, tuners.FusedTunerLayer) and (layer := m.active()) is not None:
            yield name, layer


def roots(model: nn.Module) -> list[nn.Module]:
    """What get_peft_model has adapted: mostly the model itself, or the modules that it holds and that were adapted."""
    model = unwrap(model)
    return [model] if STATE in model.__dict__ else [m for m in model.modules() if STATE in m.__dict__]


def is_adapted(model: nn.Module) -> bool:
    """Whether get_peft_model has run on the model, or a layer of it is a PeftLinear."""
    return hasattr(unwrap(model), STATE) or any(True for _ in layers(model))


def is_pefts(model: nn.Module) -> bool:
    """Whether the adapters in the model are Hugging Face PEFT's."""
    model = unwrap(model)
    if hasattr(model, "peft_config"):
        return True
    return any(hasattr(m, "base_layer") and _from_peft(type(m)) for m in model.modules())


def _from_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)
