"""Checkpoints in Hugging Face PEFT's layout: adapter_config.json and adapter_model.safetensors in one folder.

Keys are ``base_model.model.<module>.<parameter>``, with PEFT's parameter names where PEFT has the method and
``<method>_<parameter>`` elsewhere; biases trained in place and modules_to_save are stored as PEFT stores them.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import convert, prompt
from .adapted import plain_name
from .adapter_config import (
    CONFIG_NAME,
    NOTE,
    WEIGHTS_NAME,
    AdapterFormatError,
    config_text,
    in_peft,
    load_config,
    note,
    put_config,
    write_config,
)
from .checks import few, refuse_vanished
from .convert import by_keyword
from .linear import PeftLinear
from .methods import PeftConfig
from .renamed import renaming
from .sharded import fill, gathered, is_spread, reshard, shape_of, whole
from .targets import resolve

__all__ = ["AdapterFormatError", "load_adapter", "load_config", "save_pretrained", "write_config"]

_PREFIX = "base_model.model."

# with bias="all" PEFT stores the biases of modules_to_save a second and third time, under its wrapper's names
_DUPLICATE = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")


def _slots(layers: dict[str, PeftLinear], state: convert.AdapterState, find: Callable[[str], Tensor]) -> dict:
    """{key on disk: (tensor in the model, shape on disk)} of everything a checkpoint holds.

    ``find`` looks a parameter up by its name in the adapted model.
    """
    soft = isinstance(state.config, prompt.SoftPromptConfig)
    prefix = "base_model." if soft else _PREFIX
    slots = {}
    for name, layer in layers.items():
        for param in layer.adapter_names:
            tensor = getattr(layer, param)
            shape = shape_of(tensor)
            if param in layer.method.disk and len(shape) == 1:
                shape = tuple(layer.method.disk_shape(shape, layer.config))
            slots[f"{_PREFIX}{name}.{layer.method.disk_key(param)}"] = (tensor, shape)
        for buffer in layer.method.disk_buffers:
            tensor = getattr(layer, buffer)
            slots[f"{_PREFIX}{name}.{layer.method.disk_key(buffer)}"] = (tensor, tuple(tensor.shape))
    for name in (*state.biases, *state.embeddings):
        owner, _, last = name.rpartition(".")
        # of a merged layer the values that are kept beside the merged ones
        tensor = getattr(layers[owner], f"_base_{last}") if owner in layers and layers[owner].merged else find(name)
        key = f"{owner}.base_layer.{last}" if owner in layers else name
        slots[_PREFIX + key] = (tensor, shape_of(tensor))
    for name, original in state.saved.items():
        for key in original.state_dict():
            tensor = find(f"{name}.{key}")
            slots[f"{prefix}{name}.{key}"] = (tensor, shape_of(tensor))
    return slots


def _take_shared(stored: dict[str, Tensor], layers: dict[str, PeftLinear]) -> list[tuple[Tensor, Tensor]]:
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


def _prompt_slot(config: PeftConfig, weight: Tensor | None = None) -> dict:
    """{key: (tensor, shape)} of a soft prompt; the tensor is on the meta device while there is none yet."""
    if not isinstance(config, prompt.SoftPromptConfig):
        return {}
    width = config.token_dim * (2 * config.num_layers if isinstance(config, prompt.PrefixTuningConfig) else 1)
    shape = (config.num_virtual_tokens, width)
    return {"prompt_embeddings": (torch.empty(shape, device="meta") if weight is None else weight, shape)}


def _shared(layers: dict[str, PeftLinear]) -> dict[str, Tensor]:
    """{key on disk: tensor stored once for all layers}: the layer that reads the largest corner reads all of it."""
    found = {}
    for layer in layers.values():
        for name in layer.method.disk_shared:
            key, own = f"base_model.{name}", getattr(layer, name)
            if key not in found or own.numel() > found[key].numel():
                found[key] = own
    return {key: whole(t).detach().contiguous().cpu() for key, t in found.items()}


def _layers(model: nn.Module) -> dict[str, PeftLinear]:
    """The adapted layers by the names that they had before activation checkpointing, FSDP or torch.compile."""
    return {plain_name(name): layer for name, layer in convert.layers(model)}


def _finder(model: nn.Module) -> Callable[[str], Tensor]:
    """name -> parameter or buffer, listed once something is asked for."""
    tensors = None

    def find(name: str) -> Tensor:
        nonlocal tensors
        if tensors is None:
            named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
            tensors = {plain_name(n): t for n, t in named}
        return tensors[name]

    return find


def save_pretrained(model: nn.Module, path: str | os.PathLike, *, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the adapter (never the base weights) into the folder ``path``, created if need be.

    Stock PEFT loads it for the methods it has. Raises ValueError when the model has no adapter, RuntimeError when an
    adapted layer has been replaced since, FileExistsError when ``path`` is a file and PermissionError when the folder
    cannot be written, each before anything is. Warns of trained parameters that belong to no adapter, and of adapters
    that mean something else to a reader of plain LoRA. Each file is written aside and renamed, so a crash leaves the
    old one. Where parameters are sharded (FSDP2, tensor parallel, ZeRO-3) every process calls it, the first one writes;
    or one process does, with the model's whole ``state_dict`` gathered before.
    """
    model = convert.unwrap(model)
    state = convert.state_of(model)
    convert.refuse_while_disabled(model, "save_pretrained")
    refuse_vanished(model, "save_pretrained")
    path = _folder(path)
    reshard(model)
    layers = _layers(model)
    slots = _slots(layers, state, _finder(model))
    _warn_unsaved(model, slots, state)
    if state_dict is not None:
        slots = _taken_from(state_dict, slots, model)
    if soft := prompt.attached(model):
        with gathered(soft.parameters()):
            P = soft.prompt().detach().clone()
        slots["prompt_embeddings"] = (P, tuple(P.shape))
    together = any(is_spread(t) for t, _ in slots.values())
    tensors = {key: whole(t).detach().reshape(shape).contiguous().cpu() for key, (t, shape) in slots.items()}
    if getattr(state.config, "save_projection", False):
        tensors |= _shared(layers)
    try:
        if not together or torch.distributed.get_rank() == 0:
            _warn_residual(layers, state.config)
            config = config_text(state.config)  # all that can be refused comes before the first file
            path.mkdir(parents=True, exist_ok=True)
            aside = path / f".{WEIGHTS_NAME}.{os.getpid()}"
            save_file(apart(tensors), aside, metadata={"format": "pt", NOTE: json.dumps(note(state.config))})
            os.replace(aside, path / WEIGHTS_NAME)
            put_config(config, path)
    finally:
        if together:
            torch.distributed.barrier()  # nobody reads the files before they are there


