"""PEFT's LoRA on nn.Embedding: y = E[ids] + s · A[:, ids]ᵀ Bᵀ, the update added by the product itself.

PEFT forms the update, scales it and adds it: three passes over y, and with fp32 adapters a y in fp32. Here one product
adds it in y's dtype. Kept for backward are the ids and A[:, ids]; of what has the size of the vocabulary only A's own
gradient is made.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import MiCAEmbeddingVariant
from torch import Tensor

from ..core import ops
from ..core.sharded import is_sharded
from .peft_layers import FUSED, Accelerated


class FusedEmbedding(Accelerated, lora.Embedding):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.unfused(x):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        with ops.no_autocast(y.device.type):  # which no lookup heeds
            for name in self._used():
                y = self._with(y, x, name)
        return y

    def _with(self, y: Tensor, ids: Tensor, name: str) -> Tensor:
        """y (..., N) and the update of one adapter at ids (...)."""
        B, s = self.lora_embedding_B[name], self.scaling[name]
        T = self._embed(ids, self.lora_embedding_A[name].t())
        if (by := self._get_embed_scale()) is not None:
            T = T * by.to(T.dtype)
        if isinstance(s, Tensor):
            T, s = T * s, 1.0
        T = T.reshape(-1, T.shape[-1]).to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), T, B.t().to(y.dtype), alpha=s).view(y.shape)

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
