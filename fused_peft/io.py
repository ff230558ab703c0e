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
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import convert, prompt
from .linear import PeftLinear
from .methods import METHODS, PeftConfig
from .sharded import is_sharded, placed_as, reshard, whole

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# what PEFT writes beside the hyper-parameters, and settings that mean nothing unless another is on
_NEUTRAL = {"auto_mapping", "eva_config", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}

# with bias="all" PEFT stores the biases of modules_to_save a second and third time, under its wrapper's names
_DUPLICATE = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")

# what PEFT writes for a method although it changes nothing once the values are loaded: AdaLoRA's rank is init_r
_NEUTRAL_FOR = {"ADALORA": {"r", "init_lora_weights"}, "DELORA": {"init_weights"}}

# PEFT's initialisations that leave the base weight alone: of no consequence once the values are loaded
_INIT_ONLY = {"orthogonal", "eva"}


class AdapterFormatError(ValueError):
    """The folder does not hold an adapter that this library can load; the message names the file and the problem."""


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
            shape = tuple(tensor.shape)
            if param in layer.method.disk and len(shape) == 1:
                shape = tuple(layer.method.disk_shape(shape, layer.config))
            slots[f"{_PREFIX}{name}.{layer.method.disk_key(param)}"] = (tensor, shape)
        for buffer in layer.method.disk_buffers:
            tensor = getattr(layer, buffer)
            slots[f"{_PREFIX}{name}.{layer.method.disk_key(buffer)}"] = (tensor, tuple(tensor.shape))
    for name in state.biases:
        tensor, owner = find(name), name.rpartition(".")[0]
        key = f"{owner}.base_layer.bias" if owner in layers else name
        slots[_PREFIX + key] = (tensor, tuple(tensor.shape))
    for name, original in state.saved.items():
        for key in original.state_dict():
            tensor = find(f"{name}.{key}")
            slots[f"{prefix}{name}.{key}"] = (tensor, tuple(tensor.shape))
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
    return {key: whole(t.detach()).contiguous().cpu() for key, t in found.items()}


def _finder(model: nn.Module) -> Callable[[str], Tensor]:
    tensors = None

    def find(name: str) -> Tensor:
        nonlocal tensors
        if tensors is None:
            tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        return tensors[name]

    return find