def _taken_from(state_dict: dict[str, Tensor], slots: dict, model: nn.Module) -> dict:
    """The slots with the values of a state_dict in place of the model's own tensors."""
    # a merged layer's base values go under their own names
    names = {id(t): n.replace("._base_", ".") for n, t in (*model.named_buffers(), *model.named_parameters())}
    missing = {names[id(t)] for t, _ in slots.values() if id(t) in names} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict lacks {few(sorted(missing))}; give the whole of model.state_dict()")
    return {key: (state_dict.get(names.get(id(t)), t), shape) for key, (t, shape) in slots.items()}


def _folder(path: str | os.PathLike) -> Path:
    """The folder to write into; FileExistsError or PermissionError where that cannot be."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"path={str(path)!r} is an existing file; give a folder")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileExistsError(f"path={str(path)!r} lies below {str(there)!r}, which is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"path={str(path)!r}: no permission to write into {str(there)!r}; give another folder")
    return path


def _warn_unsaved(model: nn.Module, slots: dict, state: convert.AdapterState) -> None:
    """Name the parameters that train and do not go into the file: someone set requires_grad on them by hand."""
    soft = prompt.attached(model)
    kept = {id(t) for t, _ in slots.values()} | {id(p) for p in (soft.parameters() if soft else ())}
    lost = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in kept and plain_name(n) not in (*state.biases, *state.embeddings)
    ]
    if lost:
        warnings.warn(
            f"{few(sorted(lost))} train{'s' if len(lost) == 1 else ''} but belong to no adapter and are not saved; "
            "name their modules in modules_to_save, or save them yourself",
            stacklevel=3,
        )


def _warn_residual(layers: dict[str, PeftLinear], config: PeftConfig) -> None:
    """A and B of a method that trains on a residual mean nothing without it."""
    found = {layer.method.name for layer in layers.values() if layer.method.residual is not None}
    if found and in_peft(config):
        warnings.warn(
            f"lora_A and lora_B of {', '.join(sorted(found))} add to a residual of the base weight; a program that "
            "reads them as plain LoRA computes another model",
            stacklevel=3,
        )


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with memory of their own, as safetensors wants them; copied where they share it."""
    found, seen = {}, set()
    for key, t in tensors.items():
        memory = t.untyped_storage()
        alone = memory.data_ptr() not in seen and memory.nbytes() == t.nbytes
        seen.add(memory.data_ptr())
        found[key] = t if alone else t.clone()
    return found


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
    for key, (tensor, shape) in slots.items():
        if stored[key].shape != shape:
            raise AdapterFormatError(
                f"{path / WEIGHTS_NAME}: {key} has shape {tuple(stored[key].shape)}, but the model needs "
                f"{shape}; was it made for another architecture?"
            )
        if not stored[key].dtype.is_floating_point and tensor.dtype.is_floating_point:
            raise AdapterFormatError(f"{path / WEIGHTS_NAME}: {key} has dtype {stored[key].dtype}")


