"""PEFT's LoRA on nn.Embedding, by one product that adds the update (``core.lookup``).

PEFT forms the update, scales it and adds it: three passes over y, and with fp32 adapters a y in fp32.
"""

from __future__ import annotations

from peft.tuners import lora
from peft.tuners.lora.variants import MiCAEmbeddingVariant
from torch import Tensor

from ..core import lookup
from ..core.factors import Factors
from ..core.sharded import is_sharded
from .peft_layers import FUSED, Accelerated


class FusedEmbedding(Accelerated, lora.Embedding):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.unfused(x):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        for name in self._used():
            y = lookup.plus(y, self.base_layer, x, self._factors(name))
        return y

    def _factors(self, name: str) -> Factors:
        B, s = self.lora_embedding_B[name], self.scaling[name]
        if isinstance(s, Tensor):  # as PEFT makes it for hot-swapping
            B, s = B * s, 1.0
        return Factors(A=self.lora_embedding_A[name], B=B, s=s)

    def _used(self, adapters: list[str] | None = None) -> list[str]:
        own = self.lora_embedding_A
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in own]

    def unfused(self, x: Tensor | None = None, adapters: list[str] | None = None) -> str | None:
        """Why a call takes PEFT's forward with these adapters (default: the active ones); None where it is fused."""
        base = self.base_layer
        if is_sharded(base.weight) or self.tp_layer is not None:
            return "its table is spread over several processes"
        if base.max_norm is not None or base.sparse:
            return f"its table has {'sparse gradients' if base.sparse else 'a max_norm'}, and so has A in PEFT's call"
        for name in self._used(adapters):
            variant = self.lora_variant.get(name)
            if variant is not None and not isinstance(variant, MiCAEmbeddingVariant):
                return f"adapter {name!r} is a variant of LoRA ({type(variant).__name__})"
        return None


FUSED[lora.Embedding] = FusedEmbedding
