"""Finding what is adapted: through wrappers, in this library's models and in Hugging Face PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from .adapter import Bound
from .holder import Holder
from .layer import PeftLayer
from .parameter import SUFFIX, PeftParameter

STATE = "_fused_peft"  # the attribute under which get_peft_model leaves its AdapterState


# layers -> their active adapters; integrations add theirs
ACTIVE: dict[type, Callable[[nn.Module], Iterable[Bound]]] = {Holder: Holder.active_adapters}

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


def layers(model: nn.Module) -> Iterator[tuple[str, PeftLayer | PeftParameter]]:
    """(name, layer) of every adapted layer; of an adapted parameter the parameter's name."""
    return ((_name_of(name, m), m) for name, m in unwrap(model).named_modules() if isinstance(m, Holder))


def _name_of(name: str, m: nn.Module) -> str:
    return name.removesuffix(SUFFIX) if isinstance(m, PeftParameter) else name


def active_layers(model: nn.Module) -> Iterator[tuple[str, Bound]]:
    """(name, adapter) of every active adapter of every layer, those of integrations (``ACTIVE``) among them."""
    for name, m in unwrap(model).named_modules():
        active = next((a for kind, a in ACTIVE.items() if isinstance(m, kind)), None)
        if active is not None:
            yield from ((_name_of(name, m), adapter) for adapter in active(m))


def roots(model: nn.Module) -> list[nn.Module]:
    """What get_peft_model has adapted: mostly the model itself, or the modules that it holds and that were adapted."""
    model = unwrap(model)
    return [model] if STATE in model.__dict__ else [m for m in model.modules() if STATE in m.__dict__]


def is_adapted(model: nn.Module) -> bool:
    """Whether get_peft_model has run on the model, or a layer of it is adapted."""
    return hasattr(unwrap(model), STATE) or any(True for _ in layers(model))


def is_pefts(model: nn.Module) -> bool:
    """Whether the adapters in the model are Hugging Face PEFT's."""
    model = unwrap(model)
    if hasattr(model, "peft_config"):
        return True
    return any(hasattr(m, "base_layer") and _from_peft(type(m)) for m in model.modules())


def _from_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def few(names: Iterable[str], most: int = 4, between: str = ", ") -> str:
    """The first of the names, and how many there are besides."""
    names = [*names]
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
