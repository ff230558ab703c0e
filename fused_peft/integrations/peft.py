"""Existing Hugging Face PEFT models on the fused call: PEFT's own layers get a subclass in place of their class.

``accelerate`` changes nothing but ``__class__``: parameters, keys, checkpoints, merging, adapter switching and every
other method stay PEFT's; only forward differs, and only where it can be fused (``peft_layers``). What cannot runs
PEFT's forward: one warning counts it by reason, and ``fused_peft.explain`` lists it layer by layer. Layers that PEFT
adds to an accelerated model later are accelerated as they come: PEFT makes them all in ``BaseTuner.inject_adapter``,
which this file wraps.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial, wraps
from importlib import import_module

import torch
from peft.tuners import adalora, lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..core import dispatch, operands, versions
from ..core.frozen import Frozen, is_foreign, kind_of, own_forward
from ..model.adapted import is_adapted
from ..model.batch import Member, Switch
from ..model.explain import Row, explain_layer, stored_as
from . import peft_layers, peft_methods  # noqa: F401 which registers its layers
from .configs import is_ours
from .experts import ParamWrapper as FusedParamWrapper
from .experts import started_by
from .peft_embedding import FusedEmbedding
from .peft_layers import FUSED, KEPT, TRIED, Fused, peft_class, replaceable
from .peft_unfused import why_unfused
from .tuners import FusedTunerLayer

_HOOKS = "_fused_peft_hooks"  # of adapter_batch, while it is on
_NAMED = 3  # reasons that a warning spells out
_ANY = (Fused, FusedEmbedding, FusedParamWrapper)


def __getattr__(name: str):
    """What stood here before, by which pickled models name their classes."""
    return getattr(peft_layers, name)


def accelerate(model: nn.Module) -> nn.Module:
    """``fused_peft.accelerate``."""
    _check_module(model)
    layers = _layers(model)
    if not layers:
        raise ValueError(_nothing_to_fuse(model))
    versions.warn_outside("peft")
    _fuse(layer for _, layer in layers)
    _report(layers)
    return model


def restore(model: nn.Module) -> nn.Module:
    """``fused_peft.restore``."""
    _check_module(model)
    back = {fused: own for own, fused in FUSED.items()}
    for _, layer in _layers(model):
        if type(layer) in back:
            layer.__class__ = back[type(layer)]
            for kept in (KEPT, TRIED):
                layer.__dict__.pop(kept, None)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _nothing_to_fuse(model: nn.Module) -> str:
    """The error of a model without a PEFT layer: what it is instead, and what to do."""
    kind = type(model).__name__
    if is_adapted(model):
        return (
            f"model={kind} was adapted by fused_peft.get_peft_model and runs the fused call already; leave accelerate "
            "out, it is for models of peft.get_peft_model"
        )
    if configs := getattr(model, "peft_config", None):
        kinds = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}))
        return (
            f"model={kind} has no layer to fuse, since PEFT's {kinds} adapts none; leave accelerate out, PEFT runs it "
            "as it is"
        )
    return (
        f"model={kind} has no Hugging Face PEFT layer; adapt it with peft.get_peft_model first, or use "
        "fused_peft.get_peft_model"
    )


def know_bitsandbytes() -> None:
    """Where PEFT made layers on bitsandbytes', their fused forms."""
    if any(f"peft.tuners.{method}.bnb" in sys.modules for method in ("lora", "adalora", "ia3", "hira")):
        import_module(f"{__package__}.peft_bnb")


