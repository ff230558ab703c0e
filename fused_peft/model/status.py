"""Where each adapted layer stands: its adapters, which are active and merged, and whether a gradient reached them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core import table
from ..core.sharded import whole_grad
from .adapted import is_pefts
from .convert import adapted_layers
from .explain import explain_layer

# calls that give the entries of a Hugging Face PEFT model
OF_PEFT: list[Callable[[nn.Module], Iterable[LayerStatus]]] = []


@dataclass(frozen=True)
class LayerStatus:
    """One adapted layer. The first eight are those of Hugging Face PEFT's TunerLayerStatus; tables are by adapter.

    method: the method's name. backend: what computes the layer's call now, as ``explain`` says. dtype: of the trainable
    tensors. gradient: whether one of them holds a gradient now that is not zero, all of them finite.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    method: dict[str, str]
    backend: str
    dtype: dict[str, str]
    gradient: dict[str, bool]


class LayerStatuses(table.Table):
    """One LayerStatus a layer; shows as a table."""

    head = ("layer", "adapters", "enabled", "active", "merged", "trains", "gradient", "dtype", "device", "backend")

    def row(self, one: LayerStatus) -> tuple[str, ...]:
        def each(found: dict[str, object]) -> str:
            said = [str(found[name]) for name in one.available_adapters]
            return said[0] if len({*said}) == 1 else ", ".join(said)

        return (
            one.name,
            ", ".join(f"{name} ({one.method[name]})" for name in one.available_adapters),
            str(one.enabled),
            ", ".join(one.active_adapters) or "-",
            ", ".join(one.merged_adapters) or "-",
            each(one.requires_grad),
            each(one.gradient),
            each(one.dtype),
            each({name: ", ".join(found) for name, found in one.devices.items()}),
            one.backend,
        )


def get_layer_status(model: nn.Module) -> LayerStatuses:
    """Where each adapted layer of a model stands, of this library or of Hugging Face PEFT; shows as a table.

    Collective where parameters are sharded. Raises ValueError for a model without adapted layers, and in strict mode
    StrictError as ``explain`` does.
    """
    if is_pefts(model):
        for of_peft in OF_PEFT:
            if found := LayerStatuses(of_peft(model)):
                return found
    return LayerStatuses(_status(name, layer) for name, layer in adapted_layers(model))


def _status(name: str, layer) -> LayerStatus:
    adapters = layer.adapters
    tensors = {n: a.adapter_tensors() for n, a in adapters.items()}
    active = [*layer.active_names]
    frozen = {n: [getattr(a, b) for b in a.buffer_names] for n, a in adapters.items()}
    return LayerStatus(
        name=name,
        module_type=f"{type(layer).__name__}",
        enabled=layer.enabled,
        active_adapters=active,
        merged_adapters=active if layer.merged else [],
        requires_grad={n: _alike([t.requires_grad for t in found]) for n, found in tensors.items()},
        available_adapters=sorted(adapters),
        devices={n: sorted({t.device.type for t in (*found, *frozen[n])}) for n, found in tensors.items()},
        method={n: a.method.name for n, a in adapters.items()},
        backend=explain_layer(layer, layer.active_adapters(), 2048, None)[2],
        dtype={n: dtypes_of(found) for n, found in tensors.items()},
        gradient={n: seen(found) for n, found in tensors.items()},
    )


def _alike(flags: Sequence[bool]) -> bool | Literal["irregular"]:
    return all(flags) if all(flags) or not any(flags) else "irregular"


def dtypes_of(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def seen(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors holds a gradient that is not zero, and none one that is not finite."""
    grads = [g for t in tensors if (g := whole_grad(t)) is not None]
    return any(bool(g.any()) for g in grads) and all(bool(torch.isfinite(g).all()) for g in grads)
