"""A frozen layer that holds adapters by name, of which some are active: what every kind of adapted layer shares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.factors import NotMergeableError
from ..core.frozen import Frozen, now
from ..core.sharded import fill, gathered, is_sharded, is_spread, placed_as, shape_of, whole, whole_grad
from ..methods import PeftConfig, method_of
from .adapter import Adapter, Bound, With, factors_of, merged, why_not_together

DEFAULT = "default"  # the name of the adapter that a layer is made with


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
        kind, layer = self._adapter.kind, self._adapter.holder()
        if not self._values and kind.packed:
            return torch.empty(kind.shape(layer), dtype=kind.dtype(layer), device="meta")
        return kind.values(layer) if self._values else kind.placed(self._whole(layer.weight))

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the values of the copies into the layer's own tensors."""
        for name in (*self._adapter.tensor_names, *self._adapter.buffer_names):
            own, value = getattr(self._adapter, name), getattr(self, name)
            if own is not value:
                fill(own, value)


class Holder(Bound):
    """Mixed into a module with ``kind``, ``weight``, ``bias`` and ``base_class``."""

    merged, enabled = False, True
    active: tuple[str, ...] | None = None  # the names of the active adapters; None: the layer's own

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight of a linear layer is stored (in, out)."""
        return self.kind.transposed and not self.kind.lookup

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (out_features, in_features), whatever its layout."""
        return now(self).dense(self)

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
    def merged_tensors(
        self, dtype: torch.dtype | None = None, kind: Frozen | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the plain layer that equals this one with its active adapters, in ``dtype`` (default: the
        weight's) and the weight's layout, whole where that is sharded; computed in at least fp32. kind: by which W is
        read, where that is not the layer's own.

        Raises NotMergeableError when there is none.
        """
        plain = kind or self.kind.as_plain(self)
        if isinstance(plain, str):
            raise NotMergeableError(f"{plain}; keep the layer unmerged")
        dtype, found = dtype or self.weight.dtype, [Gathered(adapter) for adapter in self.active_adapters()]
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
            self.refuse_infinite(weight, bias)
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

    def refuse_infinite(self, weight: Tensor, bias: Tensor | None) -> None:
        """ValueError where a merged weight or bias is not finite."""
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and not torch.isfinite(t).all():
                raise ValueError(f"the merged {name} has NaN or infinite entries; the adapter is broken")

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
            found = [factors_of(a) for a in self.active_adapters() if a.method.factors is not None]
        return any(f.bias is not None or f.scale_bias for f in found)

    def has_new_bias(self) -> bool:
        """Whether merging has given the layer a bias that it lacked."""
        return self.merged and self._base_bias is None and self.bias is not None

    def extra_repr(self) -> str:
        about = f"method={self.method.name}" if self.method else None
        details = self.config.describe() if self.method else None
        flags = [flag for flag, on in (("merged", self.merged), ("disabled", not self.enabled)) if on]
        return ", ".join(filter(None, [super().extra_repr(), about, details, *flags]))
