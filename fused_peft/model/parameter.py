"""Adapters on a parameter that a module multiplies by itself: a stack of experts (E, N, K), or a router's matrix.

The parameter stays where it is, under its own key. Its module gets a subclass in place of its class, and a
``PeftParameter`` beside the parameter, which holds the adapters. Where the module is experts by Transformers' contract,
the subclass computes them from their routed rows; elsewhere the module's own forward reads W + s·B A, formed in each
call, in place of W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..core import experts, grouped, ops
from ..core.factors import Factors, NotMergeableError
from ..core.frozen import DENSE, EXPERTS, TRANSPOSED_EXPERTS, Frozen, is_foreign
from ..core.groups import Groups
from ..core.sharded import is_sharded
from ..methods import Method, PeftConfig, method_of
from .adapter import compose, factors_of, merged_with
from .holder import Holder

SUFFIX = "_adapter"  # a PeftParameter's name behind that of its parameter


def matrix_shape(owner: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a parameter that can carry an adapter, or of each matrix of a stack."""
    N, K = owner._parameters[name].shape[-2:]
    stacked_in_out = owner._parameters[name].dim() == 3 and getattr(owner, "is_transposed", False)
    return (K, N) if stacked_in_out else (N, K)


def why_not(owner: nn.Module, name: str) -> str | None:
    """Why a parameter of a module cannot carry an adapter, or None."""
    if name not in owner._parameters:
        return f"{_instead(owner, name)}; keep it out of the quantisation, or load its values dequantised"
    W = owner._parameters[name]
    if W.dim() not in (2, 3):
        return f"it has shape {tuple(W.shape)}; a matrix (out, in) or a stack of them (experts, out, in) is needed"
    if not W.dtype.is_floating_point or is_foreign(W):
        return f"it is a {type(W).__name__} of {W.dtype}, and values in a quantised format are not read"
    if is_sharded(W):
        return "it is sharded over several processes; adapt the model before parallelising or sharding it"
    if name + SUFFIX in owner._modules:
        return "it already carries an adapter; merge_and_unload it first"
    if "forward" in owner.__dict__ and not callable(owner.__dict__.get("_old_forward")):
        return "its module has a forward of its own on the instance, which an adapter would not see"
    if hasattr(owner, name + SUFFIX):
        return f"its module has an attribute {name + SUFFIX!r}, which the adapter needs for itself; rename it"
    return None


def _instead(owner: nn.Module, name: str) -> str:
    """What a module has in the place of a parameter."""
    if "parametrizations" in owner._modules and name in owner.parametrizations:
        by = ", ".join(type(p).__name__ for p in owner.parametrizations[name])
        return f"it is parametrized ({by}), and values that are made anew in each call are not read"
    return f"it is a {type(owner.__dict__.get(name)).__name__} and no parameter, a format that is not read"


def why_not_method(method: Method, config: PeftConfig, stacked: bool, routed: bool) -> str | None:
    """Why a method cannot act on a parameter: one of a stack, of experts by Transformers' contract (``routed``)."""
    if method.factors is None:
        return f"{method.name} forms a weight or acts behind the layer, and has no factors to put beside a parameter"
    if method.weight is not None or method.trains_other_biases or (stacked and not method.stacks):
        return f"{method.name} computes with the weight (out, in) and the bias of one linear layer"
    if stacked and method.decomposes_later:
        return f"{method.name} decomposes one weight while it trains, not a stack of them"
    if not routed:
        if config.dropout:
            return (
                f"its module computes with it in a forward of its own, where dropout={config.dropout} cannot act on "
                "the adapter's input alone; set it to 0"
            )
        if getattr(config, "nonlinearity", "identity") != "identity":
            return f"nonlinearity={config.nonlinearity!r} has no weight for its module's own forward to read"
    return None


