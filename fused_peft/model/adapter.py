"""One adapter of a frozen layer, and ``compose``: y of a layer with its active adapters, whoever holds their tensors.

Adapters act one after the other, each on what those before it made, as merging them in that order would:
the first beside the base in one fused call, every later one on the outcome z (which holds the layer's bias b)

    y = d_out ⊙ (z − b + s·h(drop(x ⊙ d_in) Aᵀ + a) Gᵀ Bᵀ) + b        z made from x ⊙ d_in

What a method gives as its bias is the layer's own and a change; a later one makes that change to the b it finds.
A base that computes C by itself (kind Opaque) is such a z from the start, and so are the rows of a table (Lookup).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core import lookup, ops
from ..core.factors import Factors, NotMergeableError
from ..core.frozen import Stored, now
from ..core.sharded import fill, shape_of, whole
from ..methods import Init, Method, PeftConfig, method_of
from .wide import HALF


def refuse_inference(tensors: Iterable[Tensor], config: PeftConfig) -> None:
    """ValueError where a config trains and a weight was made under torch.inference_mode: autograd refuses those."""
    if not config.inference_mode and any(t.is_inference() for t in tensors):
        raise ValueError(
            "the weights were made under torch.inference_mode(), so nothing beside them can train; load the model "
            "outside of it (torch.no_grad() will do), or give inference_mode=True (load_adapter: is_trainable=False)"
        )


def factors_of(adapter: Bound | With) -> Factors:
    """What trains as ``Factors``; of experts, stacked."""
    f = adapter.method.factors(adapter)
    return f.stacked(shape_of(adapter.weight)[0]) if adapter.kind.stacked else f


class Bound:
    """What a method reads of the layer it adapts: its tensors by name, ``config``, and the frozen layer's ``matrix``,
    ``weight``, ``bias``, ``in_features``, ``out_features`` and ``training``. Mixed into modules that hold tensors."""

    method: Method | None = None  # until the adapter is attached
    config: PeftConfig
    tensor_names: tuple[str, ...] = ()  # what trains
    buffer_names: tuple[str, ...] = ()
    awaits_weight = False  # made on the meta device from a weight that was not there yet

    def holder(self) -> nn.Module:
        """The module that holds the frozen weight, which the kind is asked about."""
        return self

    @torch.inference_mode(False)  # what trains must not be an inference tensor
    def _attach(self, config: PeftConfig, adapter_dtype: torch.dtype | None) -> None:
        """Make and register every tensor of the method; nothing is changed where that fails."""
        method, weight = method_of(config), self.kind.like(self.holder())
        config = config.for_module("")
        refuse_inference([weight], config)
        if adapter_dtype is None:
            dtype = self.kind.dtype(self.holder())
            adapter_dtype = torch.float32 if dtype in HALF else dtype
        start = self._start(method, config, adapter_dtype)
        if taken := [name for name in start.params | start.buffers if hasattr(self, name)]:
            raise ValueError(
                f"the layer has an attribute {taken[0]!r} already, which {method.name} needs for a tensor of its own; "
                "rename it, or exclude the layer"
            )
        self.method, self.config = method, config.in_use()
        for name, value in start.params.items():
            self.register_parameter(name, nn.Parameter(value.to(adapter_dtype)))
        for name, value in start.buffers.items():
            self.register_buffer(name, value)
        self.tensor_names, self.buffer_names = tuple(start.params), tuple(start.buffers)
        self.awaits_weight = method.from_weight and weight.is_meta

    @torch.no_grad()
    def _start(self, method: Method, config: PeftConfig, dtype: torch.dtype) -> Init:
        """What the method starts this layer from; a new adapter and a reset one share it."""
        layer, bias = self.holder(), whole(self.bias) if isinstance(self.bias, Tensor) else None
        device = self.kind.device(layer.__dict__.get("_hooked", layer))
        if self.kind.opaque and not method.needs_weight:  # its shape, dtype and device are all that is read
            W = torch.empty(1, dtype=dtype, device=device).expand(self.kind.shape(layer))
        else:
            W = self.kind.values(layer)
        new = lambda *shape: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        make = _stacked_start if self.kind.stacked else Method.start_lookup if self.kind.lookup else Method.start
        return make(method, W, bias, config, new)

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Initialise the adapter anew from the base weight, in place: the parameter objects stay the same.

        Raises RuntimeError while merged.
        """
        if self.merged:
            raise RuntimeError("the layer is merged; call unmerge before reset_adapter_parameters")
        start = self._start(self.method, self.config, getattr(self, self.tensor_names[0]).dtype)
        for name, value in (start.params | start.buffers).items():
            fill(getattr(self, name), value, source=0)
        self.awaits_weight = self.method.from_weight and self.kind.like(self.holder()).is_meta

    def factors(self) -> Factors:
        """What trains as ``Factors``, differentiable in the adapter's parameters."""
        return factors_of(self)

    def adapter_tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.tensor_names)

    def formed_weight(self, *tensors: Tensor) -> Tensor:
        """The method's weight (out, in) from these adapter tensors, in the order of ``tensor_names``."""
        return self.method.weight(With(self, dict(zip(self.tensor_names, tensors, strict=True))))

    def forms_weight(self, rows: int) -> bool:
        """Whether a call on that many rows forms its weight, by FLOPs where the method has both forms.

        One graph for every number of rows (torch.compile, torch.export) cannot choose by it, and is factored: that
        costs a third more at most, where a formed weight costs a single row as much as thousands.
        """
        if self.method.weight is None or self.method.factors is None:
            return self.method.weight is not None
        factored, formed = self.method.cost(self, rows)
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

            return statically_known_true(formed < factored)
        return formed < factored


