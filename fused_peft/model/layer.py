"""PeftLinear: a frozen linear layer and its adapters by name, of which some are active."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core import ops
from ..core.factors import NotMergeableError
from ..core.frozen import DENSE, OPAQUE, TRANSPOSED, Frozen, conv1d_type, kind_of
from ..core.sharded import fill, gathered, is_sharded, is_spread, placed_as, shape_of, whole, whole_grad
from ..methods import Method, PeftConfig, method_of
from .adapter import Adapter, Bound, With, compose, merged, why_not_together

# what a PeftLinear keeps on itself beside nn.Linear's attributes
OWN = ("method", "config", "merged", "enabled", "active", "kind", "base_class")
OWN += ("tensor_names", "buffer_names", "awaits_weight")
DEFAULT = "default"  # the name of the adapter that a layer is made with


def why_not_adaptable(module: nn.Module) -> str | None:
    """Why ``PeftLinear`` cannot take the place of a module, or None when it can."""
    if isinstance(module, PeftLinear):
        return "it already carries an adapter; merge_and_unload it first"
    kind = kind_of(module)
    if isinstance(kind, str):
        return kind
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


class Gathered(With):
    """A layer, or an adapter of one, as one process sees all of it: its sharded tensors whole, gradients too.
    Collective where any is, unless ``values`` is False: then they are on the meta device."""

    def __init__(self, adapter: Bound, values: bool = True):
        self._values = values
        tensors = {n: getattr(adapter, n) for n in (*adapter.tensor_names, *adapter.buffer_names, "bias")}
        super().__init__(adapter, {n: self._whole(t) for n, t in tensors.items() if t is not None})

    def _whole(self, t: Tensor) -> Tensor:
        if not self._values:
            return torch.empty(shape_of(t), dtype=t.dtype, device="meta")
        if not is_spread(t):
            return t
        copy = whole(t).detach()
        copy.grad = whole_grad(t)
        return copy

    @property
    def matrix(self) -> Tensor:
        kind, layer = self._adapter.kind, self._adapter
        return kind.values(layer) if self._values else kind.placed(self._whole(layer.weight))

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the values of the copies into the layer's own tensors."""
        for name in (*self._adapter.tensor_names, *self._adapter.buffer_names):
            own, value = getattr(self._adapter, name), getattr(self, name)
            if own is not value:
                fill(own, value)


