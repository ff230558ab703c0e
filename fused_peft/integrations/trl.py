"""TRL's trainers with a reference: of a model that carries an adapter already, it is that adapter as training begins.

TRL knows an adapter by PEFT's ``PeftModel`` alone. For a model of ``fused_peft.get_peft_model`` it would load the base
model anew, without the adapter, and call that the reference; and in a PeftModel it copies into the adapter "ref" only
tensors whose names have the adapter's in the middle, not those whose names end with it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from functools import wraps

from torch import nn

from ..model.adapted import is_adapted


def meet(module: str) -> None:
    """Have the trainer of one of TRL's modules, imported already, know this library's adapters."""
    for name, trainer in vars(sys.modules[module]).items():
        if name.lower() == module.split(".")[-1].replace("_", "") and not hasattr(trainer.__init__, "_refers"):
            trainer.__init__ = _referring(trainer.__init__, name)


def reference(model: nn.Module, share: bool = True) -> nn.Module:
    """A frozen copy of an adapted model as it is now. share: on the model's own frozen parameters, which must then be
    neither sharded nor written to."""
    frozen = {id(p): p for p in model.parameters() if share and not p.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False).eval()


def _referring(init, trainer: str):
    takes = inspect.signature(init)

    @wraps(init)
    def __init__(self, *args, **kwargs) -> None:
        bound = takes.bind(self, *args, **kwargs)
        given = bound.arguments
        model, settings = given.get("model"), given.get("args")
        if isinstance(model, nn.Module) and is_adapted(model) and given.get("ref_model") is None:
            if "ref_model" in takes.parameters:
                if not getattr(settings, "precompute_ref_log_probs", False):
                    alone = not any(getattr(settings, name, None) for name in ("deepspeed", "fsdp", "sync_ref_model"))
                    given["ref_model"] = reference(model, share=alone)
            elif getattr(settings, "beta", None) != 0:
                raise ValueError(
                    f"model={type(model).__name__} was adapted by fused_peft.get_peft_model, and the reference of "
                    f"{trainer} would be its base, loaded anew, without the adapter; adapt it with peft.get_peft_model "
                    "and the same config, or give args with beta=0"
                )
        before = {*getattr(model, "peft_config", ())}
        init(*bound.args, **bound.kwargs)
        if "ref" in {*getattr(model, "peft_config", ())} - before:
            _copy(model, "default", "ref")

    __init__._refers = True
    return __init__


def _copy(model: nn.Module, adapter: str, to: str) -> None:
    """Give one adapter of a PeftModel the values of another."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        other = tensors.get(".".join(to if part == adapter else part for part in name.split(".")))
        if other is not None and other is not tensor and other.shape == tensor.shape:
            other.data.copy_(tensor.data)
