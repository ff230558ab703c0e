"""Reading an adapter: checked as a whole before anything of the model changes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.sharded import fill, reshard, shape_of, whole
from ..methods import PeftConfig
from . import prompt
from .adapted import STATE, few, unwrap
from .adapter import Bound
from .adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFormatError,
    load_config,
)
from .checks import refuse_vanished
from .convert import Holders, carry_out, plan
from .holder import DEFAULT
from .layer import PeftLinear
from .named import addition, put_addition
from .renamed import renaming
from .save import PREFIX, disk_name, finder, layers_of, prompt_slot, refuse_method, refuse_settings, slots_of
from .state import AdapterState, by_keyword, refuse_pefts, refuse_while_disabled, state_of
from .targets import embeddings, resolve

# with bias="all" PEFT stores the biases of modules_to_save a second and third time, under its wrapper's names
_DUPLICATE = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")


def _read(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_NAME
    if not file.is_file():
        beside = sorted(p.name for p in path.glob("adapter_model.*"))
        hint = f" (found {', '.join(beside)}: convert it to safetensors)" if beside else ""
        raise FileNotFoundError(f"path={str(path)!r} holds no {WEIGHTS_NAME}{hint}")
    try:
        with safe_open(file, framework="pt") as f:
            keys = [key for key in f.keys() if not _DUPLICATE.search(key)]
            return {key: f.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as e:
        raise AdapterFormatError(f"{file} is truncated or not a safetensors file: {e}") from e


def _check(stored: dict[str, Tensor], slots: dict, path: Path) -> None:
    missing, extra = slots.keys() - stored.keys(), stored.keys() - slots.keys()
    if missing or extra:
        parts = [f"lacks {few(sorted(missing))}"] if missing else []
        parts += [f"has {few(sorted(extra))}, which the model does not"] if extra else []
        raise AdapterFormatError(f"{path / WEIGHTS_NAME} {' and '.join(parts)}; was it made for another architecture?")
    for key, (tensor, shape, _) in slots.items():
        if stored[key].shape != shape:
            raise AdapterFormatError(
                f"{path / WEIGHTS_NAME}: {key} has shape {tuple(stored[key].shape)}, but the model needs "
                f"{shape}; was it made for another architecture?"
            )
        if not stored[key].dtype.is_floating_point and tensor.dtype.is_floating_point:
            raise AdapterFormatError(f"{path / WEIGHTS_NAME}: {key} has dtype {stored[key].dtype}")


def _take_shared(stored: dict[str, Tensor], layers: dict[str, Bound]) -> list[tuple[Tensor, Tensor]]:
    """Remove the tensors stored once for all layers; [(a layer's buffer, its corner of the stored tensor)]."""
    pairs = []
    for layer in layers.values():
        for name in layer.method.disk_shared:
            whole, own = stored.get(f"base_model.{name}"), getattr(layer, name)
            if whole is not None:
                if any(w < o for w, o in zip(whole.shape, own.shape, strict=True)):
                    raise AdapterFormatError(
                        f"base_model.{name} has shape {tuple(whole.shape)}, less than a layer needs"
                    )
                pairs.append((own, whole[: own.shape[0], : own.shape[1]]))
    names = {f"base_model.{n}" for layer in layers.values() for n in layer.method.disk_shared}
    for key in names & stored.keys():
        del stored[key]
    return pairs


def _drop_remade(slots: dict, stored: dict, layers: dict[str, Bound], config: PeftConfig, path: Path) -> None:
    """Leave alone the buffers that a file of PEFT's lacks, where init has made the same ones from the weight."""
    for name, layer in layers.items():
        own = {f"{PREFIX}{disk_name(name, layers)}.{layer.method.disk_key(b)}" for b in layer.method.disk_buffers}
        if layer.method.residual is None or own <= stored.keys():
            continue
        how = config.init_lora_weights
        if not layer.method.remade(config):
            raise AdapterFormatError(
                f"{path / WEIGHTS_NAME} lacks what {how} took out of the weights, and that was drawn at random; save "
                "it with PEFT's path_initial_model_for_weight_conversion, as plain LoRA"
            )
        if layer.config.init_lora_weights != how:
            raise AdapterFormatError(
                f"{path / CONFIG_NAME} has init_lora_weights={how!r}, but the model's adapter began with "
                f"{layer.config.init_lora_weights!r}, on another residual; load it into a plain model"
            )
        for key in own:
            del slots[key]


def _take_embeddings(
    stored: dict,
    slots: dict,
    model: nn.Module,
    layers: dict[str, Bound],
    parameters: dict[str, Tensor],
    path: Path,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove the embeddings and output embeddings that PEFT stores whole beside the adapter; {parameter: (own, value)}
    of those whose values are not the model's."""
    found, written_here = {}, slots.keys() & stored.keys()
    heads = {id(m) for m in (embeddings(model, which) for which in ("input", "output")) if m is not None}
    for key in stored.keys() - slots.keys():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        own, owner = parameters.get(name), name.rpartition(".")[0]
        if own is None or not (id(m := model.get_submodule(owner)) in heads or isinstance(m, nn.Embedding)):
            continue
        value = stored.pop(key)
        if value.shape != shape_of(own):
            raise AdapterFormatError(
                f"{path / WEIGHTS_NAME}: {key} has shape {tuple(value.shape)}, the model's has {shape_of(own)}; call "
                f"model.resize_token_embeddings({value.shape[0]}) first"
            )
        if whole(own).detach().cpu().equal(value.to(own.dtype)):
            continue
        layer = layers.get(owner)
        if layer is not None and layer.method.residual is not None and not any("residual_" in k for k in written_here):
            tied = Holders(model).others(own, owner)
            if tied or not _is_residual(value, layer):
                why = f"put in place of {', '.join(tied)} as well, being tied to it" if tied else "another model's"
                raise AdapterFormatError(
                    f"{path / WEIGHTS_NAME}: {key} is the residual of {layer.method.name}, and {why}; load this "
                    "adapter with PEFT"
                )
            continue
        found[name] = own, value
    return found


@torch.no_grad()
def _is_residual(value: Tensor, layer: PeftLinear) -> bool:
    """Whether PEFT has stored the residual on which the method trains: there it takes the place of the weight."""
    residual = layer.kind.placed(layer.method.residual(layer).merged(whole(layer.matrix).float())).cpu()
    return torch.allclose(value.float(), residual, rtol=0, atol=1e-2 * residual.abs().max().item())


@by_keyword("give a name as adapter_name=...")
def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = DEFAULT, is_trainable: bool = True
) -> nn.Module:
    """Load the adapter in the folder ``path``, written by this library or by PEFT, into ``model``; returns it.

    On a plain model the adapter is created first, as get_peft_model would; on a model adapted by the same method its
    values are replaced, if it has the settings that they were trained with. Embeddings that PEFT stored beside the
    adapter replace the model's. is_trainable: whether the adapter trains. adapter_name: a further adapter, which is
    added, inactive, to a model that has its first one (see ``add_adapter``), or replaced. Everything is checked before
    anything changes: raises TypeError, FileNotFoundError, AdapterFormatError (names the file and what is wrong in it)
    or get_peft_model's errors with the model as it was.
    """
    if not isinstance(is_trainable, bool):
        raise TypeError(f"is_trainable={is_trainable!r} must be True or False")
    model, path = unwrap(model), Path(path)
    refuse_pefts(model, "load_adapter")
    refuse_while_disabled(model, "load_adapter")
    refuse_vanished(model, "load_adapter")
    reshard(model)
    config = load_config(path)
    config.inference_mode = not is_trainable
    stored = _read(path)
    adapted, added = hasattr(model, STATE), None
    if adapter_name != DEFAULT:
        state = state_of(model, "load_adapter")
        if adapter_name not in state.added:
            named = config.renamed(renaming(model), {n for n, _ in model.named_modules()})
            try:
                added = addition(model, adapter_name, named)
            except (ValueError, TypeError) as e:
                raise AdapterFormatError(f"{path} does not fit model={type(model).__name__}: {e}") from e
    if added:
        state, layers = AdapterState(added.config), added.adapters
    elif adapted:
        state, layers = state_of(model).of(adapter_name), layers_of(model, adapter_name)
        refuse_method(state, config, path / CONFIG_NAME)
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"{merged[0]} is merged; call unmerge before load_adapter")
        if (soft := prompt.attached(model)) and soft.encoder is not None:
            raise AdapterFormatError(f"{path} holds the prompt without its encoder; load it into a plain model")
    else:
        rename = renaming(model)
        try:
            with torch.inference_mode(False):
                planned = plan(model, config.renamed(rename, {n for n, _ in model.named_modules()}))
        except (ValueError, TypeError) as e:
            raise AdapterFormatError(f"{path} does not fit model={type(model).__name__}: {e}") from e
        planned.plain_prompt = True
        state, layers = planned.state, planned.layers
    # the same names point at the same shapes before and after, so the check needs no change to the model
    slots = slots_of(layers, replace(state, embeddings={}), finder(model)) | prompt_slot(state.config)
    shared = _take_shared(stored, layers)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = _renamed(stored, slots.keys() | {PREFIX + n for n in parameters}, renaming(model))
    _drop_remade(slots, stored, layers, config, path)
    before = stored.keys() - slots.keys()
    embeddings = _take_embeddings(stored, slots, model, layers, parameters, path)
    brought = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in before - stored.keys()}
    _check(stored, slots, path)
    if added:
        put_addition(model, added)
    elif adapted:
        refuse_settings(model, state, layers, resolve(model, config), path / CONFIG_NAME)
    else:
        with torch.inference_mode(False):
            carry_out(model, planned)
        kept = slots.keys()
        slots = {k: v for k, v in slots_of(layers, state, finder(model)).items() if k in kept}
    if soft := prompt.attached(model):
        slots |= prompt_slot(state.config, soft.embedding.weight)
    for name in state.embeddings.keys() - brought:  # of the adapter that was here before
        fill(parameters[name], state.embeddings.pop(name))
    for name, (own, value) in embeddings.items():
        state.embeddings.setdefault(name, whole(own).detach().clone())
        fill(own, value)
        owner = layers.get(name.rpartition(".")[0])
        if owner is not None and owner.method.from_weight:
            owner.reset_adapter_parameters()  # norms and factors of the weight that is there now
    for key, slot in slots.items():
        tensor = slot.tensor
        fill(tensor, slot.in_memory(stored[key]))  # its shape is the one on disk, as checked
        if adapter_name == DEFAULT and tensor.requires_grad != is_trainable and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(is_trainable)
    for tensor, value in shared:
        fill(tensor, value)
    return model


def _renamed(stored: dict, known: set[str], rename: Callable[[str], str]) -> dict:
    """The tensors under the names that the model has now, where an older Transformers had others."""
    found = {}
    for key, value in stored.items():
        name = key.removeprefix(PREFIX)
        new = PREFIX + rename(name) if key not in known and name != key else key
        found[new if new.replace(".base_layer.", ".") in known else key] = value
    return found