class PeftParameter(Holder, nn.Module):
    """The adapters of one parameter of a module, its tensors stacked over the experts: A (E, r, K), B (E, N, r).

    Args:
        owner: the module that holds the parameter, and multiplies by it.
        name: the parameter's name in it.
        config: as for ``PeftLinear``.
        adapter_dtype: as for ``PeftLinear``.

    Raises TypeError or ValueError, with the module unchanged, when parameter or config do not fit.
    """

    def __init__(
        self, owner: nn.Module, name: str, config: PeftConfig | None, adapter_dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.__dict__["owner"] = owner  # no child of this module
        self.parameter_name, self.base_class = name, base_of(owner)
        if reason := why_not(owner, name):
            raise TypeError(f"{type(owner).__name__}.{name} cannot be adapted: {reason}")
        self.routed = experts.why_not(owner, self.base_class) is None and name in experts.stacks(owner)
        transposed = getattr(owner, "is_transposed", False)
        self.kind: Frozen = DENSE if self.weight.dim() == 2 else TRANSPOSED_EXPERTS if transposed else EXPERTS
        self.out_features, self.in_features = self.kind.shape(self)
        self.active = ()
        if config is not None:
            self.fits(config)
            self._attach(config, adapter_dtype)
            self.active = None

    def fits(self, config: PeftConfig) -> None:
        """TypeError where a config's method cannot act on this parameter."""
        if reason := why_not_method(method_of(config), config, self.kind.stacked, self.routed):
            raise TypeError(f"{self.base_class.__name__}.{self.parameter_name} cannot be adapted: {reason}")

    def made_adapter(self, name: str, config: PeftConfig, adapter_dtype: torch.dtype | None = None):
        self.fits(config)
        return super().made_adapter(name, config, adapter_dtype)

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.parameter_name]

    @property
    def bias(self) -> nn.Parameter | None:
        """Of experts (E, N); a router's own bias takes no part."""
        return self.owner._parameters.get(self.parameter_name + "_bias") if self.kind.stacked else None

    @bias.setter
    def bias(self, value: None) -> None:
        """Unmerging puts back that there was none."""

    def merged_tensors(self, *how) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().merged_tensors(*how)
        if bias is not None and self.bias is None:
            kind = self.base_class.__name__
            raise NotMergeableError(f"{kind} has no bias for what the adapter adds; keep it unmerged")
        return weight, bias

    def freeze_base(self) -> None:
        for t in (self.weight, self.bias):
            if t is not None:
                t.requires_grad_(False)

    @property
    def acts(self) -> bool:
        """Whether a call computes with adapters."""
        return self.enabled and not self.merged and self.active != ()

    def call(self, x: Tensor, groups: Groups) -> Tensor:
        """y (P, N) of the experts' rows, sorted by expert; x (M, K)."""
        E, bias = self.weight.shape[0], self.bias

        def linear(x, w, f, bias=None, c=None, training=True):
            return grouped.linear(x, w, f.stacked(E), groups, bias, c, training)

        if self.acts:
            return compose(self, self.active_adapters(), x, linear)
        if self.merged and not self.enabled:
            return linear(x, self.kind.placed(self._base_weight), Factors(), self._base_bias)
        return linear(x, self.kind.matrix(self), Factors(), bias)

    def formed(self) -> Tensor:
        """The parameter as its module's own forward reads it: with what the active adapters add, as it is stored."""
        if self.merged and not self.enabled:
            return self._base_weight
        if not self.acts:
            return self.weight
        W = self.kind.matrix(self)
        for adapter in self.active_adapters():
            if adapter.method.residual is not None:
                W = merged_with(adapter.method.residual(adapter), W)
            f = factors_of(adapter)
            if f.bias is not None or (f.scale_bias and self.bias is not None):
                kind = self.base_class.__name__
                raise RuntimeError(
                    f"{adapter.method.name} changes a bias of {kind}, whose own forward reads it unchanged"
                )
            W = merged_with(f, W)
        return self.kind.placed(W).to(self.weight.dtype)

    def forward(self, *args, **kwargs) -> Tensor:
        raise RuntimeError(f"the adapters of {self.parameter_name} act when {self.base_class.__name__} is called")

    def install(self) -> None:
        """Put the adapters beside the parameter, whose module computes with them from now on."""
        owner, base = self.owner, base_of(self.owner)
        held = (*getattr(owner, "_held", ()), self.parameter_name)
        _become(owner, _adapting(base, held))
        owner.add_module(self.parameter_name + SUFFIX, self)
        self.train(owner.training)

    def unload(self, merge: bool = True) -> None:
        """Take the adapters away, merged into the parameter if ``merge``; the module is what it was, once none holds
        any."""
        if merge and not self.merged:
            self.merge()
        if not merge and self.merged:
            self.unmerge()
        if self.merged:
            self._forget_base()
        owner = self.owner
        del owner._modules[self.parameter_name + SUFFIX]
        held = tuple(n for n in owner._held if n != self.parameter_name)
        _become(owner, _adapting(base_of(owner), held) if held else base_of(owner))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A checkpoint always holds the base weight, merged or not."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            own = prefix.removesuffix(f"{self.parameter_name}{SUFFIX}.") + self.parameter_name
            destination[own] = self._base_weight
            if self._base_bias is not None:
                destination[own + "_bias"] = self._base_bias

    def extra_repr(self) -> str:
        return f"parameter={self.parameter_name}, {super().extra_repr()}"


