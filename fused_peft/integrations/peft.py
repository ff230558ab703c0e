"""Existing Hugging Face PEFT models on the fused call: PEFT's own layers get a subclass in place of their class.

``accelerate`` changes nothing but ``__class__``: parameters, keys, checkpoints, merging, adapter switching and every
other method stay PEFT's; only forward differs, and only where it can be fused. What cannot runs PEFT's forward: one
warning counts it by reason, and ``fused_peft.explain`` lists it layer by layer. Layers that PEFT adds to an accelerated
model later are accelerated as they come: PEFT makes them all in ``BaseTuner.inject_adapter``, which this file wraps.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial, reduce, wraps
from importlib import import_module
from operator import mul
from weakref import ref

import torch
from peft.tuners import adalora, ia3, lora
from peft.tuners.lora import dora, torchao
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..core import dispatch, operands, ops, versions
from ..core.factors import Factors
from ..core.frozen import Dense, Frozen, Stored, Transposed, is_foreign, kind_of, own_forward
from ..core.sharded import is_partitioned, is_sharded
from ..model.adapted import is_adapted
from ..model.adapter import in_turn
from ..model.batch import Member, Switch
from ..model.explain import Row, explain_layer, stored_as
from ..model.rows import Chosen, length_error, lora_form, mixed
from .configs import is_ours
from .experts import ParamWrapper as FusedParamWrapper
from .experts import hooked, started_by
from .tuners import FusedTunerLayer

_KEPT = "_fused_peft_norm2"  # where an accelerated DoRA layer keeps its ‖W‖², and of which weight
_TRIED = "_fused_peft_tried"  # and how a base with a forward of its own holds W, of which base
_HOOKS = "_fused_peft_hooks"  # of adapter_batch, while it is on
_NAMED = 3  # reasons that a warning spells out


def _called(module: nn.Module, kinds: tuple[type, ...], what: str) -> str | None:
    """Why the fused call may not bypass a module's own forward, or None."""
    if type(module) not in kinds:
        return f"its {what} is a {type(module).__module__}.{type(module).__name__}, whose forward is not a plain one"
    if hooked(module) or "forward" in module.__dict__:
        return f"its {what} has hooks or a forward of its own, which the fused call would bypass"
    return None


def replaceable(kind: Frozen, base: nn.Module) -> bool:
    """Whether the fused call may take the place of the base's own; otherwise adapters act beside its product."""
    return isinstance(kind, Frozen) and (kind.packed or isinstance(kind, (Dense, Transposed))) and not hooked(base)


def _with_base(weight: Tensor | Stored, f: Factors, bias: Tensor | None, x: Tensor) -> Tensor:
    return ops.linear(x, weight, f, bias)


