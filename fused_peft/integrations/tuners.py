"""This library's methods inside Hugging Face PEFT: ``peft.get_peft_model(model, fp.SSBConfig(...))``.

Importing this file registers every method that PEFT lacks with ``peft.utils.register_peft_method``. Adapters,
checkpoints, switching, merging and Trainer are then PEFT's; each layer computes through ``compose``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from ..core.factors import NotMergeableError
from ..core.frozen import is_foreign, kind_of, now
from ..methods import METHODS, PeftConfig, method_of
from ..model import adapted, checks
from ..model.adapter import Adapter, compose, merged, why_not_together
from ..model.layer import readable, why_not_adaptable
from ..model.rows import Chosen, length_error, mixed
from ..model.targets import resolve


class FusedTunerLayer(nn.Module, BaseTunerLayer):
    """A linear layer with named adapters of one method.

    Each adapter tensor lies in a container under its name on disk, where PEFT looks for it; an ``Adapter`` is handed
    the current tensors before each use and registers none of its own, and ``compose`` makes the call.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftConfig):
        super().__init__()
        if reason := why_not_adaptable(base_layer):
            raise TypeError(f"linear={type(base_layer).__name__}(...) cannot be adapted: {reason}")
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.adapter_layer_names, self.other_param_names = (), ("configs",)
        self.configs: dict[str, PeftConfig] = {}
        self._adapters: dict[str, Adapter] = {}
        self._unmerged: tuple[Tensor, Tensor | None] | None = None  # the base while merged
        base = self.get_base_layer()
        self.kind, self.base_class = kind_of(base), type(base)
        self.out_features, self.in_features = self.kind.shape(base)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        if self.kind.opaque and method_of(config).needs_weight:
            self.kind = readable(self.get_base_layer(), method_of(config))
        adapter = Adapter(self, config)
        for name in adapter.tensor_names:
            self._take(adapter, name, adapter_name, "adapter_layer_names", nn.ParameterDict)
        for name in adapter.buffer_names:
            make = partial(BufferDict, persistent=name in adapter.method.disk_buffers)
            self._take(adapter, name, adapter_name, "other_param_names", make)
        self.configs[adapter_name], self._adapters[adapter_name] = config, adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _take(self, adapter: Adapter, name: str, adapter_name: str, listed: str, make: Callable) -> None:
        """Put a tensor of the adapter into the container of its name, made and listed where it is the first."""
        key = adapter.method.disk_key(name)
        if not hasattr(self, key):
            setattr(self, key, make())
            setattr(self, listed, (*getattr(self, listed), key))
        getattr(self, key)[adapter_name] = getattr(adapter, name)

    def holder(self) -> nn.Module:
        """The module that holds the frozen weight."""
        return self.get_base_layer()

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (out, in)."""
        return now(self).dense(self.holder())

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias, merged or not: what an adapter's bias is a change of."""
        return self.get_base_layer().bias if self._unmerged is None else self._unmerged[1]

    @property
    def enabled(self) -> bool:
        return not self.disable_adapters

    def base_forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def adapter(self, name: str) -> Adapter:
        """One adapter on the tensors that this module holds now."""
        adapter = self._adapters[name]
        for registry, names in (
            (adapter._parameters, adapter.tensor_names),
            (adapter._buffers, adapter.buffer_names),
        ):
            for part in names:
                registry[part] = getattr(self, adapter.method.disk_key(part))[name]
        if (
            adapter.awaits_weight and not self.kind.like(self.holder()).is_meta
        ):  # made on the meta device, and loaded since
            adapter.awaits_weight = any(t.is_meta for t in (*adapter.parameters(), *adapter.buffers()))
        adapter.training = self.training
        return adapter

    def active(self) -> list[Adapter]:
        """The active adapters that this layer has. ValueError where they cannot act together."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        found = [self.adapter(name) for name in names]
        if len(found) > 1 and (reason := why_not_together(found)):
            raise ValueError(f"active_adapters={names}: {reason}; set_adapter to one of them")
        return found

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = kwargs.pop("adapter_names", None)
        if isinstance(names, Chosen) and not self.merged and not self.disable_adapters:
            return self._mixed(x, names)
        found = [] if self.merged else self.active()
        return compose(self, found, x) if found else self.base_layer(x, *args, **kwargs)

    def _mixed(self, x: Tensor, names: Chosen) -> Tensor:
        """y (S, ..., N) of samples x (S, ..., K), each with the adapter of its name."""
        if x.dim() < 2 or x.shape[0] != len(names):
            raise ValueError(length_error(names, x))

        def alone(name: str | None, x: Tensor) -> Tensor:
            return self.base_layer(x) if name is None else compose(self, [self.adapter(name)], x)

        return mixed(x, [name if name in self.configs else None for name in names], None, alone, None)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the named adapters (default: the active ones) into the base weight, one after the other.

        Raises NotMergeableError, and ValueError with safe_merge for a weight that is not finite, with nothing changed.
        """
        base = self.get_base_layer()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not names:
            return
        plain = self.kind.as_plain(base)
        if isinstance(plain, str):
            raise NotMergeableError(f"{plain}; keep the adapter unmerged")
        before = base.weight.data, None if base.bias is None else base.bias.data
        W, bias = plain.dense(base), base.bias
        for name in names:
            W, bias = merged(self.adapter(name), W.to(torch.promote_types(W.dtype, torch.float32)), bias)
            if safe_merge and not all(torch.isfinite(t).all() for t in (W, bias) if t is not None):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight = plain.write(W, base)
        try:
            self._set_base(weight, bias)
        except BaseException:
            self._set_base(*before)
            raise
        if not self.merged:
            self._unmerged = before
        self.merged_adapters += names

    def _set_base(self, weight: Tensor, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        base.weight.data = weight.to(base.weight)
        if bias is None or base.bias is None:
            base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        else:
            base.bias.data = bias.to(base.bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight and bias, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set_base(*self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        self._adapters.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _get_name(self) -> str:
        first = next(iter(self._adapters.values()), None)
        return "FusedTunerLayer" if first is None else f"{first.method.name}.FusedTunerLayer"


adapted.ACTIVE[FusedTunerLayer] = FusedTunerLayer.active


class FusedTuner(BaseTuner):
    """PEFT's tuner model of one registered method; PEFT matches the modules, this replaces them."""

    tuner_layer_cls = FusedTunerLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            if method_of(peft_config).trains_other_biases:
                raise ValueError(
                    "target_modules=None trains the biases of every module, which only fused_peft.get_peft_model does; "
                    "give target_modules, e.g. 'all-linear'"
                )
            peft_config.target_modules = resolve(self.model, peft_config).target_modules
        return peft_config

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None):
        config = config.for_module(current_key)
        if not config.inference_mode:
            checks.watch(self.model)
        if isinstance(target, FusedTunerLayer):
            target.update_layer(adapter_name, config)
            return
        new = FusedTunerLayer(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # a further adapter trains once it is made active
        self._replace_module(parent, target_name, new, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict: dict | None = None, **more):
        """PEFT finds a file's modules by the prefix of the peft_type; methods that share one name their keys after
        themselves."""
        if state_dict is not None:
            own, prefix = f".{method_of(self.peft_config[adapter_name]).name}_", f".{self.prefix}"
            state_dict = {key.replace(own, prefix): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **more)

    def _check_merge_allowed(self) -> None:
        """PEFT asks this before it merges anything. NotMergeableError for a weight that other modules read too, and for
        one whose format a merge cannot write: both would change outputs silently."""
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
        for name, layer in self.model.named_modules():
            if not isinstance(layer, FusedTunerLayer):
                continue
            weight = layer.kind.like(layer.holder())
            if others := [other for other in owners[id(weight)] if other != name]:
                raise NotMergeableError(
                    f"{name} shares its weight with {', '.join(others)}, which merging would change too; untie it "
                    "before it is adapted: model.config.tie_word_embeddings = False, and a Parameter of its own, "
                    f"{name}.weight = nn.Parameter({name}.weight.clone())"
                )
            if is_foreign(weight):
                raise NotMergeableError(
                    f"the weight of {name} is a {type(weight).__name__}, whose format a merge cannot write; keep the "
                    "adapter unmerged, or load it into the model before quantising and merge there"
                )
        super()._check_merge_allowed()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters of half-precision layers are made in fp32; where that is not wanted they get the layer's dtype."""
        for layer in self.model.modules():
            if isinstance(layer, FusedTunerLayer) and not autocast_adapter_dtype:
                for key in layer.adapter_layer_names:
                    if adapter_name in (found := getattr(layer, key)):
                        found[adapter_name].data = found[adapter_name].data.to(layer.kind.dtype(layer.holder()))


def _register() -> frozenset[str]:
    """Every peft_type that PEFT does not have; returns the types."""
    known = set(PeftType._member_map_)
    lacking = {m.config.peft_type: m.config for m in METHODS.values() if m.config.peft_type not in known}
    for peft_type, config in lacking.items():
        member = str.__new__(PeftType, peft_type)
        member._name_ = member._value_ = peft_type
        PeftType._member_names_.append(peft_type)
        PeftType._member_map_[peft_type] = PeftType._value2member_map_[peft_type] = member
        type.__setattr__(PeftType, peft_type, member)
        name = peft_type.lower()
        model = f"{config.__name__.removesuffix('Config')}Model"
        globals()[model] = type(model, (FusedTuner,), {"prefix": f"{name}_", "__module__": __name__})  # to be pickled
        register_peft_method(name=name, config_cls=config, model_cls=globals()[model])
    return frozenset(lacking)


REGISTERED = _register()
import_module(f"{__package__}.peft")  # the rest of what PEFT needs, where this file is the first to be imported
