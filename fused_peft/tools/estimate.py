"""Bytes of one training step, without making a tensor: parameters, gradients, AdamW, and what adapted layers keep.

Ours are found by adapting a twin of the model on the meta device and running each layer's own forward there. Hugging
Face PEFT's are written out from the forwards of its 0.21.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core import experts, table
from ..core.frozen import Frozen, Stored, is_foreign, kind_of
from ..methods import PeftConfig
from ..model.adapter import factors_of
from ..model.convert import carry_out, plan
from ..model.layer import PeftLayer
from ..model.parameter import PeftParameter
from ..model.plain import dtype_beside


@dataclass(frozen=True)
class LayerEstimate:
    """Bytes that one adapted layer, or stack of experts, keeps for backward; peft_* None where PEFT has no such layer.

    x: the layer's input (of an embedding the ids), where it is kept as it came. beyond_x: everything else.
    """

    name: str
    x: int
    beyond_x: int
    peft_x: int | None
    peft_beyond_x: int | None


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step on one device; shows as a table. peft_*: Hugging Face PEFT's, None where it lacks
    the method.

    base: frozen parameters, among them the originals of modules_to_save and of trained biases, and the scales and
        tables of weights that are stored in parts; no buffers.
    adapter: trainable parameters: adapters, copies of modules_to_save, trained biases.
    buffers: frozen tensors that the method keeps beside the weights (SVD factors, DoRA's norms).
    gradients, optimizer: one gradient and two AdamW moments of each trainable parameter, in its dtype.
    x, beyond_x: what the adapted linear layers keep for backward, summed over ``layers``. x counts each layer's own
        input; layers that read one input (q, k and v) keep it once, so the sum is an upper figure. beyond_x, what a
        layer makes and keeps itself, is never shared.

    decoded: the largest weight of ``layers`` that is stored in parts, as a matrix: it is there for a moment in each
        layer's forward and backward, and no part of the total. 0 where there is none.

    Not counted: what the rest of the model keeps (attention, norms, activations, the loss), memory that is free again
    when a layer's forward ends, and the allocator's rounding.
    """

    method: str
    tokens: int
    base: int
    adapter: int
    buffers: int
    gradients: int
    optimizer: int
    x: int
    beyond_x: int
    peft_x: int | None
    peft_beyond_x: int | None
    decoded: int
    layers: tuple[LayerEstimate, ...] = field(repr=False)

    @property
    def total(self) -> int:
        return self._trained + self.buffers + self.x + self.beyond_x

    @property
    def peft_total(self) -> int | None:
        """With our base, adapter, gradients and moments: PEFT's are of the same shapes and dtypes. What AdaLoRA's
        allocator keeps, three more tensors of the adapter's shapes, is left out."""
        return None if self.peft_x is None else self._trained + self.peft_x + self.peft_beyond_x

    @property
    def _trained(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer

    def _rows(self) -> tuple[tuple[str, str, str], list[tuple[str, str, str]]]:
        rows = (
            ("frozen parameters", self.base, self.base),
            ("trainable parameters", self.adapter, self.adapter),
            ("gradients", self.gradients, self.gradients),
            ("AdamW moments", self.optimizer, self.optimizer),
            ("buffers of the method", self.buffers, 0),
            ("kept for backward: x", self.x, self.peft_x),
            ("kept for backward: beyond x", self.beyond_x, self.peft_beyond_x),
            ("total", self.total, self.peft_total),
        )
        if self.decoded:
            rows += (("for a moment: a decoded weight", self.decoded, self.decoded),)
        known, title = self.peft_x is not None, f"{self.method}, {self.tokens} tokens, {len(self.layers)} layers"
        head = (title, "fused_peft", "HF PEFT")
        return head, [(name, _size(ours), _size(peft) if known else "-") for name, ours, peft in rows]

    def __str__(self) -> str:
        return table.text(*self._rows(), right=(1, 2), least=12)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return table.html(*self._rows(), right=(1, 2))


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 1 << 30 else f"{n / 2**20:.2f} MiB"


def estimate(
    model: nn.Module,
    config: PeftConfig,
    tokens: int,
    adapter_dtype: torch.dtype | None = None,
    device: str | torch.device = "cuda",
) -> Estimate:
    """What one training step of ``get_peft_model(model, config)`` holds, in bytes, ours and Hugging Face PEFT's.

    The model is not changed and none of its values are read: it may be on the meta device. Nothing of its size is made.

    Args:
        model: any nn.Module with linear layers or embeddings.
        config: e.g. ``LoraConfig(r=16, target_modules="all-linear")``.
        tokens: rows of x a step, batch size times sequence length. x has the weight's dtype (of a weight stored in
            parts, that of the model's other frozen parameters, else the one that its layer computes in) and needs a
            gradient.
        adapter_dtype: as for get_peft_model; None is fp32 for fp16 and bf16 layers, else the weight's dtype.
        device: where it would train. Of it depends PEFT's dropout mask alone: one byte an element on a GPU, on the
            CPU an element of the adapter's dtype.

    Raises ValueError when tokens is no positive integer, and what get_peft_model raises.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= 0:
        raise ValueError(f"tokens={tokens!r} must be a positive integer; give batch size times sequence length")
    device = torch.device(device)
    twin = _on_meta(model)
    planned = plan(twin, config, adapter_dtype)
    parameters, state, found = {*carry_out(twin, planned).parameters()}, planned.state, planned.layers.items()
    parameters.update(state.biases.values(), *(module.parameters() for module in state.saved.values()))
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    packed = [(kind, m) for m in twin.modules() if (kind := _packed(m)) is not None]
    beside = dtype_beside(twin, [m for _, m in packed])
    x_of = {id(layer): _x(layer, tokens, beside) for _, layer in found if isinstance(layer, PeftLayer)}
    rows = tuple(
        LayerEstimate(name, *_kept(layer, tokens, x_of), *_kept_by_peft(layer, tokens, device, x_of))
        for name, layer in found
    )
    known = all(row.peft_x is not None for row in rows) and bool(rows)
    return Estimate(
        method=state.config.method_name,
        tokens=tokens,
        base=_bytes([p for p in parameters if not p.requires_grad] + [t for k, m in packed for t in k.matrix(m).parts]),
        adapter=trained,
        buffers=sum(getattr(layer, name).nbytes for _, layer in found for name in layer.buffer_names),
        gradients=trained,
        optimizer=2 * trained,
        x=sum(row.x for row in rows),
        beyond_x=sum(row.beyond_x for row in rows),
        peft_x=sum(row.peft_x for row in rows) if known else None,
        peft_beyond_x=sum(row.peft_beyond_x for row in rows) if known else None,
        decoded=max((_decoded(layer, x_of) for _, layer in found if _packed(layer) is not None), default=0),
        layers=rows,
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """A twin of the module tree, tied where the model is tied: every tensor on the meta device, all else shared."""
    if not isinstance(model, nn.Module):
        return model
    twins: dict[int, object] = {}

    def tensor(t: Tensor | None) -> Tensor | None:
        if t is None or nn.parameter.is_lazy(t):
            return t
        if id(t) not in twins:
            twin = torch.empty(t.shape, dtype=t.dtype, device="meta")
            if is_foreign(t):
                names, how = t.__tensor_flatten__()
                inner = {name: tensor(getattr(t, name)) for name in names}
                twin = type(t).__tensor_unflatten__(inner, how, t.shape, t.stride())
            twins[id(t)] = nn.Parameter(twin, t.requires_grad) if isinstance(t, nn.Parameter) else twin
            if type(t) not in (Tensor, nn.Parameter):  # a quantiser's, with attributes that say how it is read
                twins[id(t)].__dict__.update({name: held(v) for name, v in vars(t).items()})
        return twins[id(t)]

    def held(v):
        """What a quantised tensor or layer holds beside parameters and buffers: tensors, and objects with tensors."""
        if isinstance(v, Tensor):
            return tensor(v)
        own = {} if isinstance(v, (nn.Module, type)) else getattr(v, "__dict__", {})
        if id(v) not in twins and any(isinstance(t, Tensor) for t in own.values()):
            twins[id(v)] = copy.copy(v)
            twins[id(v)].__dict__.update({name: held(t) for name, t in own.items()})
        return twins.get(id(v), v)

    def module(m: nn.Module | None) -> nn.Module | None:
        if m is None:
            return None
        if id(m) not in twins:
            twins[id(m)] = twin = type(m).__new__(type(m))
            # hooks and children are registered in dicts, which the twin must not share
            twin.__dict__.update({k: v.copy() if isinstance(v, dict) else held(v) for k, v in m.__dict__.items()})
            for registry, make in (("_parameters", tensor), ("_buffers", tensor), ("_modules", module)):
                twin.__dict__[registry] = {name: make(v) for name, v in m.__dict__[registry].items()}
        return twins[id(m)]

    return module(model)


def _packed(m: nn.Module) -> Frozen | None:
    """The kind of a layer whose weight is stored in parts."""
    kind = getattr(m, "kind", None) if isinstance(m, PeftLayer) else kind_of(m)
    return kind if isinstance(kind, Frozen) and kind.packed else None


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once; of a quantiser's class those of the tensors inside."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _plain(tensors)}.values())


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for t in tensors:
        if is_foreign(t):
            yield from _plain(getattr(t, name) for name in t.__tensor_flatten__()[0])
        else:
            yield t


def _x(layer: PeftLayer, tokens: int, beside: torch.dtype | None) -> Tensor:
    """A layer's input on the meta device. ValueError where its dtype is not known."""
    if layer.kind.lookup:
        return torch.empty(tokens, dtype=torch.int64, device="meta")
    dtype = layer.kind.like(layer).dtype
    if isinstance(W := None if layer.kind.opaque else layer.kind.matrix(layer), Stored):
        dtype = beside or W.compute or W.dtype
    elif not dtype.is_floating_point:
        raise ValueError(
            f"model has a {layer.base_class.__name__}, whose weight is stored as {dtype}, and estimate does not know "
            "what such a layer keeps; estimate the model before it is quantised"
        )
    return torch.empty(tokens, layer.in_features, dtype=dtype, device="meta", requires_grad=True)


def _decoded(layer: PeftLayer, x_of: dict[int, Tensor]) -> int:
    """Bytes of a layer's weight decoded for a call."""
    compute = layer.kind.matrix(layer).compute or x_of[id(layer)].dtype
    return layer.out_features * layer.in_features * compute.itemsize


def _kept(layer: PeftLayer | PeftParameter, tokens: int, x_of: dict[int, Tensor]) -> tuple[int, int]:
    """Bytes of x, and of everything else, that a layer on the meta device keeps: storages, the layer's own left out."""
    if isinstance(layer, PeftParameter):
        return _kept_by_parameter(layer, tokens)
    x = x_of[id(layer)]
    kept: list[Tensor] = []
    layer.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.forward(x)  # past the layer's hooks
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    parts = layer.kind.matrix(layer).parts if layer.kind.packed else ()
    for t in _plain([*layer.parameters(), *layer.buffers(), *parts]):
        sizes.pop(t.untyped_storage()._cdata, None)
    return sizes.pop(x.untyped_storage()._cdata, 0), sum(sizes.values())


def _kept_by_parameter(layer: PeftParameter, tokens: int) -> tuple[int, int]:
    """The same of experts: x (of the stack that reads what another made, a row for each expert that it was routed to),
    T where B trains, z where d_out trains, the routing's index, and what making the factors keeps; of a matrix that is
    formed, the factors alone."""
    kept: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f = factors_of(layer)
    kept += [t for t in (f.A, f.B, f.G, f.a, f.d_in, f.d_out, f.bias) if t is not None]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    for t in (*layer.parameters(), *layer.buffers(), layer.weight):
        sizes.pop(t.untyped_storage()._cdata, None)
    made, b = sum(sizes.values()), layer.weight.element_size()
    if not layer.routed:
        return 0, made + layer.weight.nbytes * (f.d_out is not None)
    rows = tokens * experts.experts_per_token(layer.owner)
    into = layer.parameter_name == experts.stacks(layer.owner)[0]
    trains = lambda *names: any((t := getattr(f, n)) is not None and t.requires_grad for n in names)  # noqa: E731
    x = (tokens if into else rows) * layer.in_features * b if trains("A", "d_in") else 0
    narrow = rows * f.A.shape[1] * b if trains("B", "G") else 0
    wide = rows * layer.out_features * b if trains("d_out") else 0
    index = (2 * 8 * rows if into else 0) + 4 * layer.weight.shape[0] + 8 * (f.p > 0)  # rows, back; offsets; a seed
    return x, made + narrow + wide + index


def _kept_by_peft(
    layer: PeftLayer, M: int, device: torch.device, x_of: dict[int, Tensor]
) -> tuple[int, int] | tuple[None, None]:
    """The same of PEFT's layer with this config: LoRA, rsLoRA, DoRA, AdaLoRA and (IA)³, else (None, None). Of experts
    PEFT forms W + s·B A, keeps it and the factors in W's dtype, and no x.

    The frozen layer keeps no input. An adapter of another dtype than the layer casts x, and keeps its copy. DoRA also
    makes an identity (K, K) and B A in every forward; they are free again when it ends, and not counted.
    """
    if isinstance(layer, PeftParameter):
        if layer.method.name != "lora" or layer.config.dropout or layer.config.lora_bias:
            return None, None
        tensors, W = layer.adapter_tensors(), layer.weight
        return 0, W.nbytes + sum(t.numel() * W.element_size() for t in tensors if t.dtype != W.dtype)
    if layer.kind.lookup:  # the ids, A[:, ids]
        A = getattr(layer, layer.tensor_names[0])
        return (8 * M, M * layer.config.r * A.itemsize) if layer.method.disk_lookup else (None, None)
    config, N, K, base = layer.config, layer.out_features, layer.in_features, x_of[id(layer)].dtype
    if layer.kind.packed and (config.peft_type != "LORA" or config.use_dora):
        return None, None  # classes of their own there
    wide = getattr(layer, layer.tensor_names[0]).dtype
    b, w, cast = base.itemsize, wide.itemsize, wide != base
    x, copy = (0, M * K * w) if cast else (M * K * b, 0)
    if config.peft_type == "IA3" and config.feedforward_modules:
        return x, copy + K * w  # the scale, 1 · l
    if config.peft_type == "IA3" and config.scale_bias:
        return 0, M * N * b + N * w  # the unscaled output, the scale
    if config.peft_type not in ("LORA", "ADALORA") or config.nonlinearity != "identity":
        return None, None
    if config.lora_dropout:
        x, copy = 0, M * K * (w + (w if device.type == "cpu" else 1))  # drop(x) and the mask
    kept = copy + M * config.r * w  # xAᵀ
    if config.peft_type == "ADALORA":
        # A ⊙ E and the number of ranks; PEFT's cast makes that number train, so the product it divides is kept as well
        return x, kept + config.r * K * w + w + cast * M * N * w
    if config.init_lora_weights == "milora":
        return None, None
    if config.use_dora:
        kept += M * N * w + 3 * N * w  # the update before its scale, the norm, the scale m / norm, that less 1
        kept += M * N * (w if config.lora_dropout else b)  # the base's output
        kept += N * K * w * bool(config.lora_dropout and cast)  # W in the adapter's dtype
    return x, kept