class _Fused:
    """PEFT's layer with a fused forward. Subclasses say what the active adapters are in terms of ``Factors``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            names = kwargs.get("adapter_names")
            if names is not None and not args and len(kwargs) == 1 and not self.disable_adapters:
                return self._mixed(x, names)
            if isinstance(names, Chosen):  # disabled
                kwargs.pop("adapter_names")
            return super().forward(x, *args, **kwargs)
        return self._with(x)

    def _mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """y (S, ..., N) of samples x (S, ..., K), each with the adapter of its name."""
        base, own = self.base_layer, getattr(self, self.adapter_layer_names[0])
        if not isinstance(names, Chosen):  # PEFT's own argument
            if not isinstance(self, FusedLora):
                return super().forward(x, adapter_names=names)
            self._check_forward_args(x, adapter_names=names)
        elif x.dim() < 2 or x.shape[0] != len(names):
            raise ValueError(length_error(names, x))
        elif self.merged:
            raise RuntimeError("the layer was merged within adapter_batch; unmerge it first")
        used, kind = [name for name in dict.fromkeys(names) if name in own], kind_of(base)
        plain = replaceable(kind, base)
        if x.dim() < 2 or any(self._unfused(base, kind, plain, x, [name]) for name in used):
            return super().forward(x, adapter_names=names)
        trains = plain and base.weight.requires_grad
        weight, bias = (kind.matrix(base), base.bias) if plain else (None, None)

        def form(name: str) -> Factors | None:
            return lora_form(self.fused_factors([name], weight, bias)[0])

        def alone(name: str | None, x: Tensor) -> Tensor:
            if name is None:
                return ops.plain_linear(x, weight, bias) if plain else base(x)
            return self._with(x, [name])

        def product(x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            if type(weight) is Stored:
                return None, bias, ops.plain_linear(x, weight, bias)
            return (weight, bias, None) if plain else (None, None, base(x))

        joint = not (trains or is_sharded(x) or is_sharded(weight))
        return mixed(x, [name if name in own else None for name in names], form, alone, product if joint else None)

    def _with(self, x: Tensor, adapters: list[str] | None = None) -> Tensor:
        """y with these adapters (default: the active ones)."""
        base = self.base_layer
        kind, used = kind_of(base), self._used(adapters)
        plain = replaceable(kind, base)
        if adapters is None and self._unfused(base, kind, plain, x, used):
            return super().forward(x)
        if not plain:
            found = self.fused_factors(used, None, None)
            # of a bias that nothing needs hooks may hold no values
            bias = base.bias if any(f.d_out is not None and not f.scale_bias for f in found) else None
            return in_turn(base, [(f, False) for f in found], x, bias)
        weight, bias = kind.matrix(base), base.bias
        if type(weight) is Stored and self._reads_weight(used):
            weight = ops.read(weight, x)
        found = self.fused_factors(used, weight, bias)
        if not found:
            return ops.plain_linear(x, weight, bias)
        if len(found) == 1:
            return ops.linear(x, weight, found[0], bias)
        first, *later = found
        start = partial(_with_base, weight, first, bias)
        return in_turn(start, [(f, False) for f in later], x, first.merged_bias(bias))

    def _reads_weight(self, used: list[str]) -> bool:
        """Whether the factors of these adapters are made from W's values."""
        return False

    def base_matrix(self) -> Tensor:
        """The base weight as (out, in)."""
        return self._readable(kind_of(self.base_layer)).dense(self.base_layer)

    def unfused(self, x: Tensor | None = None, adapters: list[str] | None = None) -> str | None:
        """Why a call, on x where one is given, takes PEFT's forward with these adapters (default: the active ones);
        None where it is fused."""
        base = self.base_layer
        kind = kind_of(base)
        return self._unfused(base, kind, replaceable(kind, base), x, self._used(adapters))

    def _unfused(
        self, base: nn.Module, kind: Frozen | str, plain: bool, x: Tensor | None, used: list[str]
    ) -> str | None:
        if not plain:
            weight = getattr(base, "weight", None)
            if is_sharded(weight):
                return f"its base weight is a {type(weight).__name__}"
            if isinstance(kind, str):
                return f"its base is a {type(base).__module__}.{type(base).__name__}: {kind}"
            if is_partitioned(weight):
                return "its base weight is partitioned by DeepSpeed ZeRO-3"
        elif kind.packed:
            pass  # decoded in x's dtype
        elif x is not None and x.dtype != (dtype := base.weight.dtype) and not ops.autocasting(x):
            return f"x has dtype {x.dtype}, the weight {dtype}"
        return self._adapters_unfused(used, kind)

    def _readable(self, kind: Frozen) -> Frozen | str:
        """The kind by which W's values are read, or why they cannot be; found by a trial that is made once a base."""
        base = self.base_layer
        if kind.packed or isinstance(kind, (Dense, Transposed)):
            return kind
        if not kind.opaque:
            return f"{type(base).__name__} holds it in parts"
        weight = getattr(base, "weight", None)
        known = (type(base), base.__dict__.get("forward"), type(weight), getattr(weight, "is_meta", None))
        kept = self.__dict__.get(_TRIED)
        if kept is None or kept[0]() is not base or kept[1] != known:
            if torch.compiler.is_compiling():
                return f"{type(base).__name__} has not been tried; call explain before compiling"
            kept = self.__dict__[_TRIED] = (ref(base), known, kind.as_plain(base))
        return kept[2]

    def _used(self, adapters: list[str] | None = None) -> list[str]:
        """Those of the adapters (default: the active ones) that this layer has."""
        own = getattr(self, self.adapter_layer_names[0])
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in own]

    def _dropped(self, name: str) -> float:
        """The dropout probability in force: PEFT goes by the mode of the dropout module, not of the layer."""
        drop = self.lora_dropout[name]
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def _dropout_unfused(self, name: str) -> str | None:
        drop = self.lora_dropout[name]
        if isinstance(drop, nn.Dropout) and drop.training and drop.p == 1:
            return "its dropout drops everything"
        return _called(drop, (nn.Identity, nn.Dropout), "dropout")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in (_KEPT, _TRIED)}

    def _get_name(self) -> str:
        return peft_class(self).__name__  # the repr is PEFT's


