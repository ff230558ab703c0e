"""``adapter_batch``: a batch of which each sample uses, and trains, an adapter of its own.

Layers ask one ``Switch`` of the model which adapters a call is to use. A forward that activation checkpointing makes
again within backward uses those of the forward it repeats, though the context has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..core import ops
from ..core.frozen import now
from ..core.sharded import is_sharded, is_spread
from ..core.torch_internals import in_backward
from .adapted import is_pefts, layers, unwrap
from .adapter import compose, own_product
from .layer import PeftLayer
from .parameter import PeftParameter
from .prompt import SoftPromptConfig
from .rows import BASE, Chosen, length_error, lora_form, mixed
from .state import state_of


@dataclass
class Member:
    """A layer as ``adapter_batch`` sees it: its adapters, {name: their tensors}, and how it is put on a switch."""

    name: str
    layer: nn.Module
    adapters: dict[str, list[Tensor]]
    merged: bool
    attach: Callable[[Switch | None], None]


# what gives the members of a Hugging Face PEFT model: (model) -> [Member]
OF_PEFT: list[Callable[[nn.Module], list[Member]]] = []


class _Choice:
    """The names that a context gave; every graph that was made by them holds it."""

    def __init__(self, names: Chosen | None):
        self.names = names


_PLAIN = _Choice(None)  # a forward outside of any context: the active adapters


class Switch:
    """Which adapters the layers of a model use in this call."""

    def __init__(self, members: list[Member]):
        self.members = members
        self.current = self.last = _PLAIN
        self._alive: WeakSet[_Choice] = WeakSet()  # whose graphs may still be computed again
        self._repeated = False

    def attach(self) -> None:
        for member in self.members:
            member.attach(self)

    def names(self) -> Chosen | None:
        """One name a sample, or None: the active adapters."""
        if is_compiling():
            return self.current.names
        if in_backward():
            if len({choice.names for choice in (*self._alive, self.last)}) > 1:
                raise RuntimeError(
                    "activation checkpointing makes a forward again, and since then the model has run with other "
                    "adapters (another adapter_batch, or none); call backward before that"
                )
            self._repeated = True
            return self.last.names
        if self._repeated:  # what was to be computed again has been
            self._alive.clear()
            self._repeated = False
        self.last = self.current
        if self.current is _PLAIN and not self._alive:
            for member in self.members:
                member.attach(None)
        return self.current.names

    def made(self, y: Tensor) -> Tensor:
        """y of a layer, whose graph keeps the choice from being forgotten."""
        if is_compiling() or self.last is _PLAIN or in_backward():
            return y
        if isinstance(y, Tensor) and y.grad_fn is not None:
            y.grad_fn.metadata["fused_peft.adapter_batch"] = self.last
            self._alive.add(self.last)
        return y

    def __call__(self, layer: PeftLayer, x: Tensor) -> Tensor | None:
        """y of a layer of this library; None where the active adapters are to act."""
        names = self.names()
        return None if names is None else self.made(forward(layer, x, names))

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


def forward(layer: PeftLayer, x: Tensor, names: Chosen) -> Tensor:
    """y (S, ..., N) of a layer on samples x (S, ..., K), or ids (S, ...), each with the adapter of its name."""
    kind = now(layer)
    if x.dim() < (1 if kind.lookup else 2) or x.shape[0] != len(names):
        raise ValueError(length_error(names, x))
    adapters = layer.adapters
    weight = kind.like(layer)
    spread = weight.requires_grad or is_spread(weight) or is_sharded(x)
    joint = kind.opaque == layer.kind.opaque and not (kind.lookup or spread)

    def base(x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if kind.opaque:
            return None, layer.bias, own_product(layer, x, "adapter_batch")
        w = kind.matrix(layer)
        return (
            (w, layer.bias, None) if isinstance(w, Tensor) else (None, layer.bias, ops.plain_linear(x, w, layer.bias))
        )

    def form(name: str):
        adapter = adapters[name]
        method = adapter.method
        if adapter.awaits_weight or method.output or method.factors is None or method.replaces_weight:
            return None
        f = lora_form(method.factors(adapter))
        if f is None or method.residual is None:
            return f
        return None if f.p and layer.training else lora_form(f + method.residual(adapter))

    def alone(name: str | None, x: Tensor) -> Tensor:
        if name is not None:
            return compose(layer, (adapters[name],), x)
        if kind.opaque or kind.lookup:
            return layer.base_forward(x)
        return ops.plain_linear(x, kind.matrix(layer), layer.bias)

    own = [name if name in adapters else None for name in names]
    return mixed(x, own, form, alone, base if joint else None, layer.training)


def _members(model: nn.Module) -> list[Member]:
    def member(name: str, layer: PeftLayer) -> Member:
        tensors = {n: list(a.adapter_tensors()) for n, a in layer.adapters.items()}
        return Member(name, layer, tensors, layer.merged, lambda switch: layer.__dict__.__setitem__("_batch", switch))

    if held := [name for name, layer in layers(model) if isinstance(layer, PeftParameter)]:
        raise ValueError(
            f"adapter_batch does not reach {held[0]}: experts and routers know no samples; use it with adapters on "
            "linear layers alone"
        )
    found = [member(name, layer) for name, layer in layers(model)]
    for of_peft in OF_PEFT if is_pefts(model) else ():
        found += of_peft(model)
    return found


@contextmanager
def adapter_batch(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context sample i of every batch uses the adapter names[i] alone, "__base__" for none.

        with fp.adapter_batch(model, ["a", "b", "b", "__base__"]):
            loss = model(**batch).loss
        loss.backward()  # or within the context

    For models of get_peft_model with further adapters (the first is "default") and for Hugging Face PEFT's, in training
    mode too. names has one entry a sample: layers read x (len(names), ..., in_features), or ids (len(names), ...). Each
    adapter gets the gradient of its own samples and the others none; a layer that lacks an adapter computes what its
    base does. The adapters that ``set_adapter`` made active count for nothing meanwhile, but train only if they were
    made active: set_adapter to all that are to train. Adapters of LoRA's form run in one grouped call, others on their
    own samples. Heads and biases that train beside the adapters act on every sample, and ``disable_adapter`` within
    turns all adapters off.

    A forward that activation checkpointing repeats in backward uses the same names, also after the context; where
    forwards with several choices wait for one backward, non-reentrant checkpointing raises RuntimeError. Under
    torch.compile each new choice of names compiles anew.

    Raises, with nothing changed: TypeError when names is no sequence of strings; ValueError for an empty one, an
    unknown name, a model without named adapters, an adapter that does not train in a training-mode model with grad on;
    RuntimeError while merged or within another adapter_batch. A layer raises ValueError for a batch of another length.
    """
    members = _members(unwrap(model))
    switch, choice = _entered(unwrap(model), members, names)
    switch.current = choice
    switch.attach()
    try:
        yield model
    finally:
        switch.current = _PLAIN


