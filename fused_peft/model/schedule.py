"""What happens between steps: rank allocation and direction choice, and the parameter groups of LoRA+."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.sharded import is_sharded, reshard
from . import checks
from .adapted import active_layers, unwrap
from .holder import Gathered

OF_PEFT: list[Callable[[nn.Module, int], None]] = []  # what acts on Hugging Face PEFT's own models


def on_step(model: nn.Module, step: int) -> None:
    """Let the methods that have a schedule act (AdaLoRA's rank allocator, LoRA-Dash's choice of directions).

    Call it once a training step, after ``optimizer.step()`` and before ``optimizer.zero_grad()``, with step counted
    from 0; other methods cost nothing. Their state lives in buffers, so it is part of ``state_dict``. On Hugging Face
    PEFT's AdaLoRA it calls ``model.base_model.update_and_allocate(step)``; make no such call beside it. A warning names
    the adapted layers that other code has dropped from the model, each set of them once. Raises
    RuntimeError when a method needs gradients that are gone, ValueError for a negative step. With sharded parameters
    every process calls it, and each sees them whole while it acts.
    """
    if step < 0:
        raise ValueError(f"step={step} must not be negative; count training steps from 0")
    checks.warn_vanished(model, again=False)
    for act in OF_PEFT:
        act(unwrap(model), step)
    scheduled = [(name, layer) for name, layer in active_layers(model) if layer.method.on_step is not None]
    checks.driven([layer for _, layer in scheduled])
    by_method = defaultdict(list)
    reshard(model)
    for name, layer in scheduled:
        if layer.method.acts(layer, step):
            by_method[layer.method.name].append((name, layer))
    for found in by_method.values():
        act = found[0][1].method.on_step
        if not any(is_sharded(p) for _, layer in found for p in layer.parameters()):
            act(found, step)
            continue
        copies = [(name, Gathered(layer)) for name, layer in found]
        act(copies, step)
        for _, copy in copies:
            copy.put_back()


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer parameter groups of LoRA+ (arXiv 2402.12354): lr for every trainable tensor, ratio · lr for the factor
    on the output's side, (out, r), whatever a method calls it.

    ``torch.optim.AdamW(fp.lora_plus_groups(model, 1e-4))``. Raises ValueError when the model has no B factor to treat
    so.
    """
    slow, fast = [], []
    factors_b = {id(getattr(layer, layer.method.B)) for _, layer in active_layers(model) if layer.method.B}
    for p in model.parameters():
        if p.requires_grad:
            (fast if id(p) in factors_b else slow).append(p)
    if not fast:
        raise ValueError(
            f"model={type(model).__name__} has no trainable factor B, (out, r), which LoRA+ gives its own learning rate"
        )
    groups = [{"params": slow, "lr": lr, "weight_decay": weight_decay}] if slow else []
    return [*groups, {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay}]
