"""The merged model as a state dict or a folder, with the adapted one left as it is."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ..core.factors import NotMergeableError
from ..core.sharded import is_spread
from .adapted import few, plain_name, unwrap
from .base_state import plain_state, token_rows, writer
from .convert import adapted_layers, refuse_shared
from .holder import Holder
from .parameter import PeftParameter
from .save import folder
from .state import refuse_pefts, refuse_while_disabled
from .trainable_tokens import refuse_infinite
from .wide import narrowed


@torch.no_grad()
def merged_state_dict(model: nn.Module, safe_merge: bool = False) -> dict[str, Tensor]:
    """The state dict of the plain model with the active adapters folded in, under the plain model's keys.

    The model stays as it is. Merged weights are new tensors, made one layer at a time; all others are the model's own,
    so tied weights stay tied. A layer whose adapter adds a bias has a key for it that the plain model lacks.
    safe_merge: as for ``merge``. Raises what ``merge`` raises (quantised weights: merge_and_unload(model,
    dequantize=True) makes plain layers), and RuntimeError for sharded models.
    """
    return _merged(model, "merged_state_dict", safe_merge)[0]


def _merged(model: nn.Module, what: str, safe_merge: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict, and those of its keys that the plain model lacks."""
    model = unwrap(model)
    found = adapted_layers(model, what)
    refuse_while_disabled(model, what)
    if any(map(is_spread, model.parameters())):
        raise RuntimeError(
            f"{what} does not gather a model that is sharded over several processes; call save_pretrained, then "
            f"load_adapter and {what} on a model in one process"
        )
    changed = [(name, layer) for name, layer in found if not layer.merged and layer.active != ()]
    refuse_shared(model, changed)
    for name, layer in changed:
        if reason := layer.kind.why_unwritable(layer):
            raise NotMergeableError(f"{name}: {reason}; keep the layer unmerged")
    found = [(plain_name(name), layer) for name, layer in found]
    state = plain_state(model, found)
    for name, rows in token_rows(model):
        if safe_merge:
            refuse_infinite({name: rows})
        table = model.get_submodule(name).weight
        with_rows = rows.folded(table)
        state = {key: with_rows if _same(t, table) else t for key, t in state.items()}
    for key, dtype in narrowed(model).items():
        state[plain_name(key)] = state[plain_name(key)].to(dtype)
    new = []
    for name, layer in found:
        weight_key, bias_key = _keys(name, layer)
        if layer.merged:
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        elif layer.active == ():
            continue
        else:
            try:
                weight, bias = layer.merged_tensors()
                if safe_merge:
                    layer.refuse_infinite(weight, bias)
            except ValueError as e:
                raise type(e)(f"{name}: {e}") from e
        state[weight_key] = weight
        if bias is not None:
            new += [bias_key] if bias_key not in state else []
            state[bias_key] = bias.to(weight.dtype)
    if absent := [key for key, t in state.items() if t.is_meta]:
        raise NotMergeableError(f"{few(absent)}: on the meta device (offloaded?); load the model without")
    return state, new


def _keys(name: str, layer: Holder) -> tuple[str, str]:
    return (name, f"{name}_bias") if isinstance(layer, PeftParameter) else (f"{name}.weight", f"{name}.bias")


def save_merged(
    model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", safe_merge: bool = False
) -> None:
    """Write the merged model of a Transformers model into the folder ``path``: config, generation config and weights,
    which ``from_pretrained`` and servers read without this library. The model stays as it is.

    max_shard_size: of each file of weights. Raises TypeError for a model that is not Transformers', what
    ``merged_state_dict`` raises, NotMergeableError where ``from_pretrained`` would give another model (a bias that the
    architecture lacks, a quantised model, a head trained apart from the embeddings it is tied to), and what
    ``save_pretrained`` raises of ``path``; each before anything is written.
    """
    model = unwrap(model)
    refuse_pefts(model, "save_merged")
    write = writer(model)
    if write is None:
        raise TypeError(
            f"model={type(model).__name__} is no Transformers model, so it has no folder to be loaded from; call "
            "torch.save(merged_state_dict(model), file)"
        )
    path = folder(path)
    state, new = _merged(model, "save_merged", safe_merge)
    if new:
        raise NotMergeableError(
            f"{few(new)}: a bias that the architecture lacks, which from_pretrained would leave out; call "
            "save_pretrained(model, path), or torch.save(merged_state_dict(model), file)"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise NotMergeableError(
            "the model is quantised; call merge_and_unload(model, dequantize=True) and save_pretrained of what it "
            "returns, or merge into the model as it was before that"
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if apart := [f"{a} and {b}" for a, b in tied.items() if not _same(state.get(a), state.get(b))]:
        raise NotMergeableError(
            f"{apart[0]} are tied in model.config and were trained apart, so from_pretrained would make them one; set "
            "model.config.tie_word_embeddings = False before get_peft_model"
        )
    write(model, path, state_dict=state, max_shard_size=max_shard_size)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or a.data_ptr() == b.data_ptr()
