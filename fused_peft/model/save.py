"""Writing an adapter: adapter_config.json and adapter_model.safetensors in one folder, in Hugging Face PEFT's layout.

Keys are ``base_model.model.<module>.<parameter>``, with PEFT's parameter names where PEFT has the method and
``<method>_<parameter>`` elsewhere; biases trained in place and modules_to_save are stored as PEFT stores them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.sharded import gathered, is_spread, reshard, shape_of, whole
from ..methods import PeftConfig
from . import prompt
from .adapted import few, layers, plain_name, unwrap
from .adapter import Bound
from .adapter_config import (
    NOTE,
    WEIGHTS_NAME,
    AdapterFormatError,
    config_text,
    in_peft,
    note,
    put_config,
)
from .checks import refuse_vanished
from .holder import DEFAULT
from .state import AdapterState, refuse_while_disabled, state_of
from .trainable_tokens import FIELD, KEY, asked

PREFIX = "base_model.model."


# fields that change no layer's values: targets, names, whether it trains, what is found from the model
_ELSEWHERE = {f.name for f in fields(PeftConfig)} | {"fan_in_fan_out", "projection_shape"}


class Slot(NamedTuple):
    """A tensor of the model, the shape it has on disk, and whether its experts come last there: PEFT stores the B of
    experts (E, out, r) as (out, r E), and their A (E, r, in) as (E r, in)."""

    tensor: Tensor
    shape: tuple[int, ...]
    experts_last: bool = False

    def on_disk(self, value: Tensor) -> Tensor:
        return (value.permute(1, 2, 0) if self.experts_last else value).reshape(self.shape)

    def in_memory(self, value: Tensor) -> Tensor:
        if not self.experts_last:
            return value.reshape(shape_of(self.tensor))
        E, out, r = shape_of(self.tensor)
        return value.reshape(out, r, E).permute(2, 0, 1)


def stacked_slot(tensor: Tensor, is_B: bool) -> Slot:
    """The slot of A (E, r, in) or B (E, out, r) of experts."""
    E, rows, columns = shape_of(tensor)
    return Slot(tensor, (rows, columns * E), True) if is_B else Slot(tensor, (E * rows, columns))


def _slot(layer: Bound, name: str) -> Slot:
    """The slot of one of an adapter's tensors."""
    tensor, method = getattr(layer, name), layer.method
    shape = shape_of(tensor)
    if layer.kind.stacked and name in (method.A, method.B):
        return stacked_slot(tensor, name == method.B)
    if name in method.disk and len(shape) == 1:
        shape = tuple(method.disk_shape(shape, layer.config))
    return Slot(tensor, shape)


def disk_name(name: str, layers: dict[str, Bound]) -> str:
    """The name under which an adapted layer's tensors are stored: of parameters of one module the last one's are at the
    module, and each before it one base_layer further in, as PEFT's wrappers nest."""
    one = layers[name].holder()
    if not hasattr(one, "parameter_name"):
        return name
    owner = name.removesuffix(f".{one.parameter_name}")
    held = {n: layer.holder() for n, layer in layers.items()}
    beside = [n for n, other in held.items() if getattr(other, "owner", None) is one.owner]
    order = sorted(beside, key=lambda n: [*one.owner._parameters].index(held[n].parameter_name))
    return owner + ".base_layer" * (len(order) - 1 - order.index(name))


def slots_of(layers: dict[str, Bound], state: AdapterState, find: Callable[[str], Tensor]) -> dict[str, Slot]:
    """{key on disk: Slot} of everything a checkpoint holds.

    ``find`` looks a parameter up by its name in the adapted model.
    """
    slots = {}
    for name, layer in layers.items():
        stored = disk_name(name, layers)
        for param in layer.tensor_names:
            slots[f"{PREFIX}{stored}.{layer.method.disk_key(param, layer.kind.lookup)}"] = _slot(layer, param)
        for buffer in layer.method.disk_buffers:
            tensor = getattr(layer, buffer)
            slots[f"{PREFIX}{stored}.{layer.method.disk_key(buffer)}"] = Slot(tensor, tuple(tensor.shape))
    return slots | slots_beside(layers, state, find)


