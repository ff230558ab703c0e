"""PeftEmbedding: a frozen nn.Embedding and its adapters, y = E[ids] + s · A[:, ids]ᵀ G Bᵀ (``core.lookup``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.frozen import LOOKUP, Frozen, looked_up
from ..core.sharded import whole
from ..methods import Method, PeftConfig, method_of
from .adapter import Adapter, Bound, compose, factors_of
from .layer import PeftLayer, PeftLinear


def refuse_method(method: Method) -> None:
    """TypeError where a method has no update of the rows of a table apart from their values."""
    if method.output is not None:
        raise TypeError(_refusal(method, "it acts on the output of a linear layer"))
    if method.factors is None or method.needs_weight or method.trains_other_biases:
        raise TypeError(_refusal(method, "it computes with the weight or the bias of a linear layer"))


def refuse_beyond_product(adapter: Bound) -> None:
    """TypeError where an adapter does more to rows than add a low-rank product."""
    f = factors_of(adapter)
    if reason := f.beyond_product() or ("it has no low-rank product" if f.A is None else None):
        raise TypeError(_refusal(adapter.method, f"a table takes a low-rank product alone, and this is {reason}"))


def _refusal(method: Method, reason: str) -> str:
    return (
        f"{method.name} cannot adapt an nn.Embedding: {reason}; exclude the embedding, or take a method that only adds "
        "a low-rank product, such as LoRA"
    )


class PeftEmbedding(PeftLayer, nn.Embedding):
    """Drop-in nn.Embedding: ids (...) -> y (..., embedding_dim), table frozen, adapter trainable.

    Made by ``from_embedding``. A is (r, num_embeddings), B (embedding_dim, r): in_features and out_features of the
    table as a linear map of one-hot rows. No dropout acts, as in Hugging Face PEFT. ``embed_scale``, by which some of
    Transformers' tables multiply their rows, multiplies the update too; ``padding_idx`` and ``scale_grad_by_freq`` do
    to A's gradient what they would do to the table's.
    """

    kind: Frozen = LOOKUP
    base_class: type = nn.Embedding

    def __init__(self, *args, **options):
        raise TypeError("PeftEmbedding is made by PeftEmbedding.from_embedding(torch.nn.Embedding(...), config)")

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: PeftConfig, adapter_dtype: torch.dtype | None = None
    ) -> PeftEmbedding:
        """A PeftEmbedding around an existing nn.Embedding, whose weight it shares (no copy) and freezes.

        Raises, with nothing changed: TypeError for a table with max_norm, sparse gradients, quantised values or a
        forward that does more than look up and scale, and for a config whose method is more than a low-rank product;
        ValueError when the config does not fit.
        """
        return cls.made_from(embedding, config, adapter_dtype)

    @classmethod
    def around(cls, module: nn.Module, method: Method) -> PeftLayer:
        layer = super().around(module, method)
        refuse_method(method)
        return layer

    def _attach(self, config: PeftConfig, adapter_dtype: torch.dtype | None) -> None:
        super()._attach(config, adapter_dtype)
        refuse_beyond_product(self)

    def made_adapter(self, name: str, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> Adapter:
        refuse_method(method_of(config))
        adapter = super().made_adapter(name, config, adapter_dtype)
        refuse_beyond_product(adapter)
        return adapter

    @property
    def bias(self) -> None:
        """A table has none."""

    @bias.setter
    def bias(self, value: None) -> None:
        """Unmerging puts back that there was none."""

    def forward(self, ids: Tensor) -> Tensor:
        """y (..., embedding_dim) in the table's dtype; ids (...) int32 or int64."""
        if self._batch is not None and self.enabled and not self.merged:
            if (y := self._batch(self, ids)) is not None:
                return y
        if self.enabled and not self.merged and self.active != ():
            return compose(self, self.active_adapters(), ids)
        if self.merged and self.enabled:
            self._warn_if_training()
        if self.merged and not self.enabled:
            return looked_up(self, ids, whole(self._base_weight))
        return self.base_forward(ids)


def layer_class(module: nn.Module) -> type[PeftLayer]:
    """The class that takes a module's place."""
    return PeftEmbedding if isinstance(module, nn.Embedding) else PeftLinear