def _stacked_start(method: Method, W: Tensor, bias: Tensor | None, config: PeftConfig, new) -> Init:
    """What the method starts each expert of a stack W (E, N, K) from, stacked; what all layers share is not."""
    each = [method.start(w, None if bias is None else bias[e], config, new) for e, w in enumerate(W)]

    def stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        shared = method.disk_shared
        return {n: t if n in shared else torch.stack([part[n] for part in parts]) for n, t in parts[0].items()}

    return Init(stack([start.params for start in each]), stack([start.buffers for start in each]))


# what an adapter has of its layer
_OF_THE_LAYER = frozenset(
    ("kind", "weight", "bias", "matrix", "in_features", "out_features", "base_class", "merged", "enabled")
)


class Adapter(Bound, nn.Module):
    """An adapter with tensors of its own beside a layer, whose weight and shape its method reads here too."""

    def __init__(self, layer: nn.Module, config: PeftConfig, adapter_dtype: torch.dtype | None = None):
        super().__init__()
        self.__dict__["layer"] = layer  # no child of this module
        self._attach(config, adapter_dtype)

    def holder(self) -> nn.Module:
        return self.__dict__["layer"].holder()

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name) if name in _OF_THE_LAYER else super().__getattr__(name)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"method={self.method.name}", self.config.describe()]))


class With:
    """An adapter with some of its tensors replaced, for forming a weight from tensors that autograd follows."""

    def __init__(self, adapter: Bound, tensors: dict[str, Tensor]):
        self._adapter, self._tensors = adapter, tensors

    def __getattr__(self, name: str):
        return self._tensors[name] if name in self._tensors else getattr(self._adapter, name)


# (x, w, factors, bias, c, training) -> y, in place of ``ops.linear``: of experts the call on rows in groups
Linear = Callable[..., Tensor]


def compose(layer: nn.Module, adapters: Sequence[Bound], x: Tensor, linear: Linear | None = None) -> Tensor:
    """y (..., N) of a layer with these adapters, one or more, in their order; x (..., K), or ids (...) of a table.

    ``layer`` gives the base: kind, weight, bias, training and, where it computes C by itself, base_forward.
    """
    kind = now(layer)
    if kind.lookup:
        y = layer.base_forward(x)
        for adapter in adapters:
            y = lookup.plus(y, layer, x, factors_of(adapter))
        return y
    if kind.opaque and not layer.kind.opaque:  # its own product passes gradients or says that it does not
        if reason := why_not_foreign(layer, adapters):
            raise RuntimeError(reason)
        if adapters[0].method.replaces_weight:
            return ops.linear(x, None, factors_of(adapters[0]), layer.bias, None, layer.training)
    if len(adapters) == 1 and not kind.opaque:
        return _first(adapters[0], x, kind.matrix(layer.holder()), layer.bias, layer.training, linear)
    found = [_acts(a) if a.method.beside else None for a in adapters]
    first, bias = adapters[0], layer.bias
    if kind.opaque:
        if any(f.d_out is not None and not f.scale_bias for f in found):  # the bias stays outside d_out: what is it?
            with torch.no_grad():
                bias = layer.base_forward(x.new_zeros(1, x.shape[-1]))[0].detach()
        start, rest = lambda x: own_product(layer, x, first.method.name), zip(adapters, found, strict=True)
    else:
        start = lambda x: _first(first, x, kind.matrix(layer.holder()), layer.bias, layer.training, linear, found[0])  # noqa: E731
        behind = found[0] is None or first.method.output is not None  # whose bias is no change of the layer's
        bias = bias if behind else found[0].merged_bias(bias)
        rest = zip(adapters[1:], found[1:], strict=True)
    steps, held = [], bias
    for adapter, f in rest:
        if adapter.method.residual is not None:
            steps.append((adapter.method.residual(adapter), False))
        behind = adapter.method.output is not None
        if not behind:
            f = moved(f, held, layer.bias)
            held = f.merged_bias(held)
        steps.append((f, behind))
    return in_turn(start, steps, x, bias, layer.training, linear)


