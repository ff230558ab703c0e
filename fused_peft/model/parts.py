"""Models of Hugging Face that are adapted in part, or by hand: their own save_pretrained would lose the adapters."""

from __future__ import annotations

import functools
import sys

from torch import nn

from .adapted import STATE, is_pefts, layers, roots

# whose save_pretrained writes a whole model, by the module that defines the class
_WRITERS = (("transformers.modeling_utils", "PreTrainedModel"), ("diffusers.models.modeling_utils", "ModelMixin"))


def guard() -> None:
    """Let the classes of Hugging Face models refuse to save what would lose an adapter: of a model that is adapted in
    part nothing else is called."""
    for module, name in _WRITERS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and not hasattr(kind.save_pretrained, "guarded"):
            kind.save_pretrained = _guarded(kind.save_pretrained)


def _guarded(save):
    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        if why := lost_by_saving(self):
            raise RuntimeError(f"save_pretrained {why}")
        return save(self, *args, **kwargs)

    save_pretrained.guarded = True
    return save_pretrained


def lost_by_saving(model: nn.Module) -> str | None:
    """Why the model's own save_pretrained would lose an adapter, and what to do instead; None where it loses none."""
    if not saves(model) or getattr(model.__dict__.get("save_pretrained"), "saves_adapter", False) or is_pefts(model):
        return None
    if STATE in model.__dict__:
        return f"of {type(model).__name__} would lose its adapter: call fused_peft.save_pretrained(model, path)"
    if parts := adapted_parts(model):
        return f"of {type(model).__name__} would lose the adapter of its part: {about_parts(model, parts)}"
    if names := [name for name, _ in layers(model)]:
        return (
            f"of {type(model).__name__} would lose the adapter of {names[0]}, a PeftLinear put in by hand: keep "
            "model.state_dict() by torch.save, or adapt the model with get_peft_model"
        )
    return None


def adapted_parts(model: nn.Module) -> list[str]:
    """The names of the modules in a model that get_peft_model has adapted, where that is not the model itself."""
    parts = {id(m) for m in roots(model) if m is not model}
    return [name for name, m in model.named_modules() if id(m) in parts]


def about_parts(model: nn.Module, parts: list[str]) -> str:
    """What to call where the adapter is on parts of a model."""
    calls = ", ".join(f"fused_peft.save_pretrained(model.{name}, path)" for name in parts)
    return (
        f"get_peft_model has adapted model.{parts[0]}, not model={type(model).__name__} itself. Call {calls} and, on "
        f"the base model, load_adapter(model.{parts[0]}, path); or adapt the whole, get_peft_model(model, config), "
        "whose save_pretrained and Trainer checkpoints hold the adapter"
    )


def saves(module: nn.Module) -> bool:
    return callable(getattr(type(module), "save_pretrained", None))
