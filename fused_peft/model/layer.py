"""An adapted layer in the place of the module whose tensors it took over; PeftLinear, of a linear layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core import ops
from ..core.frozen import DENSE, OPAQUE, TRANSPOSED, Frozen, conv1d_type, kind_of, now
from ..core.sharded import is_sharded, whole
from ..methods import Method, PeftConfig, method_of
from .adapter import compose
from .holder import Holder

# what an adapted layer keeps on itself beside its module's attributes
OWN = ("method", "config", "merged", "enabled", "active", "kind", "base_class")
OWN += ("tensor_names", "buffer_names", "awaits_weight")


def why_not_adaptable(module: nn.Module, lookups: bool = False) -> str | None:
    """Why no adapted layer can take the place of a module, or None; lookups: whether one of a table may."""
    if isinstance(module, PeftLayer):
        return "it already carries an adapter; merge_and_unload it first"
    kind = kind_of(module)
    if isinstance(kind, str):
        return kind
    if kind.lookup and not lookups:
        return (
            f"{type(module).__name__} is not a linear layer but looks up rows; fused_peft.get_peft_model adapts it, or "
            "PeftEmbedding.from_embedding"
        )
    if taken := [name for name in OWN if hasattr(module, name)]:
        return f"it has an attribute {taken[0]!r}, which an adapted layer uses for itself; rename it, or exclude it"
    return None


def readable(linear: nn.Module, method: Method) -> Frozen:
    """The kind by which a method reads the weight of a module with a forward of its own; TypeError where none does."""
    kind = OPAQUE.as_plain(linear)
    if isinstance(kind, str):
        raise TypeError(
            f"linear={type(linear).__name__}(...) cannot be adapted: {method.name} reads the weight, and {kind}; "
            "exclude it, or take a method that only adds or scales, such as LoRA"
        )
    return kind


class PeftLayer(Holder):
    """What takes the place of a module and holds its tensors under their own keys, the adapter's beside them. Mixed in
    in front of the module's class."""

    kind: Frozen = DENSE
    base_class: type = nn.Module
    _batch: Callable[[PeftLayer, Tensor], Tensor | None] | None = None  # what chooses an adapter for each sample

    @classmethod
    def made_from(cls, module: nn.Module, config: PeftConfig, adapter_dtype: torch.dtype | None) -> PeftLayer:
        """The layer that takes a module's place, with an adapter. TypeError or ValueError where the two do not fit."""
        layer = cls.around(module, method_of(config))
        layer._attach(config, adapter_dtype)
        layer.active = None
        layer.freeze_base()
        return layer

    @classmethod
    def around(cls, module: nn.Module, method: Method) -> PeftLayer:
        """A layer without an adapter yet, for one of a method. TypeError where module or method do not fit."""
        kind, what = kind_of(module), "embedding" if cls.kind.lookup else "linear"
        reason = why_not_adaptable(module, lookups=cls.kind.lookup)
        if not reason and cls.kind.lookup and not kind.lookup:
            reason = "it is no nn.Embedding; give it to PeftLinear.from_linear"
        if reason:
            raise TypeError(f"{what}={type(module).__name__}(...) cannot be adapted: {reason}")
        layer = cls.__new__(cls if kind in (DENSE, TRANSPOSED) else _also(type(module), cls))
        if kind.opaque and method.needs_weight:
            kind = readable(module, method)
        layer.__dict__.update(module.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(module.__dict__[registry])
        if layer.__dict__.pop("forward", None) is not None:  # hooks that place and offload tensors: they stay with it
            for name in ("_old_forward", "_hf_hook"):
                layer.__dict__.pop(name, None)
            if kind.opaque or kind.lookup:
                layer.__dict__["_hooked"] = module
        layer.kind, layer.base_class = kind, type(module)
        layer.out_features, layer.in_features = kind.shape(module)
        layer.merged, layer.enabled = False, True
        layer.active = ()
        return layer

    def freeze_base(self) -> None:
        for name, t in self._parameters.items():
            if t is not None and name not in self.tensor_names:
                t.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialise the base weight as its class does, and the adapter as its method does (for ``to_empty``)."""
        super().reset_parameters()
        if self.method is not None:
            self.reset_adapter_parameters()

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer was before it was adapted, on its tensors as they are now."""
        hooked = self.__dict__.get("_hooked")
        if hooked is None:
            return self.base_class.forward(self, x)
        for name, own in self._parameters.items():  # loading and .to() may have replaced what the two share
            if name in hooked._parameters and own is not None and not own.is_meta:
                hooked._parameters[name] = own
        return hooked.forward(x)

    def unload(self, merge: bool = True) -> nn.Module:
        """A plain layer of the original class that shares this one's weight Parameter; merged into it if ``merge``."""
        if merge and not self.merged:
            self.merge()
        if not merge and self.merged:
            self.unmerge()
        if self.merged:
            self._forget_base()
        plain = self.base_class.__new__(self.base_class)
        plain.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            plain.__dict__[registry] = dict(self.__dict__[registry])
        hooked = plain.__dict__.pop("_hooked", None)
        if hooked is not None:
            return hooked
        lacks_shape = _is_conv1d(self.base_class) or self.kind.lookup
        for name in (*OWN, *(("in_features", "out_features") if lacks_shape else ())):
            plain.__dict__.pop(name, None)
        plain.__dict__.pop("_batch", None)
        plain._modules.pop("added", None)
        for name in self.tensor_names:
            del plain._parameters[name]
        for name in self.buffer_names:
            del plain._buffers[name]
        return plain

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A checkpoint always holds the base weight, merged or not, so that reloading never adds the adapter twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._base_weight
            destination.pop(prefix + "bias", None)
            if self._base_bias is not None:
                destination[prefix + "bias"] = self._base_bias

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.merged:
            errors.append(f"{prefix[:-1]} is merged; call unmerge before load_state_dict")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        whole = all(prefix + name in state_dict for name in ("weight", *self.tensor_names, *self.buffer_names))
        self.awaits_weight = self.awaits_weight and (self.kind.like(self).is_meta or not whole)

    def __reduce_ex__(self, protocol):
        adapted = next(c for c in type(self).__mro__ if PeftLayer in c.__bases__)
        if type(self) is _also(self.base_class, adapted):  # a class made for this base, which no module holds
            return _revived, (self.base_class, adapted), self.__dict__
        return super().__reduce_ex__(protocol)


class PeftLinear(PeftLayer, nn.Linear):
    """Drop-in linear layer: x (..., in_features) -> y (..., out_features), base weight frozen, adapter trainable.

    The keys ``weight`` and ``bias`` are those of nn.Linear; each trainable tensor of the method is a parameter beside
    them under the method's name for it (``lora_A``, ``d_in``, ...). Every parameter exists from construction on.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear; device may be "meta".
        config: one of the library's configs, e.g. ``LoraConfig(r=16)``.
        adapter_dtype: dtype of the adapter; None means fp32 where the weight is fp16 or bf16 (gradients then come out
            in fp32, the computation stays in the input's dtype), else the weight's dtype.

    Raises TypeError when config is no config of this library, ValueError when the layer cannot carry it.
    """

    base_class: type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: PeftConfig | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        method_of(config)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.merged, self.enabled, self.active = False, True, None
        self._attach(config, adapter_dtype)
        self.freeze_base()

    @classmethod
    def from_linear(cls, linear: nn.Module, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> PeftLinear:
        """A PeftLinear around an existing nn.Linear, Transformers Conv1D, or module with in_features and out_features.

        Shares the weight and bias Parameters (no copy), which are frozen, and keeps hooks, training mode and
        attributes. A Conv1D's weight stays (in, out), under the same key. A module whose forward is its own computes
        C itself, the adapter beside it; the result is an instance of its class too. Raises TypeError or ValueError,
        with nothing changed, when the module or the config does not fit.
        """
        return cls.made_from(linear, config, adapter_dtype)

    def __setstate__(self, state: dict) -> None:
        """As it was pickled, by an older version too; RuntimeError where that kept other tensors."""
        state = dict(state)
        for old, new in (("adapter_names", "tensor_names"), ("_base_class", "base_class")):
            if old in state:
                state[new] = state.pop(old)
        if state.pop("fan_in_fan_out", False):
            state["kind"] = TRANSPOSED
        super().__setstate__(state)
        if self.method is None:
            return
        own = tuple(name for name in self._buffers if not name.startswith("_base_"))
        self.__dict__.setdefault("buffer_names", own)
        if lacks := [n for n in (*self.tensor_names, *self.method.disk_buffers) if not hasattr(self, n)]:
            raise RuntimeError(
                f"this {self.method.name} layer was pickled by an older version of fused_peft and lacks "
                f"{', '.join(lacks)}; load the pickle with that version and call save_pretrained there: load_adapter "
                "reads that folder"
            )

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) in x's dtype (or autocast's); x (..., in_features) in the weight's dtype.

        Raises ValueError (width, device) or TypeError (dtype) when x does not fit.
        """
        if self._batch is not None and self.enabled and not self.merged:
            if (y := self._batch(self, x)) is not None:
                return y
        if self.enabled and not self.merged and self.active != ():
            return compose(self, (self,) if self.active is None else self.active_adapters(), x)
        if self.merged and self.enabled:
            self._warn_if_training()
        if self.merged and not self.enabled:
            weight, bias = self.kind.placed(self._base_weight), self._base_bias
            if is_sharded(weight) and not is_sharded(x):
                weight, bias = whole(weight), None if bias is None else whole(bias)
            return ops.plain_linear(x, weight, bias)
        if self.kind.opaque:
            return self.base_forward(x)
        return ops.plain_linear(x, now(self).matrix(self), self.bias)


def _is_conv1d(kind: type) -> bool:
    conv1d = conv1d_type()
    return conv1d is not None and issubclass(kind, conv1d)


@functools.cache
def _also(base: type, adapted: type) -> type:
    """An adapted class whose layers are instances of a base class with a forward of its own as well, so that its
    checkpoint code and its checks by class stay."""
    if issubclass(adapted, base) or _is_conv1d(base):
        return adapted
    return type(f"Peft{base.__name__}", (adapted, base), {"__module__": adapted.__module__})


def _revived(base: type, adapted: type = PeftLinear) -> PeftLayer:
    return adapted.__new__(_also(base, adapted))