class FusedLora(_Fused):
    """LoRA, rsLoRA, lora_bias and DoRA."""

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        for name in used:
            variant = self.lora_variant.get(name)
            if variant is not None and not isinstance(variant, DoraLinearVariant):
                return f"adapter {name!r} is a variant of LoRA ({type(variant).__name__})"
            if variant is not None:
                if len(used) > 1 or self.ephemeral_gpu_offload or self.lora_bias[name]:
                    return f"adapter {name!r} is DoRA with other adapters, a bias or offloading beside it"
                if dora.ENABLE_DORA_CACHING and not self.training:
                    return f"adapter {name!r} is DoRA, and PEFT's DoraCaching is on"
                if reason := _called(self.lora_magnitude_vector[name], (dora.DoraLinearLayer,), "magnitude"):
                    return reason
                if not replaceable(kind, self.base_layer):
                    if isinstance(reason := self._readable(kind), str):
                        return f"adapter {name!r} is DoRA, which reads the weight, and {reason}"
                    if self.training and self._dropped(name):
                        return f"adapter {name!r} is DoRA with dropout, which multiplies by the weight once more"
            A = self.lora_A[name]
            if A.bias is not None:
                return f"the A of adapter {name!r} has a bias"
            for part in (A, self.lora_B[name]):
                if reason := _called(part, (nn.Linear,), "A or B"):
                    return reason
            if reason := self._dropout_unfused(name):
                return reason
        return None

    def _reads_weight(self, used: list[str]) -> bool:
        return any(name in self.lora_variant for name in used)

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        found = []
        for name in used:
            found.append(f := self._one(name, weight, bias))
            bias = f.merged_bias(bias)
        return found

    def _one(self, name: str, weight: Tensor | Stored | None, base: Tensor | None) -> Factors:
        A, B, s = self.lora_A[name].weight, self.lora_B[name], self.scaling[name]
        bias = None
        if B.bias is not None:
            bias = s * B.bias if base is None else s * B.bias + base
        p, B = self._dropped(name), B.weight
        if isinstance(s, Tensor):  # PEFT makes it one for hot-swapping in a compiled model
            B, s = B * s, 1.0
        if name not in self.lora_variant:
            return Factors(A=A, B=B, bias=bias, s=s, p=p)
        if type(weight) is Stored:
            weight = weight.values
        if weight is None:
            weight = self.base_matrix()
        with torch.no_grad():
            norm = ops.row_norm(weight, self._squared(weight), A, B, s)
        magnitude, p = self.lora_magnitude_vector[name], p if self.training else 0.0
        if magnitude._dora_cache:  # PEFT's call empties it while DoraCaching is off
            magnitude._cache_clear()
        return Factors(A=A, B=B, d_out=magnitude.weight / norm, s=s, p=p, drop_base=True)

    def _squared(self, weight: Tensor) -> Tensor:
        """‖W‖² per row, kept until the weight is another tensor or was written to."""
        if torch.compiler.is_compiling() or weight.is_inference():  # neither tells of writes
            return _row_norm2(weight)
        own = self.base_layer.weight
        own = kind_of(self.base_layer).matrix(self.base_layer).parts[0] if is_foreign(own) else own
        # the storage too: a weight that comes after another may have its address
        storage = StorageWeakRef(own.untyped_storage())
        known = (storage, own.data_ptr(), own._version, weight.dtype, weight.device, weight.shape)
        kept = self.__dict__.get(_KEPT)
        if kept is None or kept[0]() is not own or kept[1] != known:
            kept = self.__dict__[_KEPT] = (ref(own), known, _row_norm2(weight))
        return kept[2]

    def _forget(self) -> None:
        self.__dict__.pop(_KEPT, None)

    # writing through weight.data leaves no trace; what does so (merging, loaders) comes with one of these
    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def merge(self, *args, **kwargs) -> None:
        self._forget()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self._forget()
        super().unmerge()

    def _load_from_state_dict(self, *args) -> None:
        self._forget()
        super()._load_from_state_dict(*args)