def slots_beside(layers: dict[str, Bound], state: AdapterState, find: Callable[[str], Tensor]) -> dict[str, Slot]:
    """The same of what a checkpoint holds beside the adapters' own tensors: biases, embeddings and rows of them,
    modules_to_save."""
    slots = {}
    prefix = "base_model." if isinstance(state.config, prompt.SoftPromptConfig) else PREFIX
    for name in (*state.biases, *state.embeddings):
        owner, _, last = name.rpartition(".")
        # of a merged layer the values that are kept beside the merged ones
        tensor = getattr(layers[owner], f"_base_{last}") if owner in layers and layers[owner].merged else find(name)
        key = f"{owner}.base_layer.{last}" if owner in layers else name
        slots[PREFIX + key] = Slot(tensor, shape_of(tensor))
    for name, original in state.saved.items():
        for key in original.state_dict():
            tensor = find(f"{name}.{key}")
            slots[f"{prefix}{name}.{key}"] = Slot(tensor, shape_of(tensor))
    for name, tokens in state.tokens.items():
        V = tokens.trainable_tokens_delta
        slots[f"{PREFIX}{name}.{KEY}.trainable_tokens_delta"] = Slot(V, shape_of(V))
    return slots


def prompt_slot(config: PeftConfig, weight: Tensor | None = None) -> dict:
    """{key: (tensor, shape)} of a soft prompt; the tensor is on the meta device while there is none yet."""
    if not isinstance(config, prompt.SoftPromptConfig):
        return {}
    width = config.token_dim * (2 * config.num_layers if isinstance(config, prompt.PrefixTuningConfig) else 1)
    shape = (config.num_virtual_tokens, width)
    return {"prompt_embeddings": Slot(torch.empty(shape, device="meta") if weight is None else weight, shape)}


def _shared(layers: dict[str, Bound]) -> dict[str, Tensor]:
    """{key on disk: tensor stored once for all layers}: the layer that reads the largest corner reads all of it."""
    found = {}
    for layer in layers.values():
        for name in layer.method.disk_shared:
            key, own = f"base_model.{name}", getattr(layer, name)
            if key not in found or own.numel() > found[key].numel():
                found[key] = own
    return {key: whole(t).detach().contiguous().cpu() for key, t in found.items()}


def layers_of(model: nn.Module, adapter_name: str = DEFAULT) -> dict[str, Bound]:
    """{layer: its adapter of that name}, by the names before activation checkpointing, FSDP or torch.compile."""
    found = ((plain_name(name), layer.adapters.get(adapter_name)) for name, layer in layers(model))
    return {name: adapter for name, adapter in found if adapter is not None}


def finder(model: nn.Module) -> Callable[[str], Tensor]:
    """name -> parameter or buffer, listed once something is asked for."""
    tensors = None

    def find(name: str) -> Tensor:
        nonlocal tensors
        if tensors is None:
            named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
            tensors = {plain_name(n): t for n, t in named}
        return tensors[name]

    return find


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = DEFAULT,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter (never the base weights) into the folder ``path``, created if need be; adapter_name: which, of a
    model that has several.

    Stock PEFT loads it for the methods it has. Raises ValueError when the model has no adapter, RuntimeError when an
    adapted layer has been replaced since, FileExistsError when ``path`` is a file and PermissionError when the folder
    cannot be written, each before anything is. Warns of trained parameters that belong to no adapter, and of adapters
    that mean something else to a reader of plain LoRA. Each file is written aside and renamed, so a crash leaves the
    old one. Where parameters are sharded (FSDP2, tensor parallel, ZeRO-3) every process calls it, the first one writes;
    or one process does, with the model's whole ``state_dict`` gathered before.
    """
    put_adapter(model, path, adapter_name, state_dict)


def put_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str, state_dict: dict | None, base: str | None = None
) -> None:
    """``save_pretrained``; base: the name to give the base model in the config, in place of the config's own."""
    model = unwrap(model)
    state = state_of(model).of(adapter_name)
    refuse_while_disabled(model, "save_pretrained")
    refuse_vanished(model, "save_pretrained")
    path = folder(path)
    reshard(model)
    layers = layers_of(model, adapter_name)
    slots = slots_of(layers, state, finder(model))
    _warn_unsaved(model, slots, state)
    if state_dict is not None:
        slots = _taken_from(state_dict, slots, model)
    if soft := prompt.attached(model):
        with gathered(soft.parameters()):
            P = soft.prompt().detach().clone()
        slots["prompt_embeddings"] = Slot(P, tuple(P.shape))
    together = any(is_spread(slot.tensor) for slot in slots.values())
    tensors = {key: s.on_disk(whole(s.tensor).detach()).contiguous().cpu() for key, s in slots.items()}
    if getattr(state.config, "save_projection", False):
        tensors |= _shared(layers)
    try:
        if not together or torch.distributed.get_rank() == 0:
            _warn_residual(layers, state.config)
            write(path, replace(state.config, base_model_name_or_path=base) if base else state.config, tensors)
    finally:
        if together:
            torch.distributed.barrier()  # nobody reads the files before they are there