class _Adapting:
    """A module whose parameters carry adapters. Mixed in in front of the module's own class."""

    _base: type = nn.Module
    _held: tuple[str, ...] = ()

    def forward(self, *args, **kwargs):
        held = {name: self._modules[name + SUFFIX] for name in self._held}
        if not any(p.acts or (p.merged and not p.enabled) for p in held.values()):
            return self._base.forward(self, *args, **kwargs)
        found = experts.arguments(args, kwargs) if all(p.routed for p in held.values()) else None
        if found is not None and experts.why_not(self, self._base) is None:
            if found[0].dtype == next(iter(held.values())).weight.dtype or ops.autocasting(found[0]):
                return experts.forward(self, *found, partial(_product, self, held))
        drops = (p for p in held.values() if p.routed and p.training and p.acts)  # others were refused with dropout
        if any(a.config.dropout for p in drops for a in p.active_adapters()):
            reason = experts.why_not(self, self._base)
            reason = reason or "not with hidden_states, top_k_index and top_k_weights of the weights' dtype alone"
            raise RuntimeError(
                f"{self._base.__name__} is called in a way that forms its adapted weights ({reason}), where dropout "
                "cannot act on the adapter's input; set the dropout to 0"
            )
        self.__dict__["_forms"] = True
        try:
            return self._base.forward(self, *args, **kwargs)
        finally:
            del self.__dict__["_forms"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if merged := [n for n in self._held if self._modules[n + SUFFIX].merged]:
            errors.append(f"{prefix}{merged[0]} is merged; call unmerge before load_state_dict")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __reduce_ex__(self, protocol):
        return _revived, (self._base, self._held), self.__dict__


def _product(owner: nn.Module, held: dict[str, PeftParameter], name: str, x: Tensor, groups: Groups) -> Tensor:
    """A stack's product and bias, with its adapters where it has any."""
    if name in held:
        return held[name].call(x, groups)
    bias = owner._parameters.get(name + "_bias")
    return grouped.linear(x, experts.matrices(owner, owner._parameters[name]), Factors(), groups, bias)


def _become(owner: nn.Module, kind: type) -> None:
    """Change a module's class, also behind the hooks with which Accelerate places and offloads its tensors."""
    owner.__class__ = kind
    if callable(owner.__dict__.get("_old_forward")):
        owner.__dict__["_old_forward"] = kind.forward.__get__(owner)


def base_of(module: nn.Module) -> type:
    """The class of a module before its parameters carried adapters."""
    return module._base if isinstance(module, _Adapting) else type(module)


def _reading(name: str) -> Callable[[nn.Module], Tensor]:
    """A property: the parameter, and within the module's own forward what the adapters make of it."""
    return property(
        lambda self: self._modules[name + SUFFIX].formed() if self.__dict__.get("_forms") else self._parameters[name]
    )


@functools.cache
def _adapting(base: type, held: tuple[str, ...]) -> type:
    own = {"__module__": __name__, "_base": base, "_held": held, **{name: _reading(name) for name in held}}
    return type(f"Peft{base.__name__}", (_Adapting, base), own)


def _revived(base: type, held: tuple[str, ...]) -> nn.Module:
    kind = _adapting(base, held)
    return kind.__new__(kind)