def _row_norm2(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()


class FusedLoraLinear(FusedLora, lora.Linear):
    """On a plain linear layer."""


class FusedLoraTorchao(FusedLora, torchao.TorchaoLoraLinear):
    """On a linear layer with one of torchao's quantised weights."""


class FusedAdaLora(_Fused):
    """AdaLoRA."""

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        return next(filter(None, map(self._dropout_unfused, used)), None)

    def fused_factors(self, used: list[str], weight: Tensor | None, bias: Tensor | None) -> list[Factors]:
        found = []
        for name in used:
            E = self.lora_E[name].flatten() * (self.scaling[name] / (self.ranknum[name] + 1e-5))
            found.append(Factors(A=self.lora_A[name], B=self.lora_B[name], G=E, p=self._dropped(name)))
        return found


class FusedSVDLinear(FusedAdaLora, adalora.SVDLinear):
    """On a plain linear layer."""


class FusedIA3(_Fused):
    """(IA)³, on the output or, in feed-forward layers, on the input."""

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        return None

    def fused_factors(self, used: list[str], weight: Tensor | None, bias: Tensor | None) -> list[Factors]:
        scales = [self.ia3_l[name].flatten() for name in used]
        if not scales:
            return []
        scale = reduce(mul, scales)
        return [Factors(d_in=scale) if self.is_feedforward else Factors(d_out=scale, scale_bias=True)]


class FusedIA3Linear(FusedIA3, ia3.Linear):
    """On a plain linear layer."""


FUSED = {
    lora.Linear: FusedLoraLinear,
    torchao.TorchaoLoraLinear: FusedLoraTorchao,
    lora.ParamWrapper: FusedParamWrapper,
    adalora.SVDLinear: FusedSVDLinear,
    ia3.Linear: FusedIA3Linear,
}
_ANY = (_Fused, FusedParamWrapper)


def peft_class(layer: nn.Module) -> type:
    """The class of PEFT's that a layer had before it was accelerated, or sharded, or has now."""
    return next((kind for kind in type(layer).__mro__ if kind in FUSED), type(layer))


def accelerate(model: nn.Module) -> nn.Module:
    """Put the LoRA, DoRA, AdaLoRA and (IA)³ layers of a PEFT model, and its LoRA on stacks of experts, on the fused
    call, in place; returns the model.

    Keys, checkpoints and the whole of PEFT's interface stay as they are; results differ from PEFT's by rounding,
    dropout draws other masks, and gradients of gradients are refused. Layers that cannot be fused keep PEFT's forward:
    one warning says how many, and why (``fused_peft.explain`` names every layer). Adapters added later, on whichever
    modules, are accelerated by themselves until ``restore``; twice does no harm. Raises TypeError when model is no
    module, ValueError when it has no PEFT layer.
    """
    _check_module(model)
    layers = _layers(model)
    if not layers:
        raise ValueError(_nothing_to_fuse(model))
    versions.warn_outside("peft")
    _fuse(layer for _, layer in layers)
    _report(layers)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``, in place; returns the model. Layers that were not accelerated stay as they are.

    Raises TypeError when model is no module.
    """
    _check_module(model)
    back = {fused: own for own, fused in FUSED.items()}
    for _, layer in _layers(model):
        if type(layer) in back:
            layer.__class__ = back[type(layer)]
            for kept in (_KEPT, _TRIED):
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
    if any(f"peft.tuners.{method}.bnb" in sys.modules for method in ("lora", "adalora", "ia3")):
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
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return "accelerate has not run on it" if type(layer) in FUSED else f"{kind} has no fused form"
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
        elif isinstance(layer, _Fused) and not replaceable(kind_of(layer.base_layer), layer.base_layer):
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
    return method, "factors" if plain else "beside", choice.backend.name, why, problem


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
        if not isinstance(layer, (LoraLayer, _Fused, FusedTunerLayer, AuxiliaryTrainingWrapper)) or isinstance(
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
