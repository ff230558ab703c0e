"""What ``save_pretrained`` of an adapted Hugging Face model does: the adapter goes into the folder, not the base model.

The model's own would write base and adapter as one checkpoint, from which ``from_pretrained`` gives the base model back
without a word. Here the folder has no config.json, so that it is loaded as an adapter or not at all. A base that has no
name, by which it could be loaded again, goes into a folder of its own within.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.sharded import is_spread, shape_of
from . import adapter_config, save
from .adapted import STATE, layers
from .base_state import base_state_dict, writer
from .holder import DEFAULT
from .parts import guard, saves

BASE_NAME = "base_model"  # the folder of a base without a name, within the adapter's
_CHECKPOINT = re.compile(r"(tmp-)?checkpoint-\d+")  # Trainer's folders
STATE_NAME = "model.safetensors"  # where Trainer looks for the state of a model that it resumes


class _SavesAdapter:
    """In place of an adapted model's ``save_pretrained``."""

    saves_adapter = True

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """``fused_peft.save_pretrained``. With ``state_dict`` among the arguments, as Trainer calls it, a file of
        everything that training changes goes beside the adapter, from which it resumes exactly; the config goes with
        it, and a model with other settings refuses to load it. A base that was made in memory goes along, except into
        Trainer's checkpoints, so that ``from_pretrained`` finds one."""
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True: an adapted model saves its adapter into a folder; upload that with "
                "huggingface_hub.upload_folder"
            )
        state = kwargs.get("state_dict")
        if not is_main_process and (state is not None or not any(map(is_spread, self.model.parameters()))):
            return
        write = self._base_writer(Path(save_directory))
        base = None if write is None else str(Path(save_directory).absolute() / BASE_NAME)
        save.put_adapter(self.model, save_directory, DEFAULT, state, base)
        for name in self.model.__dict__[STATE].added:  # PEFT's layout
            save.put_adapter(self.model, Path(save_directory) / name, name, state, base)
        if base is not None:
            write(self.model, base, state_dict=base_state_dict(self.model))
            warnings.warn(
                f"{type(self.model).__name__} has no name by which its weights could be loaded again, so they are "
                f"saved too, in {base}; set model.config.name_or_path to where they are before get_peft_model",
                stacklevel=2,
            )
        if "state_dict" in kwargs and is_main_process:
            trained = save.apart(_changing(self.model, self.model.state_dict() if state is None else state))
            trained[adapter_config.ENTRY] = adapter_config.packed(self.model.__dict__[STATE].config)
            save_file(trained, Path(save_directory) / STATE_NAME, metadata={"format": "pt"})

    def _base_writer(self, folder: Path) -> Callable | None:
        """What writes the base model beside the adapter; None where it has a name, or cannot be written."""
        model, config = self.model, self.model.__dict__[STATE].config
        quantised = getattr(model, "hf_quantizer", None) is not None
        if config.base_model_name_or_path or _CHECKPOINT.fullmatch(folder.name) or quantised:
            return None
        return None if any(map(is_spread, model.parameters())) else writer(model)


class _KeepsSize:
    """In place of an adapted model's ``resize_token_embeddings``, which makes new modules and ties them anew."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs):
        """As the model's own, unless that would replace what trains: then the embeddings as they are where the size is
        theirs already, or RuntimeError."""
        model, embeddings = self.model, self.model.get_input_embeddings()
        saved = {id(m) for name in model.__dict__[STATE].saved for m in model.get_submodule(name).modules()}
        adapted = {id(layer) for _, layer in layers(model)}
        rows = {id(model.get_submodule(name)) for name in model.__dict__[STATE].tokens}
        replaced = {id(embeddings), id(model.get_output_embeddings())}
        names = [n for n, m in model.named_modules() if id(m) in replaced & (saved | adapted | rows)]
        if not names:
            return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        size = shape_of(embeddings.weight)[0]
        to = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            to = -(-to // pad_to_multiple_of) * pad_to_multiple_of
        if to != size:
            raise RuntimeError(
                f"resize_token_embeddings to {to} (from {size}) would put another module in place of "
                f"{' and '.join(names)}, which the adapter trains; call it before get_peft_model"
            )
        return embeddings


class _Refuses:
    """In place of ``save_pretrained`` of a part of an adapted model, whose adapters it would lose."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args, **kwargs):
        raise RuntimeError(
            f"{self.name} is part of an adapted model, and from its own checkpoint the adapters would not come back; "
            "call fused_peft.save_pretrained(model, path) for the whole, or merge_and_unload(model) first"
        )


def _changing(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state_dict without the frozen base parameters."""
    adapters = {id(p) for _, layer in layers(model) for a in layer.adapters.values() for p in a.adapter_tensors()}
    frozen = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if not p.requires_grad and id(p) not in adapters
    }
    return {name: t.detach().contiguous().cpu() for name, t in state.items() if name not in frozen}


def redirect(model: nn.Module) -> None:
    """Let an adapted model save its adapter, and its parts and what holds it refuse to save without theirs."""
    guard()
    adapted = {id(layer) for _, layer in layers(model)}
    for name, module in model.named_modules():
        if module is model and saves(module):
            module.save_pretrained = _SavesAdapter(model)
            if hasattr(type(model), "resize_token_embeddings"):
                model.resize_token_embeddings = _KeepsSize(model)
        elif saves(module) and any(id(m) in adapted for m in module.modules()):
            module.save_pretrained = _Refuses(name)
    model.register_state_dict_pre_hook(_before_state_dict)
    model.register_load_state_dict_pre_hook(_before_load)


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    model.__dict__[STATE].refuse_while_exchanged("state_dict")


def _before_load(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    model.__dict__[STATE].refuse_while_exchanged("load_state_dict")
    entry = state_dict.pop(prefix + adapter_config.ENTRY, None)
    if entry is not None:
        save.refuse_other(model, adapter_config.unpacked(entry), "the checkpoint's config")


def restore(model: nn.Module) -> None:
    """Undo ``redirect``."""
    for module in model.modules():
        for hooks, own in (
            (module._state_dict_pre_hooks, _before_state_dict),
            (module._load_state_dict_pre_hooks, _before_load),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is own]:
                del hooks[key]
        if isinstance(module.__dict__.get("save_pretrained"), (_SavesAdapter, _Refuses)):
            del module.save_pretrained
        if isinstance(module.__dict__.get("resize_token_embeddings"), _KeepsSize):
            del module.resize_token_embeddings
