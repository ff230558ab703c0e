"""What ``export_lora`` and ``get_layer_status`` read of a Hugging Face PEFT model: this library's methods in it, and
PEFT's own."""

from __future__ import annotations

from collections.abc import Iterable

import peft
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..core.frozen import Transposed, kind_of
from ..model.export import Piece, Source, changes_bias, piece_of
from ..model.status import LayerStatus, dtypes_of, seen
from .peft import explanations
from .peft_layers import Fused, peft_class, replaceable
from .tuners import FusedTunerLayer

_MERGED = ("model.merge_and_unload() makes the merged model",)
_PREFIX = "base_model.model."  # of a PeftModel's modules, and of keys on disk


def exported(model: nn.Module, adapter_name: str) -> Source:
    """The Source of a PEFT model's adapter. Raises as ``export_lora``."""
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is none of the model's: {', '.join(model.peft_config)}")
    config = model.peft_config[adapter_name]
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if config.peft_type == "LORA":  # its trained rows go beside it
        layers = [(name, m) for name, m in layers if not isinstance(m, TrainableTokensLayer)]
    held = [(name, layer) for name, layer in layers if adapter_name in layer._get_available_adapters()]
    pieces = [_piece(name.removeprefix(_PREFIX), layer, adapter_name) for name, layer in held]
    if not pieces:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter_name={adapter_name!r} is {kind}, which changes no layer, so no LoRA equals it")
    own = tuple(f"{_PREFIX}{piece.name}." for piece in pieces)
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    beside = (k for k in stored if k.startswith(_PREFIX) and (not k.startswith(own) or ".base_layer." in k))
    return Source(pieces, config, {k: stored[k].detach().contiguous().cpu() for k in beside})


def _piece(name: str, layer: nn.Module, adapter_name: str) -> Piece:
    """One layer's adapter. ValueError where what it computes is not known as factors."""
    if layer.merged:
        raise RuntimeError(f"{name} is merged; call unmerge_adapter() before export_lora")
    if isinstance(layer, FusedTunerLayer):
        piece = piece_of(name, name, layer.adapter(adapter_name))
        return piece._replace(ways=_MERGED if piece.mergeable else ())
    method = peft_class(layer).__module__.split(".")[2]
    fused = isinstance(layer, Fused)
    if not fused or (reason := layer.unfused(adapters=[adapter_name])):
        reason = reason if fused else "fused_peft.accelerate has not run on it, or does not know it"
        raise ValueError(
            f"{name}: what this {method} layer of Hugging Face PEFT computes is not known as factors: {reason}. Call "
            "model.save_pretrained(folder), which writes plain LoRA as it is; other methods export once "
            "fused_peft.load_adapter(base, folder) has read that folder"
        )
    base = layer.base_layer
    kind, bias = kind_of(base), getattr(base, "bias", None)
    (f,) = layer.fused_factors([adapter_name], kind.matrix(base) if replaceable(kind, base) else None, bias)

    def change() -> Tensor:
        W = layer.base_matrix().double()
        return f.to(W.dtype).merged(W) - W

    ways = (*_MERGED, f"model.save_pretrained writes {method} in PEFT's own format, for PEFT alone")
    transposed = isinstance(kind, Transposed)
    return Piece(name, name, method, [f], change, biased=changes_bias([f], bias), transposed=transposed, ways=ways)


def statuses(model: nn.Module) -> Iterable[LayerStatus]:
    """The status of every PEFT layer: what PEFT says of it, and what this library adds."""
    try:
        theirs = peft.get_layer_status(model)
    except (ValueError, TypeError):  # no layer, prompts
        return
    within = "base_model." if isinstance(model, peft.PeftModel) else ""
    rows, modules = {name: row for name, *row in explanations(model, 2048, None)}, dict(model.named_modules())
    for one in theirs:
        layer = modules[within + one.name]
        if not isinstance(layer, BaseTunerLayer):  # modules_to_save
            continue
        tensors = {name: [*_tensors(layer, name)] for name in one.available_adapters}
        own = isinstance(layer, FusedTunerLayer)
        plain = peft_class(layer).__module__.split(".")[2]
        yield LayerStatus(
            one.name, one.module_type, one.enabled, list(one.active_adapters), list(one.merged_adapters),
            dict(one.requires_grad), list(one.available_adapters), dict(one.devices),
            method={name: layer.configs[name].method_name if own else plain for name in tensors},
            backend=rows[within + one.name][2],
            dtype={name: dtypes_of(found) for name, found in tensors.items()},
            gradient={name: seen(found) for name, found in tensors.items()},
        )  # fmt: skip


def _tensors(layer: nn.Module, adapter_name: str) -> Iterable[Tensor]:
    """What trains of one adapter of a layer."""
    for key in layer.adapter_layer_names:
        if adapter_name in (held := getattr(layer, key)):
            own = held[adapter_name]
            yield from own.parameters() if isinstance(own, nn.Module) else [own]
