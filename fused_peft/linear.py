"""PeftLinear: a frozen nn.Linear and one adapter, computed as the single expression of ``factors``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ops
from .factors import Factors, NotMergeableError
from .methods import Init, Method, PeftConfig, method_of
from .sharded import fill, gathered, is_sharded, is_spread, placed_as, shape_of, whole, whole_grad
from .wide import HALF


def conv1d_type() -> type | None:
    """Transformers' Conv1D (a linear layer with its weight stored (in, out)), if Transformers is in use."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


# what a PeftLinear keeps on itself beside nn.Linear's attributes
_OWN = ("method", "config", "merged", "enabled", "fan_in_fan_out", "_base_class")
_OWN += ("adapter_names", "buffer_names", "awaits_weight")


def is_linear(module: nn.Module) -> bool:
    conv1d = conv1d_type()
    return isinstance(module, nn.Linear) or (conv1d is not None and isinstance(module, conv1d))


def is_foreign(t: Tensor | None) -> bool:
    """Whether a tensor is of a class that stores its values in a way of its own (torchao's quantised ones)."""
    return t is not None and not is_sharded(t) and is_traceable_wrapper_subclass(t)


def why_not_adaptable(module: nn.Module) -> str | None:
    """Why ``PeftLinear`` cannot take the place of a module, or None when it can."""
    kind = type(module).__name__
    if isinstance(module, PeftLinear):
        return "it already carries an adapter; merge_and_unload it first"
    if not is_linear(module):
        return f"{kind} is not a linear layer (torch.nn.Linear or Transformers' Conv1D); exclude it"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it, so an adapter would do nothing; exclude it"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return (
            f"{kind} has a forward of its own, which the fused layer would bypass; exclude it, or adapt the model with "
            "Hugging Face PEFT, which calls it"
        )
    if "forward" in module.__dict__:
        return (
            "its forward is replaced on the instance (device_map hooks do that); adapt the model before dispatching it"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its shape is not known yet; run one batch through the model first"
    if module._parameters.get("weight") is None and not hasattr(module, "parametrizations"):
        return "a hook computes its weight (pruning, weight_norm); make that permanent first, e.g. by prune.remove"
    if is_sharded(module.weight):
        return "its weight is sharded over several processes; adapt the model before parallelising or sharding it"
    if is_foreign(module.weight):
        return (
            f"its weight is a {type(module.weight).__name__}, whose values this library cannot read; adapt it before "
            "it is quantised, or with Hugging Face PEFT"
        )
    if not module.weight.dtype.is_floating_point:
        return f"its weight has dtype {module.weight.dtype}, but a floating dtype is needed; dequantise it first"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    if taken := [name for name in _OWN if hasattr(module, name)]:
        return f"it has an attribute {taken[0]!r}, which an adapted layer uses for itself; rename it, or exclude it"
    return None


def refuse_inference(tensors: Iterable[Tensor], config: PeftConfig) -> None:
    """ValueError where a config trains and a weight was made under torch.inference_mode: autograd refuses those."""
    if not config.inference_mode and any(t.is_inference() for t in tensors):
        raise ValueError(
            "the weights were made under torch.inference_mode(), so nothing beside them can train; load the model "
            "outside of it (torch.no_grad() will do), or give inference_mode=True (load_adapter: is_trainable=False)"
        )


class _With:
    """A layer with some of its tensors replaced, for forming a weight from tensors that autograd follows."""

    def __init__(self, layer: PeftLinear, tensors: dict[str, Tensor]):
        self.__dict__.update(tensors, _layer=layer)

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


class Gathered(_With):
    """A layer as one process sees all of it: its sharded tensors whole, gradients too. Collective where any is, unless
    ``values`` is False: then they are on the meta device."""

    def __init__(self, layer: PeftLinear, values: bool = True):
        self.__dict__["_values"] = values
        tensors = {n: getattr(layer, n) for n in (*layer.adapter_names, *layer.buffer_names, "bias")}
        super().__init__(layer, {n: self._whole(t) for n, t in tensors.items() if t is not None})

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
        return self._layer._matrix(self._whole(self._layer.weight).detach())

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the values of the copies into the layer's own tensors."""
        for name in (*self._layer.adapter_names, *self._layer.buffer_names):
            own, value = getattr(self._layer, name), getattr(self, name)
            if own is not value:
                fill(own, value)


class PeftLinear(nn.Linear):
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

    method = None  # until the adapter is attached
    merged = False
    adapter_names = ()

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
        self.fan_in_fan_out = False
        self._base_class = nn.Linear
        self._attach(config, adapter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> PeftLinear:
        """A PeftLinear around an existing nn.Linear or Transformers Conv1D.

        Shares the weight and bias Parameters (no copy), which are frozen, and keeps hooks, training mode and
        attributes. A Conv1D's weight stays (in, out), under the same key. Raises TypeError or ValueError, with nothing
        changed, when the module or the config does not fit.
        """
        reason = why_not_adaptable(linear)
        if reason:
            raise TypeError(f"linear={type(linear).__name__}(...) cannot be adapted: {reason}")
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(linear.__dict__[registry])
        layer.fan_in_fan_out = not isinstance(linear, nn.Linear)
        layer._base_class = type(linear)
        shape = shape_of(linear.weight)
        layer.out_features, layer.in_features = reversed(shape) if layer.fan_in_fan_out else shape
        layer._attach(config, adapter_dtype)
        return layer

    @torch.inference_mode(False)  # what trains must not be an inference tensor
    def _attach(self, config: PeftConfig, adapter_dtype: torch.dtype | None) -> None:
        method, weight = method_of(config), self.weight
        config = config.for_module("")
        refuse_inference([weight], config)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if weight.dtype in HALF else weight.dtype
        start = self._start(method, config, adapter_dtype)
        self.method, self.config = method, config.in_use()
        self.merged, self.enabled = False, True
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        for name, value in start.params.items():
            self.register_parameter(name, nn.Parameter(value.to(adapter_dtype)))
        for name, value in start.buffers.items():
            self.register_buffer(name, value)
        self.adapter_names, self.buffer_names = tuple(start.params), tuple(start.buffers)
        self.awaits_weight = method.from_weight and weight.is_meta

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (out_features, in_features), whatever its layout."""
        return self._matrix(self.weight)

    @torch.no_grad()
    def _start(self, method: Method, config: PeftConfig, dtype: torch.dtype) -> Init:
        """What the method starts this layer from; a new layer and a reset one share it."""
        weight, bias = self._matrix(whole(self.weight).detach()), None if self.bias is None else whole(self.bias)
        return method.start(weight, bias, config, lambda *shape: weight.new_empty(shape, dtype=dtype))

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in); its own inverse."""
        return weight.t() if self.fan_in_fan_out else weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; ValueError for an adapter tensor of another shape, which no optimizer built before knows."""
        if name in self.adapter_names and (param is None or param.shape != getattr(self, name, param).shape):
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

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Initialise the adapter anew from the base weight, in place: the parameter objects stay the same.

        Raises RuntimeError while merged.
        """
        if self.merged:
            raise RuntimeError("the layer is merged; call unmerge before reset_adapter_parameters")
        start = self._start(self.method, self.config, getattr(self, self.adapter_names[0]).dtype)
        for name, value in (start.params | start.buffers).items():
            fill(getattr(self, name), value, source=0)
        self.awaits_weight = self.method.from_weight and self.weight.is_meta

    def factors(self) -> Factors:
        """What trains as ``Factors``, differentiable in the adapter's parameters."""
        return self.method.factors(self)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) in x's dtype (or autocast's); x (..., in_features) in the weight's dtype.

        Raises ValueError (width, device) or TypeError (dtype) when x does not fit, RuntimeError where the weight was
        quantised since and the method or the gradient of x needs what its class does not give.
        """
        weight, bias = self.weight, self.bias
        if self.enabled and not self.merged and self._over_foreign():
            return self._beside_foreign(x)
        if self.fan_in_fan_out:
            weight = weight.t()
        if self.enabled and not self.merged:
            method = self.method
            if self.awaits_weight and not x.is_meta:
                raise RuntimeError(
                    f"{method.name} starts from the weight, and this layer was made on the meta device; call "
                    "reset_adapter_parameters() once its weight is loaded"
                )
            if method.output is not None:
                z = ops.plain_linear(x, weight, bias)
                return ops.linear(z, None, method.output(self), None, z, self.training)
            if self.forms_weight(x.numel() // max(1, x.shape[-1]) if method.cost else 0):
                return ops.formed_linear(x, self.formed_weight, self.adapter_tensors(), bias)
            if method.replaces_weight:
                weight = None
            c = None
            if method.residual is not None:  # a call of its own, which keeps nothing, and which dropout spares
                weight, c = None, ops.linear(x, weight, method.residual(self))
            return ops.linear(x, weight, method.factors(self), bias, c, self.training)
        if self.merged and self.enabled:
            self._warn_if_training()
        if self.merged and not self.enabled:
            weight, bias = self._matrix(self._base_weight), self._base_bias
            if is_sharded(weight) and not is_sharded(x):
                weight, bias = whole(weight), None if bias is None else whole(bias)
        return ops.plain_linear(x, weight, bias)

    def _over_foreign(self) -> bool:
        """``is_foreign`` of the weight, in the time of a comparison."""
        return type(self.weight) is not nn.Parameter and is_foreign(self.weight)

    def _beside_foreign(self, x: Tensor) -> Tensor:
        """``forward`` where the weight's values cannot be read: C = x̂Wᵀ is its class's own, and the update is added."""
        method, bias = self.method, self.bias
        if method.output is not None:
            z = self._foreign_product(x, bias)
            return ops.linear(z, None, method.output(self), None, z, self.training)
        f = self.foreign_factors()
        if method.replaces_weight:
            return ops.linear(x, None, f, bias, None, self.training)
        if f.d_in is not None:
            x, f = x * f.d_in.to(x.dtype), replace(f, d_in=None)
        c = self._foreign_product(x, None)
        if f.A is None:
            bias = bias if bias is None else bias.to(c.dtype)
            return f.to(c.dtype).expression(x, None, bias, c)
        if method.residual is not None:
            c = ops.linear(x, None, method.residual(self), None, c)
        return ops.linear(x, None, f, bias, c, self.training)

    def _foreign_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        z = ops.plain_linear(x, self._matrix(self.weight), bias)
        if x.requires_grad and torch.is_grad_enabled() and not z.requires_grad:
            raise RuntimeError(
                f"{self._about_foreign()}, whose product passes no gradient on to the layers before it; quantise the "
                "weights only, not the activations, or train before quantising"
            )
        return z

    def foreign_factors(self) -> Factors:
        """The factors beside a weight whose values cannot be read. RuntimeError where the method needs them."""
        method, f, cause = self.method, None, None
        try:
            f = method.factors(self) if method.factors is not None else None
        except Exception as e:  # whatever the weight's class raises
            cause = e
        if f is None or f.hadamard or (f.drop_base and f.p and self.training):
            raise RuntimeError(
                f"{self._about_foreign()}, and {method.name} computes from the weight's values; use a method that adds "
                "to the layer, e.g. LoRA, or keep this layer unquantised"
            ) from cause
        return f

    def _about_foreign(self) -> str:
        return (
            f"the weight of a {self.method.name} layer (in_features={self.in_features}, out_features="
            f"{self.out_features}) was quantised after it was adapted and is a {type(self.weight).__name__}"
        )

    def _warn_if_training(self) -> None:
        """A merged layer computes from its weight alone, so its adapter gets no gradient."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if any(p.requires_grad for p in self.adapter_tensors()):
                warnings.warn(
                    f"a merged {self.method.name} layer runs in training mode, where its adapter gets no gradient; "
                    "unmerge(model) before training, or model.eval()",
                    stacklevel=2,
                )

    def forms_weight(self, rows: int) -> bool:
        """Whether a call on that many rows forms its weight, by FLOPs where the method has both forms and the weight
        can be read.

        One graph for every number of rows (torch.compile, torch.export) cannot choose by it, and is factored: that
        costs a third more at most, where a formed weight costs a single row as much as thousands.
        """
        if self.method.weight is None or self.method.factors is None:
            return self.method.weight is not None
        if self._over_foreign():
            return False
        factored, formed = self.method.cost(self, rows)
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

            return statically_known_true(formed < factored)
        return formed < factored

    def adapter_tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.adapter_names)

    def formed_weight(self, *tensors: Tensor) -> Tensor:
        """The method's weight (out, in) from these adapter tensors, in the order of ``adapter_names``."""
        return self.method.weight(_With(self, dict(zip(self.adapter_names, tensors, strict=True))))

    @torch.no_grad()
    def merged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the equivalent plain layer, in the weight's dtype and layout, whole where that is sharded;
        computed in at least fp32.

        Raises NotMergeableError when the method has no equivalent weight.
        """
        method, dtype, layer = self.method, self.weight.dtype, Gathered(self)
        bias, wide = layer.bias, torch.promote_types(dtype, torch.float32)
        if method.output is not None:
            raise NotMergeableError(
                f"{method.name} has a non-linearity behind the layer, so no weight equals it; keep the layer unmerged"
            )
        if method.weight is not None:
            merged = method.weight(_With(layer, {n: getattr(layer, n).to(wide) for n in self.adapter_names}))
        else:
            f, base = method.factors(layer).to(wide), layer.matrix.to(wide)
            if method.residual is not None:
                base = method.residual(layer).to(wide).merged(base)
            merged, bias = f.merged(base), f.merged_bias(bias)
        if bias is not None and self.bias is None and is_sharded(self.weight):
            raise NotMergeableError("the merged layer has a bias and the sharded one none; merge before sharding")
        merged = self._matrix(merged.to(dtype)).contiguous()
        return merged, None if bias is None else bias.to(dtype, copy=True)

    def merge(self, safe_merge: bool = False) -> None:
        """Fold the adapter into ``weight`` and ``bias`` and keep the base beside them, so that unmerge is exact.

        safe_merge: refuse a merged weight or bias that is not finite. Raises RuntimeError when already merged,
        NotMergeableError or ValueError with nothing changed.
        """
        if self.merged:
            raise RuntimeError("the layer is already merged; unmerge it before merging again")
        if hasattr(self, "parametrizations") or self.weight.is_meta:
            why = "is on the meta device (offloaded?)" if self.weight.is_meta else "is parametrized"
            raise NotMergeableError(f"its weight {why}, so what merging writes would not stay; keep the layer unmerged")
        if is_foreign(self.weight):
            raise NotMergeableError(
                f"its weight is a {type(self.weight).__name__}, which would round the merged values to its own format; "
                "keep the layer unmerged"
            )
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
        if self.bias is None or self.method.factors is None:
            return False
        with torch.no_grad():
            f = self.method.factors(self)
        return f.bias is not None or f.scale_bias

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
        plain = self._base_class.__new__(self._base_class)
        plain.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            plain.__dict__[registry] = dict(self.__dict__[registry])
        for name in (*_OWN, *(("in_features", "out_features") if self.fan_in_fan_out else ())):
            del plain.__dict__[name]
        for name in self.adapter_names:
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
        whole = all(prefix + name in state_dict for name in ("weight", *self.adapter_names, *self.buffer_names))
        self.awaits_weight = self.awaits_weight and (self.weight.is_meta or not whole)

    def extra_repr(self) -> str:
        about = f"method={self.method.name}"
        details = self.config.describe()
        flags = [flag for flag, on in (("merged", self.merged), ("disabled", not self.enabled)) if on]
        return ", ".join(filter(None, [super().extra_repr(), about, details, *flags]))
