"""Quantised layers as plain ones: nn.Linear with the decoded weight, and what an adapter adds, in floating numbers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.factors import NotMergeableError
from ..core.frozen import KINDS, Frozen, is_foreign, kind_of
from .adapted import few
from .holder import Holder
from .layer import PeftLinear

# what Transformers and Accelerate leave on a quantised model, and read when it is saved, moved, cast or trained
_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@torch.no_grad()
def plain_layers(model: nn.Module, safe_merge: bool) -> dict[int, nn.Linear]:
    """{id(layer): what takes its place} for every quantised layer, adapted or not. The model is not changed.

    Raises NotMergeableError where one has no plain layer, or something else in the model is quantised.
    """
    kinds = {name: (m, packed_kind(m)) for name, m in model.named_modules()}
    if left := [f"{name} ({why})" for name, (m, kind) in kinds.items() if (why := _why_not(m, kind))]:
        raise NotMergeableError(
            f"dequantize=True would leave parts of the model quantised: {few(left, between='; ')}; merge into the "
            "model as it was before it was quantised: load that, load_adapter and merge_and_unload"
        )
    found = {name: (m, kind) for name, (m, kind) in kinds.items() if kind is not None}
    dtype, plain = dtype_beside(model, [m for m, _ in found.values()]), {}
    for name, (m, kind) in found.items():
        try:
            W = kind.matrix(m)
        except RuntimeError as e:
            raise NotMergeableError(f"{name}: {e}") from e
        if any(t.is_meta for t in W.parts):
            raise NotMergeableError(f"{name}: its weight is on the meta device (offloaded?); load the model without")
        to = W.compute or dtype or W.dtype
        if isinstance(m, Holder):
            weight, bias = m.merged_tensors(to, kind)
            if safe_merge:
                m.refuse_infinite(weight, bias)
        else:
            weight, bias = kind.values(m).to(to), None if m.bias is None else m.bias.to(to, copy=True)
        plain[id(m)] = _linear(m, weight, bias)
    return plain


def packed_kind(m: nn.Module) -> Frozen | str | None:
    """The kind by which a quantised layer is decoded, why it cannot be, or None for another module."""
    if isinstance(m, PeftLinear):
        if not m.kind.opaque:
            return m.kind if m.kind.packed else None
        m = m.__dict__.get("_hooked", m)
    if callable(m.__dict__.get("_old_forward")):  # Accelerate's hooks: what they are around
        m = copy.copy(m)
        m.__dict__.pop("forward", None)
    if not any(kind.packed and kind.reads(m) for kind in KINDS):
        return None
    return kind_of(m)


def _why_not(m: nn.Module, kind: Frozen | str | None) -> str:
    """Why a module stays quantised, or nothing."""
    if kind is not None or isinstance(m, Holder):
        return kind if isinstance(kind, str) else ""
    tensors = [*m._parameters.values(), *(m._buffers.values() if hasattr(m, "in_features") else ())]
    small = [t for t in tensors if t is not None and t.dim() > 1 and (not t.is_floating_point() or t.itemsize == 1)]
    codes = [str(t.dtype) for t in small if t.dtype != torch.bool] + [
        type(t).__name__ for t in tensors if is_foreign(t)
    ]
    return f"{type(m).__name__} holds {codes[0]}, which is not decoded" if codes else ""


def dtype_beside(model: nn.Module, quantised: list[nn.Module]) -> torch.dtype | None:
    """The dtype of the model's other frozen parameters, which their layers compute x in."""
    own = {id(p) for m in quantised for p in m.parameters()}
    others = (p.dtype for p in model.parameters() if id(p) not in own and not p.requires_grad)
    return next((dtype for dtype in others if dtype.is_floating_point), None)


def _linear(m: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear with a module's training mode and hooks, those of the quantiser left out."""
    plain = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    package = (m.base_class if isinstance(m, Holder) else type(m)).__module__.partition(".")[0]
    for name in vars(nn.Module()).keys() - {*_REGISTRIES}:
        own = m.__dict__[name]
        plain.__dict__[name] = _without(own, package) if isinstance(own, dict) else own
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    hooked = m.__dict__.get("_hooked", m)
    if callable(hooked.__dict__.get("_old_forward")):
        sys.modules["accelerate.hooks"].add_hook_to_module(plain, hooked._hf_hook)
    return plain


def _without(hooks: dict[int, Callable], package: str) -> dict[int, Callable]:
    """Hooks less those that are a package's own functions."""
    kept = type(hooks)()
    for key, hook in hooks.items():
        own = getattr(hook, "hook", hook)  # PyTorch wraps some
        if getattr(getattr(own, "func", own), "__module__", "").partition(".")[0] != package:
            kept[key] = hook
    return kept


def unmark(model: nn.Module) -> None:
    """Remove what says that a model is quantised, with which it could not be saved, cast or trained as a plain one."""
    for marked in [m for m in model.modules() if any(name in m.__dict__ for name in _MARKS)]:
        for name in (*_MARKS, "_weight_conversions"):  # how the checkpoint of a quantised model is laid out
            marked.__dict__.pop(name, None)
        if "is_quantized" in marked.__dict__:
            marked.is_quantized = False
        for m in marked.modules():
            for name in ("quantization_config", "_is_quantized"):
                getattr(getattr(m, "config", None), "__dict__", {}).pop(name, None)
