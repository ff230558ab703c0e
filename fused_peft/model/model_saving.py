"""What ``save_pretrained`` of an adapted Hugging Face model does: the adapter goes into the folder, not the base model.

The model's own would write base and adapter as one checkpoint, from which ``from_pretrained`` gives the base model back
without a word. Here the folder has no config.json, so that it is loaded as an adapter or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.sharded import is_spread
from .adapted import layers

STATE_NAME = "model.safetensors"  # where Trainer looks for the state of a model that it resumes


class _SavesAdapter:
    """In place of an adapted model's ``save_pretrained``."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """``fused_peft.save_pretrained``. With ``state_dict`` among the arguments, as Trainer calls it, a file of
        everything that training changes goes beside the adapter, from which it resumes exactly."""
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True: an adapted model saves its adapter into a folder; upload that with "
                "huggingface_hub.upload_folder"
            )
        from . import checkpoint as io  # which adapts models to load into, and so comes after this file

        state = kwargs.get("state_dict")
        if not is_main_process and (state is not None or not any(map(is_spread, self.model.parameters()))):
            return
        io.save_pretrained(self.model, save_directory, state_dict=state)
        if "state_dict" in kwargs and is_main_process:
            trained = io.apart(_changing(self.model, self.model.state_dict() if state is None else state))
            save_file(trained, Path(save_directory) / STATE_NAME, metadata={"format": "pt"})


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
    adapters = {id(p) for _, layer in layers(model) for p in layer.adapter_tensors()}
    frozen = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if not p.requires_grad and id(p) not in adapters
    }
    return {name: t.detach().contiguous().cpu() for name, t in state.items() if name not in frozen}


def _saves(module: nn.Module) -> bool:
    return callable(getattr(type(module), "save_pretrained", None))


def redirect(model: nn.Module) -> None:
    """Let an adapted model save its adapter, and its parts refuse to save without theirs."""
    adapted = {id(layer) for _, layer in layers(model)}
    for name, module in model.named_modules():
        if module is model and _saves(module):
            module.save_pretrained = _SavesAdapter(model)
        elif _saves(module) and any(id(m) in adapted for m in module.modules()):
            module.save_pretrained = _Refuses(name)


def restore(model: nn.Module) -> None:
    """Undo ``redirect``."""
    for module in model.modules():
        if isinstance(module.__dict__.get("save_pretrained"), (_SavesAdapter, _Refuses)):
            del module.save_pretrained
