"""PEFT's LoRA, AdaLoRA, (IA)³ and HiRA on bitsandbytes' layers on the fused call, which decodes W once in forward and
once in backward.

PEFT has a class for each of them beside the one on linear layers, so each has a fused one. To be imported once PEFT has
made such layers, since it imports bitsandbytes.
"""

from __future__ import annotations

from functools import reduce

import torch
from peft.tuners.adalora import bnb as adalora
from peft.tuners.hira.bnb import Linear4bit as Hira4bit
from peft.tuners.hira.bnb import Linear8bitLt as Hira8bit
from peft.tuners.ia3 import bnb as ia3
from peft.tuners.lora import bnb as lora
from torch import Tensor

from ..core import ops
from .peft_layers import FUSED, FusedAdaLora, FusedIA3, FusedLora, OnPacked
from .peft_methods import FusedHira


class FusedLora4bit(OnPacked, FusedLora, lora.Linear4bit):
    """On Linear4bit."""


class FusedLora8bit(OnPacked, FusedLora, lora.Linear8bitLt):
    """On Linear8bitLt."""


class FusedAdaLora4bit(OnPacked, FusedAdaLora, adalora.SVDLinear4bit):
    """On Linear4bit."""


class FusedAdaLora8bit(OnPacked, FusedAdaLora, adalora.SVDLinear8bitLt):
    """On Linear8bitLt, where PEFT's sum has the dtype of the ranks too."""

    def _with(self, x: Tensor, adapters: list[str] | None = None) -> Tensor:
        y = super()._with(x, adapters)
        if ops.autocasting(x):
            return y
        return y.to(reduce(torch.promote_types, (self.ranknum[name].dtype for name in self._used(adapters)), y.dtype))


class _IA3OnPacked(OnPacked, FusedIA3):
    """PEFT's y is in fp32, and so is x on its way to the base."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or x.dtype == torch.float32 or ops.autocasting(x):
            return super().forward(x, *args, **kwargs)
        if getattr(self.base_layer, "compute_dtype", None) != x.dtype:  # which the base would cast back to
            x = x.float()
        return super().forward(x, *args, **kwargs).float()


class FusedIA34bit(_IA3OnPacked, ia3.Linear4bit):
    """On Linear4bit."""


class FusedIA38bit(_IA3OnPacked, ia3.Linear8bitLt):
    """On Linear8bitLt."""


class FusedHira4bit(OnPacked, FusedHira, Hira4bit):
    """On Linear4bit."""


class FusedHira8bit(OnPacked, FusedHira, Hira8bit):
    """On Linear8bitLt."""


FUSED.update(
    {
        lora.Linear4bit: FusedLora4bit,
        lora.Linear8bitLt: FusedLora8bit,
        adalora.SVDLinear4bit: FusedAdaLora4bit,
        adalora.SVDLinear8bitLt: FusedAdaLora8bit,
        ia3.Linear4bit: FusedIA34bit,
        ia3.Linear8bitLt: FusedIA38bit,
        Hira4bit: FusedHira4bit,
        Hira8bit: FusedHira8bit,
    }
)