def _fuse(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if type(layer) in FUSED:
            layer.__class__ = FUSED[type(layer)]


def _keeps_peft_s(layer: nn.Module, adapters: list[str] | None = None) -> str | None:
    """Why a layer takes PEFT's forward with these adapters (default: the active ones), enabled and not merged; None
    where it is fused. Makes no tensor."""
    if isinstance(layer, FusedTunerLayer):
        return None
    if not isinstance(layer, _ANY):
        if type(layer) in FUSED:
            return "accelerate has not run on it"
        why = why_unfused(type(layer))
        return f"{type(layer).__module__}.{type(layer).__name__} has no fused form{f': {why}' if why else ''}"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance, as X-LoRA and device_map hooks do"
    return layer.unfused(adapters=adapters)


def _report(layers: list[tuple[str, nn.Module]], adapter: str | None = None) -> None:
    """One warning that counts, by reason, the layers that keep PEFT's forward (with the adapter, where one is named);
    none where all are fused."""
    reasons: dict[str, list[str]] = {}
    beside: dict[tuple[type, type], list[tuple[str, nn.Module]]] = {}
    adapters = None if adapter is None else [adapter]
    started = started_by((layer for _, layer in layers), adapters)
    for name, layer in layers:
        if reason := _keeps_peft_s(started.get(layer, layer), adapters):
            reasons.setdefault(reason, []).append(name)
        elif isinstance(layer, Fused) and not replaceable(kind_of(layer.base_layer), layer.base_layer):
            base = layer.base_layer
            beside.setdefault((type(base), type(getattr(base, "weight", None))), []).append((name, base))
    for (_, weight), ((name, base), *others) in beside.items():
        if issubclass(weight, Tensor) and is_foreign(base.weight) and _passes_gradients(base, kind_of(base)) is False:
            warnings.warn(
                f"the product of {name} ({weight.__name__}; {len(others)} more like it) passes no gradient on, in "
                "PEFT's forward as in the fused one, so adapters in the layers before it do not train; quantise the "
                "weights only, not the activations",
                stacklevel=4,
            )
    if not reasons:
        return
    kept = sum(map(len, reasons.values()))
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    listed = [f"{reason} ({len(names)}, e.g. {names[0]})" for reason, names in most[:_NAMED]]
    if len(most) > _NAMED:
        listed.append(f"{len(most) - _NAMED} further reasons")
    of = "" if adapter is None else f" of adapter {adapter!r}"
    counts: Counter[str] = Counter()
    for (base, _), found in beside.items():
        counts[base.__name__] += len(found)
    of += "".join(f", {count} of them beside the product of a {name}" for name, count in counts.items())
    warnings.warn(
        f"accelerate fused {len(layers) - kept} of {len(layers)} PEFT layers{of}; {kept} keep PEFT's forward: "
        f"{'; '.join(listed)}. fused_peft.explain(model) lists them all",
        stacklevel=4,
    )


def _accelerate_what_is_added(inject_adapter):
    """BaseTuner.inject_adapter that goes on, where the model is accelerated, to accelerate the layers it made.

    It is PEFT's one door for add_adapter, load_adapter, add_weighted_adapter and inject_adapter_in_model. That a model
    is accelerated shows by the classes of its layers alone, so copies and pickles keep it and ``restore`` ends it. What
    a config of this library adds is accelerated on any model.
    """

    @wraps(inject_adapter)
    def inject(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        before = [layer for _, layer in _layers(model)]
        accelerated = is_ours(self.peft_config[adapter_name]) or any(isinstance(layer, _ANY) for layer in before)
        inject_adapter(self, model, adapter_name, *args, **kwargs)
        if accelerated:
            know_bitsandbytes()
            layers, known = _layers(model), {id(layer) for layer in before}
            _fuse(layer for _, layer in layers if id(layer) not in known)
            _report([(name, layer) for name, layer in layers if _has(layer, adapter_name)], adapter_name)

    inject._accelerates = True
    return inject


def _has(layer: nn.Module, adapter: str) -> bool:
    return any(adapter in getattr(layer, key, ()) for key in layer.adapter_layer_names)


if not hasattr(BaseTuner.inject_adapter, "_accelerates"):  # wrapped once, though this file is imported anew
    BaseTuner.inject_adapter = _accelerate_what_is_added(BaseTuner.inject_adapter)


def explanations(model: nn.Module, tokens: int, dtype: torch.dtype | None) -> list[tuple]:
    """(name, *Row) of every PEFT layer: fused, or PEFT's own and why."""
    layers = _layers(model)
    started = started_by(layer for _, layer in layers)
    return [(name, *_explain(layer, started.get(layer, layer), tokens, dtype)) for name, layer in layers]


def _explain(layer: nn.Module, by: nn.Module, tokens: int, dtype: torch.dtype | None) -> Row:
    """The row of a layer; ``by``: whose forward computes it."""
    if isinstance(layer, FusedTunerLayer):
        row = explain_layer(layer, layer.active(), tokens, dtype)
        return (next(iter(layer.configs.values())).method_name, *row[1:]) if row[1] == "plain" else row
    method = peft_class(layer).__module__.split(".")[2]
    state = None
    if isinstance(layer, _ANY):
        state = "disabled" if layer.disable_adapters else "merged" if layer.merged else None
    if reason := state or _keeps_peft_s(by):
        return method, "PEFT's", "peft", reason, None
    if isinstance(layer, FusedParamWrapper):
        return layer.explained(tokens, dtype)
    if isinstance(layer, FusedEmbedding):
        return method, "lookup", "torch", "rows of the table, and of A by one product with B", None
    base, kind = layer.base_layer, kind_of(layer.base_layer)
    like, plain = kind.like(base), replaceable(kind, base)
    N, K = kind.shape(base)
    weight, bias = (kind.matrix(base), base.bias) if plain else (None, None)
    found = layer.fused_factors(layer._used(), weight, bias)
    who = "" if plain else _beside_what(base, kind, dtype)
    if kind.packed and plain:
        weight, who = torch.empty(N, K, device="meta"), stored_as(kind, base).removesuffix("; ")
    if not found:
        return method, "plain", "torch", "no adapter of this layer is active", None
    if not plain and found[0].A is None:
        return method, "beside", "torch", who, None
    x = torch.empty(1, device="meta", dtype=dtype or kind.dtype(base)).expand(tokens, K)
    c = None if plain else x[:, :1].expand(tokens, N)
    problem = operands.foreseen(found[0], x, weight, bias, c, True, like.device)
    choice = dispatch.choose(problem)
    why = f"{who}{'; ' * bool(who)}{choice.why()}"
    form = "beside" if not plain else "product" if problem.hadamard else "factors"
    return method, form, choice.backend.name, why, problem


def _beside_what(base: nn.Module, kind: Frozen, dtype: torch.dtype | None) -> str:
    """Whose product the adapters act beside, and whether it gives x a gradient, by one row."""
    ends = _passes_gradients(base, kind, dtype) is False
    what = ", which passes no gradient on to the layers before it" if ends else ""
    return f"beside the product of a {type(base).__name__}{what}"


def _passes_gradients(base: nn.Module, kind: Frozen, dtype: torch.dtype | None = None) -> bool | None:
    """Whether a base's own product gives x a gradient, by one row; None where it does not take such a row."""
    device = kind.device(base)
    if device.type == "meta":
        return None
    x = torch.zeros(1, kind.shape(base)[1], device=device, dtype=dtype or kind.dtype(base), requires_grad=True)
    try:
        with torch.enable_grad():
            z = own_forward(base, x)
        return z.requires_grad and torch.autograd.grad(z.sum(), x, allow_unused=True)[0] is not None
    except Exception:  # what it takes is not this row; the call itself will tell
        return None


class _Hooks:
    """A layer's hooks of ``adapter_batch``: PEFT's own argument for mixed batches, in training mode too."""

    def __init__(self, layer: nn.Module):
        self.layer, self.switch, self.handles = layer, None, ()

    def attach(self, switch: Switch | None) -> None:
        layer = self.layer
        for handle in layer.__dict__.pop(_HOOKS, ()):
            handle.remove()
        layer.__dict__.pop("_batch", None)
        if switch is not None:
            self.switch = layer.__dict__["_batch"] = switch
            layer.__dict__[_HOOKS] = (
                layer.register_forward_pre_hook(partial(_name, switch), with_kwargs=True),
                layer.register_forward_hook(partial(_made, switch)),
            )


def _name(switch: Switch | None, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    names = None if switch is None else switch.names()
    return None if names is None else (args, {**kwargs, "adapter_names": names})


def _made(switch: Switch | None, layer: nn.Module, args: tuple, y: Tensor) -> None:
    if switch is not None:
        switch.made(y)


def members(model: nn.Module) -> list[Member]:
    """The layers of a PEFT model as ``adapter_batch`` sees them. ValueError where one takes no mixed batch."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if not isinstance(layer, (LoraLayer, Fused, FusedTunerLayer, AuxiliaryTrainingWrapper)) or isinstance(
            layer, lora.ParamWrapper
        ):
            raise ValueError(
                f"{name} is a {type(layer).__module__}.{type(layer).__name__}, which takes no batch of several adapters"
            )
        adapters = {}
        for key in layer.adapter_layer_names:
            for adapter, held in getattr(layer, key, {}).items():
                tensors = held.parameters() if isinstance(held, nn.Module) else [held]
                adapters.setdefault(adapter, []).extend(tensors)
        merged = isinstance(layer, BaseTunerLayer) and layer.merged
        found.append(Member(name, layer, adapters, merged, _Hooks(layer).attach))
    return found


def allocate(model: nn.Module, step: int) -> None:
    """The rank allocator of PEFT's own AdaLoRA, where the model is one that trains."""
    for tuner in (model, getattr(model, "base_model", None)):
        if isinstance(tuner, adalora.AdaLoraModel) and hasattr(tuner, "rankallocator"):
            try:
                return tuner.update_and_allocate(step)
            except TypeError as e:
                if any(p.requires_grad and p.grad is None for p in tuner.parameters()):
                    raise RuntimeError(
                        "on_step needs the gradients, and PEFT's AdaLoRA has parameters without: call it after "
                        "backward and before zero_grad"
                    ) from e
                raise
