"""PEFT's LoRA on bitsandbytes' layers on the fused call, which decodes W once in forward and once in backward.

PEFT has a class for each of them beside its LoRA on linear layers, so each has a fused one. To be imported once PEFT
has made such layers, since it imports bitsandbytes.
"""

from __future__ import annotations

from peft.tuners.lora import bnb
from torch import Tensor

from ..core import ops
from ..core.frozen import kind_of
from .peft import FUSED, FusedLora, replaceable


class _OnPacked(FusedLora):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.base_layer
        if self.disable_adapters and not (self.merged or args or kwargs) and replaceable(kind := kind_of(base), base):
            # the base's own forward would repack its weight on some CPUs, and no gradient pass from then on
            return ops.plain_linear(x, kind.matrix(base), base.bias)
        return super().forward(x, *args, **kwargs)


class FusedLora4bit(_OnPacked, bnb.Linear4bit):
    """On Linear4bit."""


class FusedLora8bit(_OnPacked, bnb.Linear8bitLt):
    """On Linear8bitLt."""


FUSED.update({bnb.Linear4bit: FusedLora4bit, bnb.Linear8bitLt: FusedLora8bit})
