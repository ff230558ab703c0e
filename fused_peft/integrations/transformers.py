"""Transformers' Trainer: schedules driven at the right moment of each step."""

from __future__ import annotations

from transformers import TrainerCallback

from ..schedule import on_step


class ScheduleCallback(TrainerCallback):
    """Calls ``fused_peft.on_step`` after each optimizer step, while the gradients are still there.

    ``Trainer(..., callbacks=[ScheduleCallback()])``. Steps count from 0 and continue on resume, since Trainer restores
    ``state.global_step`` and the adapters' schedule state is in the model's ``state_dict``.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        on_step(model, state.global_step)