def _acts(adapter: Bound) -> Factors:
    """The factors of an adapter behind another one."""
    return factors_of(adapter) if adapter.method.output is None else adapter.method.output(adapter)


def in_turn(
    start: Callable[[Tensor], Tensor],
    steps: Sequence[tuple[Factors, bool]],
    x: Tensor,
    bias: Tensor | None,
    training: bool = True,
    linear: Linear | None = None,
) -> Tensor:
    """y (..., N): z = start(x with every d_in), which holds ``bias`` (N,), then factors on z in turn; x (..., K).

    A step is (factors, whether they read z in place of x).
    """
    inputs = [x]  # of each step, the last one first: a later one's d_in scales what every earlier one reads
    for f, behind in reversed(steps):
        scales = f.d_in is not None and not behind
        inputs.append(inputs[-1] * f.d_in.to(x.dtype) if scales else inputs[-1])
    z = start(inputs.pop())
    for f, behind in steps:
        read = inputs.pop()
        if behind:  # its bias is no change of the layer's
            z = (linear or ops.linear)(z, None, f, None, z, training)
            continue
        z = beside(f, read, z, bias, training, linear)
        bias = f.merged_bias(bias)
    return z


def moved(f: Factors, bias: Tensor | None, own: Tensor | None) -> Factors:
    """Factors whose bias was made from the layer's ``own``, for a ``bias`` that other adapters left in its place."""
    if f.bias is None or bias is None or bias is own:
        return f
    return replace(f, bias=f.bias + (bias if own is None else bias - own))