def _drop_remade(slots: dict, stored: dict, layers: dict[str, PeftLinear], config: PeftConfig, path: Path) -> None:
    """Leave alone the buffers that a file of PEFT's lacks, where init has made the same ones from the weight."""
    for name, layer in layers.items():
        own = {f"{_PREFIX}{name}.{layer.method.disk_key(b)}" for b in layer.method.disk_buffers}
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
    layers: dict[str, PeftLinear],
    parameters: dict[str, Tensor],
    path: Path,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove the embeddings and output embeddings that PEFT stores whole beside the adapter; {parameter: (own, value)}
    of those whose values are not the model's."""
    found, written_here = {}, slots.keys() & stored.keys()
    heads = {id(m) for m in (_embeddings(model, which) for which in ("input", "output")) if m is not None}
    for key in stored.keys() - slots.keys():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
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
            tied = convert.Holders(model).others(own, owner)
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
    residual = layer._matrix(layer.method.residual(layer).merged(whole(layer.matrix).float())).cpu()
    return torch.allclose(value.float(), residual, rtol=0, atol=1e-2 * residual.abs().max().item())


def _embeddings(model: nn.Module, which: str) -> nn.Module | None:
    """A Transformers model's input or output embeddings."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        return None if get is None else get()
    except NotImplementedError:  # a Transformers model without any
        return None


@by_keyword("load_adapter replaces the model's one adapter, whatever its name")
def load_adapter(model: nn.Module, path: str | os.PathLike, *, is_trainable: bool = True) -> nn.Module:
    """Load the adapter in the folder ``path``, written by this library or by PEFT, into ``model``; returns it.

    On a plain model the adapter is created first, as get_peft_model would; on a model adapted by the same method its
    values are replaced, if it has the settings that they were trained with. Embeddings that PEFT stored beside the
    adapter replace the model's. is_trainable: whether the adapter trains. Everything is checked before anything
    changes: raises TypeError, FileNotFoundError, AdapterFormatError (names the file and what is wrong in it) or
    get_peft_model's errors with the model as it was.
    """
    if not isinstance(is_trainable, bool):
        raise TypeError(f"is_trainable={is_trainable!r} must be True or False")
    model, path = convert.unwrap(model), Path(path)
    convert.refuse_pefts(model, "load_adapter")
    convert.refuse_while_disabled(model, "load_adapter")
    refuse_vanished(model, "load_adapter")
    reshard(model)
    config = load_config(path)
    config.inference_mode = not is_trainable
    stored = _read(path)
    adapted = hasattr(model, convert._STATE)
    if adapted:
        state, layers = convert.state_of(model), _layers(model)
        _refuse_method(state, config, path / CONFIG_NAME)
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"{merged[0]} is merged; call unmerge before load_adapter")
        if (soft := prompt.attached(model)) and soft.encoder is not None:
            raise AdapterFormatError(f"{path} holds the prompt without its encoder; load it into a plain model")
    else:
        rename = renaming(model)
        try:
            planned = convert.plan(model, config.renamed(rename, {n for n, _ in model.named_modules()}))
        except (ValueError, TypeError) as e:
            raise AdapterFormatError(f"{path} does not fit model={type(model).__name__}: {e}") from e
        planned.plain_prompt = True
        state, layers = planned.state, planned.layers
    # the same names point at the same shapes before and after, so the check needs no change to the model
    slots = _slots(layers, replace(state, embeddings={}), _finder(model)) | _prompt_slot(state.config)
    shared = _take_shared(stored, layers)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = _renamed(stored, slots.keys() | {_PREFIX + n for n in parameters}, renaming(model))
    _drop_remade(slots, stored, layers, config, path)
    before = stored.keys() - slots.keys()
    embeddings = _take_embeddings(stored, slots, model, layers, parameters, path)
    brought = {key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in before - stored.keys()}
    _check(stored, slots, path)
    if adapted:
        _refuse_settings(layers, resolve(model, config), path / CONFIG_NAME)
    else:
        convert.carry_out(model, planned)
        kept = slots.keys()
        slots = {k: v for k, v in _slots(layers, state, _finder(model)).items() if k in kept}
    if soft := prompt.attached(model):
        slots |= _prompt_slot(state.config, soft.embedding.weight)
    for name in state.embeddings.keys() - brought:  # of the adapter that was here before
        fill(parameters[name], state.embeddings.pop(name))
    for name, (own, value) in embeddings.items():
        state.embeddings.setdefault(name, whole(own).detach().clone())
        fill(own, value)
        owner = layers.get(name.rpartition(".")[0])
        if owner is not None and owner.method.from_weight:
            owner.reset_adapter_parameters()  # norms and factors of the weight that is there now
    for key, (tensor, _) in slots.items():
        value = stored[key]
        if value.dim() != tensor.dim():  # its shape is the one on disk, as checked
            value = value.reshape(shape_of(tensor))
        fill(tensor, value)
        if tensor.requires_grad != is_trainable and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(is_trainable)
    for tensor, value in shared:
        fill(tensor, value)
    return model


def _renamed(stored: dict, known: set[str], rename: Callable[[str], str]) -> dict:
    """The tensors under the names that the model has now, where an older Transformers had others."""
    found = {}
    for key, value in stored.items():
        name = key.removeprefix(_PREFIX)
        new = _PREFIX + rename(name) if key not in known and name != key else key
        found[new if new.replace(".base_layer.", ".") in known else key] = value
    return found


def refuse_other(model: nn.Module, stored: PeftConfig, where: str) -> None:
    """AdapterFormatError where a training checkpoint's values, of a model with the config ``stored``, would compute
    something else in this one; ``where`` the config stands."""
    _refuse_method(convert.state_of(model), stored, where)
    _refuse_settings(_layers(model), stored, where)


def _refuse_method(state: convert.AdapterState, config: PeftConfig, where: Path | str) -> None:
    if state.config.method_name != config.method_name:
        raise AdapterFormatError(
            f"{where} is for {config.method_name}, but the model carries {state.config.method_name}; "
            "merge_and_unload first"
        )


def _refuse_settings(layers: dict[str, PeftLinear], stored: PeftConfig, where: Path | str) -> None:
    """Values are replaced, settings are not: AdapterFormatError where the ones that the values were trained with would
    compute something else, a warning where they only say how to train."""
    trains = {}
    for name, layer in layers.items():
        mine, theirs = layer.config, stored.for_module(name)
        differ = {
            f.name: (getattr(theirs, f.name), getattr(mine, f.name))
            for f in fields(mine)
            if f.name not in _ELSEWHERE and getattr(mine, f.name) != getattr(theirs, f.name)
        }
        for field, (there, here) in differ.items():
            if field not in mine.training_only:
                raise AdapterFormatError(
                    f"{where} has {field}={there!r} for {name}, but the model was adapted with "
                    f"{field}={here!r}, with which the loaded values compute something else; load them into a plain "
                    "model, or adapt it with load_config(path)"
                )
        trains |= {field: f"{field}={here!r} (not {there!r})" for field, (there, here) in differ.items()}
    if trains:
        warnings.warn(
            "the loaded adapter was trained with other settings; the model keeps its own: "
            + ", ".join(trains.values()),
            stacklevel=4,
        )


# fields that change no layer's values: targets, names, whether it trains, what is found from the model
_ELSEWHERE = {f.name for f in fields(PeftConfig)} | {"fan_in_fan_out", "projection_shape"}
