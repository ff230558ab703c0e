"""Transformers' Trainer: PEFT models accelerated, schedules driven at the right moment, the first step checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps

from torch import nn
from transformers import TrainerCallback, trainer

from ..model import checks
from ..model.adapted import is_adapted, unwrap
from ..model.parts import lost_by_saving
from ..model.schedule import on_step
from ..tools.calibrate import ROWS, at_start


class FusedPeftCallback(TrainerCallback):
    """All that a Trainer script needs: ``Trainer(..., callbacks=[FusedPeftCallback()])``.

    When training begins, the layers of a Hugging Face PEFT model are accelerated (``fused_peft.accelerate``), and when
    an epoch begins, those added since; they stay so, or become PEFT's again when training ends with ``restore=True``.
    After each optimizer step, while the gradients are still there, the schedules act (``fused_peft.on_step``), those of
    this library and PEFT's AdaLoRA. PEFT asks for a call of ``update_and_allocate`` in the training loop, which Trainer
    does not make; make none of your own beside it.

    Before the first optimizer step ``fused_peft.check_training`` looks at the gradients and the optimizer, and warns of
    adapters that do not train. Adapted layers that have vanished are named when training begins, and when more follow.
    RuntimeError when training begins where checkpoints would lose the adapter, which is on a part of the model. Trainer
    takes quantised models that ``fused_peft.get_peft_model`` adapted, once this class is imported.

    Steps count from 0, as in PEFT's documentation, and continue on resume. A step that loss scaling skipped is passed
    over: its gradients are not finite. This library's schedules resume exactly, since their state is in ``state_dict``.
    PEFT's AdaLoRA does not resume once its budget falls: its checkpoints hold the ranks in use alone.

    On a GPU that nothing was measured on yet, the kernels are tested and timed when training begins, once, for about 30
    seconds (``fused_peft.calibrate``, for ``rows`` of tokens); ``calibrate=False`` or FUSED_PEFT_CALIBRATE=0 skips it.
    """

    def __init__(self, restore: bool = False, calibrate: bool = True, rows: Sequence[int] = ROWS):
        self.restore = restore
        self.calibrate, self.rows = calibrate, rows
        self._checked = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._checked = False
        saves = args is not None and args.save_strategy != "no"
        if saves and (why := lost_by_saving(unwrap(model))):
            raise RuntimeError(f"A checkpoint by save_pretrained {why}; or train with save_strategy='no'")
        checks.warn_vanished(model, again=False)
        _accelerate(model, first=True)
        if self.calibrate and checks.has_adapter(model):
            at_start(model, self.rows)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        _accelerate(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not self._checked and checks.has_adapter(model):
            checks.check_training(model, optimizer)
        self._checked = True

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(optimizer, "step_was_skipped", False):
            return
        on_step(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.restore and "peft" in sys.modules:
            from . import peft as bridge

            bridge.restore(model)


def _knowing_adapters(validate: Callable) -> Callable:
    """Trainer's check of quantised models, which lets PEFT's adapters on them train: this library's as well."""

    @wraps(validate)
    def checked(model: nn.Module) -> None:
        quantizer = getattr(model, "hf_quantizer", None)
        if not (is_adapted(model) and getattr(quantizer, "is_trainable", False)):
            validate(model)

    checked._of_fused_peft = True
    return checked


_own = getattr(trainer, "validate_quantization_for_training", None)
if _own is not None and not hasattr(_own, "_of_fused_peft"):  # once, though this file is imported anew
    trainer.validate_quantization_for_training = _knowing_adapters(_own)


def _accelerate(model, first: bool = False) -> None:
    """Accelerate the PEFT layers that can be and are not yet; at first also say so where none can."""
    if "peft" not in sys.modules:
        return
    from . import peft as bridge

    kinds = {type(module) for module in model.modules()}
    waiting, done = kinds & {*bridge.FUSED}, kinds & {*bridge.FUSED.values()}
    others = any(issubclass(kind, bridge.BaseTunerLayer) for kind in kinds)
    if waiting or (first and others and not done):
        bridge.accelerate(model)