def _entered(model: nn.Module, members: list[Member], names: Sequence[str]) -> tuple[Switch, _Choice]:
    """The switch and the choice of a context; raises what ``adapter_batch`` raises."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"names={names!r} must be a list of adapter names, one for each sample of the batch")
    if not members:
        if isinstance(state_of(model, "adapter_batch").config, SoftPromptConfig):
            raise ValueError(
                f"model={type(model).__name__} has a soft prompt, which all samples share; it has no names"
            )
        raise ValueError(f"model={type(model).__name__} has no adapted layer")
    known = list(dict.fromkeys(name for member in members for name in member.adapters))
    if not names:
        raise ValueError("names is empty; give the name of an adapter for each sample of the batch")
    if unknown := [name for name in names if name not in known and name != BASE]:
        raise ValueError(
            f"names: {unknown[0]!r} is none of the model's adapters: {', '.join(known)}, or {BASE!r} for the base alone"
        )
    if merged := [member.name for member in members if member.merged]:
        raise RuntimeError(f"{merged[0]} is merged; call unmerge before adapter_batch")
    switches = {id(s): s for m in members if (s := m.layer.__dict__.get("_batch")) is not None}
    if any(s.current is not _PLAIN for s in switches.values()):
        raise RuntimeError("adapter_batch within another one; leave the first, or give it the names of all samples")
    used = [name for name in dict.fromkeys(names) if name != BASE]
    if model.training and torch.is_grad_enabled():
        for name in used:
            tensors = [t for member in members for t in member.adapters.get(name, ())]
            if not any(t.requires_grad for t in tensors):
                call = "model.base_model.set_adapter" if hasattr(model, "peft_config") else "set_adapter"
                which = f"({used})" if hasattr(model, "peft_config") else f"(model, {used})"
                raise ValueError(
                    f"names: adapter {name!r} does not train, in a model in training mode; call {call}{which} before "
                    "the optimizer is built, or model.eval() for inference (a config with inference_mode never trains)"
                )
    switch = next(iter(switches.values()), None)
    if switch is None or len(switches) > 1:
        switch = Switch(members)
    switch.members = members
    return switch, _Choice(Chosen(names))