class PeftLinear(Bound, nn.Linear):
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

    kind: Frozen = DENSE
    base_class: type = nn.Linear
    merged, enabled = False, True
    active: tuple[str, ...] | None = None  # the names of the active adapters; None: the layer's own
    _batch: Callable[[PeftLinear, Tensor], Tensor | None] | None = None  # what chooses an adapter for each sample

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: PeftConfig | None = None,
        device=None,
        dtype=None,
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
        layer = cls.around(linear, method_of(config))
        layer._attach(config, adapter_dtype)
        layer.active = None
        layer.freeze_base()
        return layer

    @classmethod
    def around(cls, linear: nn.Module, method: Method) -> PeftLinear:
        """A layer without an adapter yet, for one of a method; raises as ``from_linear`` does."""
        kind = kind_of(linear)
        if reason := why_not_adaptable(linear):
            raise TypeError(f"linear={type(linear).__name__}(...) cannot be adapted: {reason}")
        layer = cls.__new__(cls if kind in (DENSE, TRANSPOSED) else _also(type(linear), cls))
        if kind.opaque and method.needs_weight:
            kind = readable(linear, method)
        layer.__dict__.update(linear.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(linear.__dict__[registry])
        if layer.__dict__.pop("forward", None) is not None:  # hooks that place and offload tensors: they stay with it
            for name in ("_old_forward", "_hf_hook"):
                layer.__dict__.pop(name, None)
            if kind.opaque:
                layer.__dict__["_hooked"] = linear
        layer.kind, layer.base_class = kind, type(linear)
        layer.out_features, layer.in_features = kind.shape(linear)
        layer.merged, layer.enabled = False, True
        layer.active = ()
        return layer

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

    def freeze_base(self) -> None:
        for name in ("weight", "bias"):
            if isinstance(t := getattr(self, name, None), nn.Parameter):
                t.requires_grad_(False)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.kind.transposed

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (out_features, in_features), whatever its layout."""
        return self.kind.dense(self)

    @property
    def adapters(self) -> dict[str, Bound]:
        """Every adapter of the layer by name, the layer's own first."""
        own = {} if self.method is None else {DEFAULT: self}
        return {**own, **self._modules.get("added", {})}

    @property
    def active_names(self) -> tuple[str, ...]:
        return (DEFAULT,) if self.active is None else self.active

    def active_adapters(self) -> tuple[Bound, ...]:
        """The active adapters in their order."""
        return (self,) if self.active is None else tuple(self.adapters[name] for name in self.active)

    def add_adapter(self, name: str, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> None:
        """Give the layer a further adapter, not active yet; its tensors are added.NAME.lora_A and so on.

        Raises ValueError for a name that is taken or holds a dot, and as from_linear does, with nothing changed.
        """
        self.take_adapter(name, self.made_adapter(name, config, adapter_dtype))

    def made_adapter(self, name: str, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> Adapter:
        """The adapter that ``add_adapter`` would add."""
        if name in self.adapters or not name or "." in name:
            raise ValueError(f"adapter_name={name!r} is taken, empty or holds a dot; choose another name")
        if self.kind.opaque and method_of(config).needs_weight:
            raise TypeError(
                f"{method_of(config).name} reads the weight, which {self.base_class.__name__} keeps to itself; take a "
                "method that only adds or scales, such as LoRA"
            )
        return Adapter(self, config, adapter_dtype)

    def take_adapter(self, name: str, adapter: Adapter) -> None:
        adapter.train(self.training)
        if "added" not in self._modules:
            self.add_module("added", nn.ModuleDict())
        self.added[name] = adapter

    def set_adapter(self, names: Sequence[str]) -> None:
        """Make the named adapters active, in this order; an empty list leaves the base alone.

        Raises RuntimeError while merged, ValueError for an unknown name or adapters that cannot act together.
        """
        if self.merged:
            raise RuntimeError("the layer is merged; call unmerge before set_adapter")
        if unknown := [name for name in names if name not in self.adapters]:
            raise ValueError(f"adapter_name={unknown[0]!r} is none of this layer's: {', '.join(self.adapters)}")
        if reason := why_not_together([self.adapters[name] for name in names]):
            raise ValueError(f"adapter_names={list(names)}: {reason}")
        self.active = None if tuple(names) == (DEFAULT,) else tuple(names)  # None is what compose looks for first

    def delete_adapter(self, name: str) -> None:
        """Remove an added adapter. ValueError for the layer's own or an unknown name, RuntimeError while merged."""
        if name == DEFAULT or name not in self.adapters:
            why = "is the one the layer was made with; leave it inactive" if name == DEFAULT else "is not there"
            raise ValueError(f"adapter_name={name!r} {why}")
        if self.merged:
            raise RuntimeError("the layer is merged; call unmerge before delete_adapter")
        del self.added[name]
        if not self.added:
            del self._modules["added"]
        if self.active is not None:
            self.active = tuple(n for n in self.active if n != name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; ValueError for an adapter tensor of another shape, which no optimizer built before knows."""
        if name in self.tensor_names and (param is None or param.shape != getattr(self, name, param).shape):
            raise ValueError(
                f"{name}: shape {None if param is None else tuple(param.shape)} does not fit this layer's "
                f"{self.method.name} ({tuple(getattr(self, name).shape)}); to change the rank, merge_and_unload, adapt "
                "anew and build the optimizer after that"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Initialise the base weight as nn.Linear does, and the adapter as its method does (for ``to_empty``)."""
        super().reset_parameters()
        if self.method is not None:
            self.reset_adapter_parameters()

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
        return ops.plain_linear(x, self.kind.matrix(self), self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer was before it was adapted, on its tensors as they are now."""
        hooked = self.__dict__.get("_hooked")
        if hooked is None:
            return self.base_class.forward(self, x)
        for name, own in self._parameters.items():  # loading and .to() may have replaced what the two share
            if name in hooked._parameters and own is not None and not own.is_meta:
                hooked._parameters[name] = own
        return hooked.forward(x)

    def _warn_if_training(self) -> None:
        """A merged layer computes from its weight alone, so its adapter gets no gradient."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if any(p.requires_grad for a in self.active_adapters() for p in a.adapter_tensors()):
                names = " + ".join(a.method.name for a in self.active_adapters())
                warnings.warn(
                    f"a merged {names} layer runs in training mode, where its adapter gets no gradient; "
                    "unmerge(model) before training, or model.eval()",
                    stacklevel=2,
                )

    @torch.no_grad()
    def merged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the plain layer that equals this one with its active adapters, in the weight's dtype and
        layout, whole where that is sharded; computed in at least fp32.

        Raises NotMergeableError when there is none.
        """
        plain = self.kind.as_plain(self)
        if isinstance(plain, str):
            raise NotMergeableError(f"{plain}; keep the layer unmerged")
        dtype, found = self.weight.dtype, [Gathered(adapter) for adapter in self.active_adapters()]
        wide = torch.promote_types(dtype, torch.float32)
        W, bias = plain.values(self).to(wide), Gathered(self).bias
        for adapter in found:
            W, bias = merged(adapter, W, bias)
        if bias is not None and self.bias is None and is_sharded(self.weight):
            raise NotMergeableError("the merged layer has a bias and the sharded one none; merge before sharding")
        merged_weight = plain.placed(W.to(dtype)).contiguous()
        return merged_weight, None if bias is None else bias.to(dtype, copy=True)

    def merge(self, safe_merge: bool = False) -> None:
        """Fold the adapter into ``weight`` and ``bias`` and keep the base beside them, so that unmerge is exact.

        safe_merge: refuse a merged weight or bias that is not finite. Raises RuntimeError when already merged,
        NotMergeableError or ValueError with nothing changed.
        """
        if self.merged:
            raise RuntimeError("the layer is already merged; unmerge it before merging again")
        if reason := self.kind.why_unwritable(self):
            raise NotMergeableError(f"{reason}; keep the layer unmerged")
        weight, bias = self.merged_tensors()
        if safe_merge:
            for name, t in (("weight", weight), ("bias", bias)):
                if t is not None and not torch.isfinite(t).all():
                    raise ValueError(f"the merged {name} has NaN or infinite entries; the adapter is broken")
        whole_within = gathered([self.weight, self.bias], write=True)
        with torch.inference_mode(False), torch.no_grad(), whole_within:
            kept = None if self.bias is None else self.bias.detach().clone()
            self.register_buffer("_base_weight", self.weight.detach().clone(), persistent=False)
            self.register_buffer("_base_bias", kept, persistent=False)
            self.weight.copy_(placed_as(weight, self.weight))  # in place: the Parameter stays, and autograd notices
            if self.bias is not None:
                self.bias.copy_(placed_as(bias, self.bias))
            elif bias is not None:
                self.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Restore the base weight and bias, bit for bit. Raises RuntimeError when not merged."""
        if not self.merged:
            raise RuntimeError("the layer is not merged; there is nothing to unmerge")
        whole_within = gathered([self.weight, self.bias], write=True)
        with torch.inference_mode(False), torch.no_grad(), whole_within:
            self.weight.copy_(self._base_weight)
            if self._base_bias is None:
                self.bias = None
            else:
                self.bias.copy_(self._base_bias)
        self._forget_base()

    def _forget_base(self) -> None:
        del self._base_weight, self._base_bias
        self.merged = False

    def changes_bias(self) -> bool:
        """Whether merging would write into the bias that the layer has."""
        if self.bias is None:
            return False
        with torch.no_grad():
            found = [a.method.factors(a) for a in self.active_adapters() if a.method.factors is not None]
        return any(f.bias is not None or f.scale_bias for f in found)

    def has_new_bias(self) -> bool:
        """Whether merging has given the layer a bias that it lacked."""
        return self.merged and self._base_bias is None and self.bias is not None

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
        for name in (*OWN, *(("in_features", "out_features") if _is_conv1d(self.base_class) else ())):
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
        self.awaits_weight = self.awaits_weight and (self.weight.is_meta or not whole)

    def extra_repr(self) -> str:
        about = f"method={self.method.name}" if self.method else None
        details = self.config.describe() if self.method else None
        flags = [flag for flag, on in (("merged", self.merged), ("disabled", not self.enabled)) if on]
        return ", ".join(filter(None, [super().extra_repr(), about, details, *flags]))

    def __reduce_ex__(self, protocol):
        if type(self) is _also(self.base_class, PeftLinear):  # a class made for this base, which no module holds
            return _revived, (self.base_class,), self.__dict__
        return super().__reduce_ex__(protocol)


def _is_conv1d(kind: type) -> bool:
    conv1d = conv1d_type()
    return conv1d is not None and issubclass(kind, conv1d)


@functools.cache
def _also(base: type, adapted: type) -> type:
    """PeftLinear that is an instance of a base class with a forward of its own as well, so that its checkpoint code and
    its checks by class stay."""
    if issubclass(adapted, base) or _is_conv1d(base):
        return adapted
    return type(f"Peft{base.__name__}", (adapted, base), {"__module__": adapted.__module__})


def _revived(base: type) -> PeftLinear:
    return PeftLinear.__new__(_also(base, PeftLinear))