def _first(
    adapter: Bound,
    x: Tensor,
    weight,
    bias: Tensor | None,
    training: bool,
    linear: Linear | None = None,
    f: Factors | None = None,
) -> Tensor:
    """The first adapter, in one call with the frozen product; f: its factors, where they are made already."""
    method, linear = adapter.method, linear or ops.linear
    if adapter.awaits_weight and not x.is_meta:
        raise RuntimeError(
            f"{method.name} starts from the weight, and this layer was made on the meta device; call "
            "reset_adapter_parameters() once its weight is loaded"
        )
    if method.output is not None:
        z = ops.plain_linear(x, weight, bias)
        return ops.linear(z, None, method.output(adapter), None, z, training)
    if not adapter.kind.stacked and adapter.forms_weight(x.numel() // max(1, x.shape[-1]) if method.cost else 0):
        return ops.formed_linear(x, adapter.formed_weight, adapter.adapter_tensors(), bias)
    if method.replaces_weight:
        weight = None
    if type(weight) is Stored and method.reads_weight and f is None:  # one decoded copy for its factors and the product
        weight = ops.read(weight, x)
        f = factors_of(adapter if weight.values is None else With(adapter, {"matrix": weight.values}))
    c = None
    if method.residual is not None:  # a call of its own, which keeps nothing, and which dropout spares
        weight, c = None, linear(x, weight, method.residual(adapter))
    return linear(x, weight, factors_of(adapter) if f is None else f, bias, c, training)


def beside(
    f: Factors, x: Tensor, z: Tensor, bias: Tensor | None, training: bool = True, linear: Linear | None = None
) -> Tensor:
    """y (..., N) of the expression with C + bias = z (..., N) already there, made from x ⊙ d_in; x (..., K)."""
    own = bias if f.bias is None else f.bias
    if f.d_out is None or f.scale_bias:
        extra = None if f.bias is None else own if bias is None else own - bias
    else:  # the bias stays outside d_out
        extra = own if bias is None else own - f.d_out * bias
    f = replace(f, bias=None, d_in=None if f.A is None else f.d_in)
    if f.A is None and linear is None:
        return f.to(z.dtype).expression(x, None, None if extra is None else extra.to(z.dtype), z)
    with ops.no_autocast(z.device.type):  # which z's dtype has settled
        return (linear or ops.linear)(x.to(z.dtype), None, f, extra, z, training)


def own_product(layer: nn.Module, x: Tensor, method: str) -> Tensor:
    """C + b of a base with a forward of its own. RuntimeError where it gives no tensor (..., N), or no gradient."""
    C, name = layer.base_forward(x), layer.base_class.__name__
    if not isinstance(C, Tensor) or C.shape != (*x.shape[:-1], layer.out_features):
        what = tuple(C.shape) if isinstance(C, Tensor) else f"a {type(C).__name__}"
        raise RuntimeError(
            f"{name}.forward gives {what} for x {tuple(x.shape)}, and an adapter needs a tensor (..., "
            f"{layer.out_features}); exclude this layer"
        )
    if x.requires_grad and torch.is_grad_enabled() and not C.requires_grad:
        if not layer.kind.opaque:
            raise RuntimeError(
                f"{about_foreign(layer, method)}, whose product passes no gradient on to the layers before it; "
                "quantise the weights only, not the activations, or train before quantising"
            )
        raise RuntimeError(
            f"{name}.forward gives no gradient to its input, so layers before it would not train; adapt only layers "
            "behind it, or use a base format that passes gradients"
        )
    return C


def about_foreign(layer: nn.Module, method: str) -> str:
    return (
        f"the weight of a {method} layer (in_features={layer.in_features}, out_features={layer.out_features}) was "
        f"quantised after it was adapted and is a {type(layer.weight).__name__}"
    )


def why_not_foreign(layer: nn.Module, adapters: Sequence[Bound]) -> str | None:
    """Why these adapters cannot act on a layer whose weight was quantised since, or None."""
    for a in adapters:
        formed = a.method.weight is not None and a.method.factors is None
        if formed or a.method.reads_weight or (a.method.replaces_weight and len(adapters) > 1):
            return (
                f"{about_foreign(layer, a.method.name)}, and {a.method.name} computes from the weight's values; use a "
                "method that adds to the layer, e.g. LoRA, or keep this layer unquantised"
            )
    return None


def why_not_together(adapters: Sequence[Bound]) -> str | None:
    """Why these adapters cannot be active together in this order, or None."""
    for i, adapter in enumerate(adapters[1:], 1):
        method = adapter.method
        if adapter.kind.stacked and factors_of(adapter).d_in is not None:
            return (
                f"{method.name} scales each expert's own input, so on experts it can only be the first of several "
                f"adapters; it is number {i + 1}"
            )
        if method.stands_alone:
            return (
                f"{method.name} reads the frozen weight itself, so it can only be the first of several adapters; it is "
                f"number {i + 1}"
            )
    return None


@torch.no_grad()
def merged(adapter: Bound, base: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(weight (N, K), bias) of the plain layer that equals an adapter on base (N, K) and bias, in base's dtype or
    wider. Raises NotMergeableError when there is none."""
    method = adapter.method
    if method.output is not None:
        raise NotMergeableError(
            f"{method.name} has a non-linearity behind the layer, so no weight equals it; keep the layer unmerged"
        )
    if method.weight is not None:
        return method.weight(With(adapter, {n: getattr(adapter, n).to(base.dtype) for n in adapter.tensor_names})), bias
    f = factors_of(adapter).to(base.dtype)
    if method.residual is not None:
        base = merged_with(method.residual(adapter).to(base.dtype), base)
    f = moved(f, bias, adapter.bias)
    return merged_with(f, base), f.merged_bias(bias)


def merged_with(f: Factors, W: Tensor) -> Tensor:
    """``Factors.merged`` of W (N, K), or of a stack (E, N, K) expert by expert."""
    return f.merged(W) if W.dim() == 2 else torch.stack([f.at(e).merged(w) for e, w in enumerate(W)])
