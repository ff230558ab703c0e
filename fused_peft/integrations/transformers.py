"""Transformers' Trainer: PEFT models accelerated, schedules driven at the right moment of each step."""

from __future__ import annotations

import sys

from transformers import TrainerCallback

from ..convert import unwrap
from ..schedule import on_step


class FusedPeftCallback(TrainerCallback):
    """All that a Trainer script needs: ``Trainer(..., callbacks=[FusedPeftCallback()])``.

    When training begins, the layers of a Hugging Face PEFT model are accelerated (``fused_peft.accelerate``); they stay
    so, or become PEFT's again when it ends with ``restore=True``. After each optimizer step, while the gradients are
    still there, the schedules act: ``fused_peft.on_step`` on this library's models, ``update_and_allocate`` on PEFT's
    AdaLoRA. PEFT asks for that call in the training loop and Trainer does not make it; make none of your own beside it.

    Steps count from 0, as in PEFT's documentation, and continue on resume. A step that loss scaling skipped is passed
    over: its gradients are not finite. This library's schedules resume exactly, since their state is in ``state_dict``.
    PEFT's AdaLoRA does not resume once its budget falls: its checkpoints hold the ranks in use alone.
    """

    def __init__(self, restore: bool = False):
        self.restore = restore

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if "peft" in sys.modules:
            from . import peft as bridge

            if any(type(module) in bridge.FUSED for module in model.modules()):
                bridge.accelerate(model)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(optimizer, "step_was_skipped", False):
            return
        on_step(model, state.global_step)
        peft, tuner = sys.modules.get("peft"), getattr(unwrap(model), "base_model", None)
        if peft and isinstance(tuner, peft.AdaLoraModel):
            tuner.update_and_allocate(state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.restore and "peft" in sys.modules:
            from . import peft as bridge

            bridge.restore(model)
