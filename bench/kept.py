"""Bytes that a forward keeps for backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def kept(forward: Callable[[], object], own: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that autograd holds once a forward is done, those of ``own`` left out."""
    known = {t.untyped_storage().data_ptr() for t in own if t is not None}
    held: list[weakref.ref[Tensor]] = []  # dead once autograd lets go of the tensor

    def pack(t: Tensor) -> Tensor:
        held.append(weakref.ref(alias := t.detach()))
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias):
        y = forward()  # holds the graph
    alive = [t.untyped_storage() for ref in held if (t := ref()) is not None]
    del y
    return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in known}.values())


def held_by(model: nn.Module) -> Iterator[Tensor]:
    """A model's parameters and buffers, and what bitsandbytes keeps beside its quantised ones."""
    yield from (*model.parameters(), *model.buffers())
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    states += [state.state2 for state in states if state.nested]
    states += [of for m in model.modules() for of in (getattr(m, "weight", None), getattr(m, "state", None))]
    for state in states:
        yield from (t for t in getattr(state, "__dict__", {}).values() if isinstance(t, Tensor))