def save_pretrained(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter (never the base weights) into the folder ``path``, created if need be.

    Stock PEFT loads it for the methods it has. Raises ValueError when the model has no adapter and
    FileExistsError when ``path`` is a file. Each file is written aside and renamed, so a crash leaves the old one.
    Where parameters are sharded (FSDP2, tensor parallel) every process must call it, and the first one writes.
    """
    model = convert.unwrap(model)
    state = convert.state_of(model)
    convert.refuse_while_disabled(model, "save_pretrained")
    reshard(model)
    path = Path(path)
    slots = _slots(dict(convert.layers(model)), state, _finder(model))
    if hasattr(model, "soft_prompt"):
        P = model.soft_prompt.prompt()
        slots["prompt_embeddings"] = (P, tuple(P.shape))
    together = any(is_sharded(t) for t, _ in slots.values())
    tensors = {key: whole(t.detach()).reshape(shape).contiguous().cpu() for key, (t, shape) in slots.items()}
    if getattr(state.config, "save_projection", False):
        tensors |= _shared(dict(convert.layers(model)))
    try:
        if not together or torch.distributed.get_rank() == 0:
            if path.exists() and not path.is_dir():
                raise FileExistsError(f"path={str(path)!r} is an existing file; give a folder")
            path.mkdir(parents=True, exist_ok=True)
            aside = path / f".{WEIGHTS_NAME}.{os.getpid()}"
            save_file(_apart(tensors), aside, metadata={"format": "pt"})
            os.replace(aside, path / WEIGHTS_NAME)
            write_config(state.config, path)
    finally:
        if together:
            torch.distributed.barrier()  # nobody reads the files before they are there


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with memory of their own, as safetensors wants them; copied where they share it."""
    found, seen = {}, set()
    for key, t in tensors.items():
        memory = t.untyped_storage()
        alone = memory.data_ptr() not in seen and memory.nbytes() == t.nbytes
        seen.add(memory.data_ptr())
        found[key] = t if alone else t.clone()
    return found


def write_config(config: PeftConfig, path: Path) -> None:
    """Write the config into the folder ``path`` as save_pretrained does, for inference."""
    stored = {k: v for k, v in config.stored().items() if v is not None}
    defaults = {f.name: f.default for f in fields(config)}
    foreign = {k: stored.pop(k) for k in config.beyond_peft & stored.keys()}
    foreign = {k: v for k, v in foreign.items() if v != defaults[k]}
    if foreign and any(m.disk for m in METHODS.values() if m.config.peft_type == config.peft_type):
        warnings.warn(
            f"Hugging Face PEFT ignores {foreign} of {config.peft_type}; it will load another adapter", stacklevel=3
        )
    stored = {**stored, **foreign, "peft_type": config.peft_type, "inference_mode": True}
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".{CONFIG_NAME}.{os.getpid()}"
    aside.write_text(json.dumps(dict(sorted(stored.items())), indent=2) + "\n")  # patterns keep their order
    os.replace(aside, path / CONFIG_NAME)


def load_config(path: str | os.PathLike) -> PeftConfig:
    """The config stored in the folder ``path``, written by this library or by Hugging Face PEFT.

    Raises FileNotFoundError, or AdapterFormatError for a broken file, an unknown method, or a setting that changes
    the result and that this library does not know.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"path={str(path)!r} holds no {CONFIG_NAME}; give the folder that save_pretrained wrote"
        )
    try:
        stored = json.loads(file.read_text())
        peft_type = stored.pop("peft_type")
    except (ValueError, KeyError, AttributeError) as e:
        raise AdapterFormatError(f"{file} is not an adapter config: {e}") from e
    known = dict(prompt.CONFIGS)
    for m in METHODS.values():  # of the configs that share a peft_type, the one the others derive from
        known[m.config.peft_type] = min(known.get(m.config.peft_type, m.config), m.config, key=lambda c: len(c.__mro__))
    if peft_type not in known:
        raise AdapterFormatError(f"{file}: peft_type={peft_type!r} is unknown; known: {', '.join(sorted(known))}")
    names = {f.name for f in fields(known[peft_type])}
    neutral = _NEUTRAL | _NEUTRAL_FOR.get(peft_type, set())
    unknown = {k: v for k, v in stored.items() if k not in names | neutral and v not in (None, False, {}, [])}
    if unknown:
        raise AdapterFormatError(f"{file}: {unknown} is not supported for {peft_type}; load this adapter with PEFT")
    if stored.get("init_lora_weights") in _INIT_ONLY:
        stored["init_lora_weights"] = True
    try:
        return known[peft_type](**{k: v for k, v in stored.items() if k in names and v is not None})
    except (TypeError, ValueError) as e:
        raise AdapterFormatError(f"{file}: {e}") from e


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


def _listing(keys) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _check(stored: dict[str, Tensor], slots: dict, path: Path) -> None:
    missing, extra = slots.keys() - stored.keys(), stored.keys() - slots.keys()
    if missing or extra:
        parts = [f"lacks {_listing(missing)}"] if missing else []
        parts += [f"has {_listing(extra)}, which the model does not"] if extra else []
        raise AdapterFormatError(f"{path / WEIGHTS_NAME} {' and '.join(parts)}; was it made for another architecture?")
    for key, (tensor, shape) in slots.items():
        if stored[key].shape != shape:
            raise AdapterFormatError(
                f"{path / WEIGHTS_NAME}: {key} has shape {tuple(stored[key].shape)}, but the model needs "
                f"{shape}; was it made for another architecture?"
            )
        if not stored[key].dtype.is_floating_point and tensor.dtype.is_floating_point:
            raise AdapterFormatError(f"{path / WEIGHTS_NAME}: {key} has dtype {stored[key].dtype}")


def load_adapter(model: nn.Module, path: str | os.PathLike, is_trainable: bool = True) -> nn.Module:
    """Load the adapter in the folder ``path``, written by this library or by PEFT, into ``model``; returns it.

    On a plain model the adapter is created first, as get_peft_model would; on a model adapted by the same method its
    values are replaced. is_trainable: whether the adapter trains. Everything is checked before anything changes:
    raises FileNotFoundError, AdapterFormatError (names the file and what is wrong in it) or get_peft_model's errors
    with the model as it was.
    """
    model, path = convert.unwrap(model), Path(path)
    convert.refuse_while_disabled(model, "load_adapter")
    reshard(model)
    config = load_config(path)
    config.inference_mode = not is_trainable
    stored = _read(path)
    if hasattr(model, convert._STATE):
        state, layers = convert.state_of(model), dict(convert.layers(model))
        if state.config.method_name != config.method_name:
            raise AdapterFormatError(
                f"{path / CONFIG_NAME} is for {config.method_name}, but the model carries {state.config.method_name}; "
                "merge_and_unload first"
            )
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"{merged[0]} is merged; call unmerge before load_adapter")
        slots, shared = _slots(layers, state, _finder(model)), _take_shared(stored, layers)
        if hasattr(model, "soft_prompt"):
            if model.soft_prompt.encoder is not None:
                raise AdapterFormatError(f"{path} holds the prompt without its encoder; load it into a plain model")
            slots |= _prompt_slot(state.config, model.soft_prompt.embedding.weight)
        _check(stored, slots, path)
        _warn_settings(state.config, config)
    else:
        try:
            planned = convert.plan(model, config)
        except (ValueError, TypeError) as e:
            raise AdapterFormatError(f"{path} does not fit model={type(model).__name__}: {e}") from e
        # the same names point at the same shapes before and after, so the check needs no change to the model
        planned.plain_prompt = True
        shared = _take_shared(stored, planned.layers)
        _check(stored, _slots(planned.layers, planned.state, _finder(model)) | _prompt_slot(planned.state.config), path)
        convert.carry_out(model, planned)
        slots = _slots(planned.layers, planned.state, _finder(model))
        if hasattr(model, "soft_prompt"):
            slots |= _prompt_slot(planned.state.config, model.soft_prompt.embedding.weight)
    with torch.no_grad():
        for key, (tensor, _) in slots.items():
            value = stored[key]
            if value.dim() != tensor.dim():  # its shape is the one on disk, as checked
                value = value.reshape(tensor.shape)
            tensor.copy_(placed_as(value, tensor) if is_sharded(tensor) else value)
            if tensor.requires_grad != is_trainable and isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(is_trainable)
        for tensor, value in shared:
            tensor.copy_(placed_as(value, tensor))
    return model


def _warn_settings(current: PeftConfig, stored: PeftConfig) -> None:
    """Values are replaced, settings such as the scaling are not: say which differ."""
    where = {"target_modules", "base_model_name_or_path", "revision", "inference_mode", "task_type", "modules_to_save"}
    mine, theirs = current.stored(), stored.stored()
    differ = {n: (mine[n], theirs[n]) for n in mine if n not in where and mine[n] != theirs[n]}
    if differ:
        warnings.warn(
            f"the loaded adapter was made with other settings; the model keeps its own: {differ}", stacklevel=3
        )