def write(path: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Both files, into a folder that is made if need be; each is written aside and renamed."""
    text = config_text(config)  # all that can be refused comes before the first file
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".{WEIGHTS_NAME}.{os.getpid()}"
    save_file(apart(tensors), aside, metadata={"format": "pt", NOTE: json.dumps(note(config))})
    os.replace(aside, path / WEIGHTS_NAME)
    put_config(text, path)


def _taken_from(state_dict: dict[str, Tensor], slots: dict, model: nn.Module) -> dict:
    """The slots with the values of a state_dict in place of the model's own tensors."""
    # a merged layer's base values go under their own names
    names = {id(t): n.replace("._base_", ".") for n, t in (*model.named_buffers(), *model.named_parameters())}
    missing = {names[id(s.tensor)] for s in slots.values() if id(s.tensor) in names} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict lacks {few(sorted(missing))}; give the whole of model.state_dict()")
    taken = lambda t: state_dict.get(names.get(id(t)), t)  # noqa: E731
    return {key: slot._replace(tensor=taken(slot.tensor)) for key, slot in slots.items()}


def folder(path: str | os.PathLike[str]) -> Path:
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


def _warn_unsaved(model: nn.Module, slots: dict, state: AdapterState) -> None:
    """Name the parameters that train and do not go into the file: someone set requires_grad on them by hand."""
    soft = prompt.attached(model)
    kept = {id(slot.tensor) for slot in slots.values()} | {id(p) for p in (soft.parameters() if soft else ())}
    kept |= {id(p) for _, layer in layers(model) for a in layer.adapters.values() for p in a.adapter_tensors()}
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


def _warn_residual(layers: dict[str, Bound], config: PeftConfig) -> None:
    """A and B of a method that trains on a residual mean nothing without it."""
    found = {layer.method.name for layer in layers.values() if layer.method.residual is not None}
    if found and in_peft(config):
        warnings.warn(
            f"lora_A and lora_B of {', '.join(sorted(found))} add to a residual of the base weight; a program that "
            "reads them as plain LoRA computes another model (fused_peft.export_lora writes what it can read)",
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


def refuse_other(model: nn.Module, stored: PeftConfig, where: str) -> None:
    """AdapterFormatError where a training checkpoint's values, of a model with the config ``stored``, would compute
    something else in this one; ``where`` the config stands."""
    refuse_method(state_of(model), stored, where)
    refuse_settings(model, state_of(model), layers_of(model), stored, where)


def refuse_method(state: AdapterState, config: PeftConfig, where: Path | str) -> None:
    if state.config.method_name != config.method_name:
        raise AdapterFormatError(
            f"{where} is for {config.method_name}, but the model carries {state.config.method_name}; "
            "merge_and_unload first"
        )


def refuse_settings(
    model: nn.Module, state: AdapterState, layers: dict[str, Bound], stored: PeftConfig, where: Path | str
) -> None:
    """Values are replaced, settings are not: AdapterFormatError where the ones that the values were trained with would
    compute something else, a warning where they only say how to train."""
    mine = {name: [*tokens.indices] for name, tokens in state.tokens.items()}
    if asked(model, stored) != mine:
        raise AdapterFormatError(
            f"{where} has {FIELD}={stored.trainable_token_indices!r}, but the rows that train in the model are "
            f"{mine or 'none'}; load it into a plain model, or adapt that with load_config(path)"
        )
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
