"""PEFT's layers of LoRA, DoRA, AdaLoRA and (IA)³ with a fused forward: subclasses that say in terms of ``Factors`` what
the active adapters are.

A call that is more than the expression runs PEFT's own forward, and ``unfused`` says why. The methods that fewer use:
``peft_methods``; layers on bitsandbytes': ``peft_bnb``; lookups: ``peft_embedding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from importlib import import_module
from operator import mul
from weakref import ref

import torch
from peft.tuners import adalora, ia3, lora
from peft.tuners.lora import dora, torchao
from peft.tuners.lora.variants import DoraLinearVariant, KasaLinearVariant, MiCALinearVariant
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..core import ops
from ..core.factors import Factors
from ..core.frozen import Dense, Frozen, Stored, Transposed, is_foreign, kind_of
from ..core.sharded import is_partitioned, is_sharded
from ..model.adapter import in_turn
from ..model.rows import Chosen, length_error, lora_form, mixed
from .experts import ParamWrapper as FusedParamWrapper
from .experts import hooked

KEPT = "_fused_peft_norm2"  # where an accelerated DoRA layer keeps its ‖W‖², and of which weight
TRIED = "_fused_peft_tried"  # and how a base with a forward of its own holds W, of which base
_VARIANTS = (DoraLinearVariant, KasaLinearVariant, MiCALinearVariant)


def called(module: nn.Module, kinds: tuple[type, ...], what: str) -> str | None:
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


class Accelerated:
    """A class that has taken the place of PEFT's."""

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        import_module("fused_peft.integrations.peft")  # what is added to a model from a pickle is to be fused too

    def _get_name(self) -> str:
        return peft_class(self).__name__  # the repr is PEFT's


class Fused(Accelerated):
    """PEFT's layer with a fused forward. Subclasses say what the active adapters are in terms of ``Factors``."""

    dropouts = "lora_dropout"  # where PEFT keeps the dropout modules by adapter

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

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        """Why these adapters are more than the expression, or None."""
        return next(filter(None, map(self._dropout_unfused, used)), None)

    def _readable(self, kind: Frozen) -> Frozen | str:
        """The kind by which W's values are read, or why they cannot be; found by a trial that is made once a base."""
        base = self.base_layer
        if kind.packed or isinstance(kind, (Dense, Transposed)):
            return kind
        if not kind.opaque:
            return f"{type(base).__name__} holds it in parts"
        weight = getattr(base, "weight", None)
        known = (type(base), base.__dict__.get("forward"), type(weight), getattr(weight, "is_meta", None))
        kept = self.__dict__.get(TRIED)
        if kept is None or kept[0]() is not base or kept[1] != known:
            if torch.compiler.is_compiling():
                return f"{type(base).__name__} has not been tried; call explain before compiling"
            kept = self.__dict__[TRIED] = (ref(base), known, kind.as_plain(base))
        return kept[2]

    def _used(self, adapters: list[str] | None = None) -> list[str]:
        """Those of the adapters (default: the active ones) that this layer has."""
        own = getattr(self, self.adapter_layer_names[0])
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in own]

    def _dropped(self, name: str) -> float:
        """The dropout probability in force: PEFT goes by the mode of the dropout module, not of the layer."""
        drop = getattr(self, self.dropouts)[name]
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def _dropout_unfused(self, name: str) -> str | None:
        drop = getattr(self, self.dropouts)[name]
        if isinstance(drop, nn.Dropout) and drop.training and drop.p == 1:
            return "its dropout drops everything"
        return called(drop, (nn.Identity, nn.Dropout), "dropout")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in (KEPT, TRIED)}


class OnPacked:
    """On a layer whose weight may be stored in parts."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.base_layer
        if self.disable_adapters and not (self.merged or args or kwargs):
            kind = kind_of(base)
            if isinstance(kind, Frozen) and kind.packed and replaceable(kind, base):
                # the base's own forward would repack its weight on some CPUs, and no gradient pass from then on
                return ops.plain_linear(x, kind.matrix(base), base.bias)
        return super().forward(x, *args, **kwargs)


class FusedLora(Fused):
    """LoRA, rsLoRA, lora_bias, DoRA, MiCA (whose B does not train) and KaSA (with a diagonal between A and B)."""

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        for name in used:
            variant = self.lora_variant.get(name)
            if variant is not None and not isinstance(variant, _VARIANTS):
                return f"adapter {name!r} is a variant of LoRA ({type(variant).__name__})"
            if isinstance(variant, DoraLinearVariant):
                if len(used) > 1 or self.ephemeral_gpu_offload or self.lora_bias[name]:
                    return f"adapter {name!r} is DoRA with other adapters, a bias or offloading beside it"
                if dora.ENABLE_DORA_CACHING and not self.training:
                    return f"adapter {name!r} is DoRA, and PEFT's DoraCaching is on"
                if reason := called(self.lora_magnitude_vector[name], (dora.DoraLinearLayer,), "magnitude"):
                    return reason
                if not replaceable(kind, self.base_layer):
                    if isinstance(reason := self._readable(kind), str):
                        return f"adapter {name!r} is DoRA, which reads the weight, and {reason}"
                    if self.training and self._dropped(name):
                        return f"adapter {name!r} is DoRA with dropout, which multiplies by the weight once more"
            if isinstance(variant, KasaLinearVariant) and name in self._lora_kasa_truncation_deferred:
                return f"adapter {name!r} is KaSA, and PEFT's next call is to truncate the weight first"
            A = self.lora_A[name]
            if A.bias is not None:
                return f"the A of adapter {name!r} has a bias"
            for part in (A, self.lora_B[name]):
                if reason := called(part, (nn.Linear,), "A or B"):
                    return reason
            if reason := self._dropout_unfused(name):
                return reason
        return None

    def _reads_weight(self, used: list[str]) -> bool:
        return any(map(self._is_dora, used))

    def _is_dora(self, name: str) -> bool:
        return isinstance(self.lora_variant.get(name), DoraLinearVariant)

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
        if not self._is_dora(name):
            G = self.lora_diag[name] if isinstance(self.lora_variant.get(name), KasaLinearVariant) else None
            return Factors(A=A, B=B, G=G, bias=bias, s=s, p=p)
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
        kept = self.__dict__.get(KEPT)
        if kept is None or kept[0]() is not own or kept[1] != known:
            kept = self.__dict__[KEPT] = (ref(own), known, _row_norm2(weight))
        return kept[2]

    def _forget(self) -> None:
        self.__dict__.pop(KEPT, None)

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


class FusedAdaLora(Fused):
    """AdaLoRA."""

    def fused_factors(self, used: list[str], weight: Tensor | None, bias: Tensor | None) -> list[Factors]:
        found = []
        for name in used:
            E = self.lora_E[name].flatten() * (self.scaling[name] / (self.ranknum[name] + 1e-5))
            found.append(Factors(A=self.lora_A[name], B=self.lora_B[name], G=E, p=self._dropped(name)))
        return found


class FusedSVDLinear(FusedAdaLora, adalora.SVDLinear):
    """On a plain linear layer."""


class FusedIA3(Fused):
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


def peft_class(layer: nn.Module) -> type:
    """The class of PEFT's that a layer had before it was accelerated, or sharded, or has now."""
    return next((kind for kind in type(layer).__mro__ if kind in FUSED), type(layer))
