"""Diff pruning with a fixed mask: W' = W + mask ⊙ values, mask and values stored sparse.

Guo et al., arXiv 2012.07463, with the mask chosen once; reconstruction group of arXiv 2407.05417.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.sharded import added_at
from .base import Init, Method, PeftConfig, naming
from .defaults import LORA_TARGETS


@dataclass(kw_only=True)
class DiffPruningConfig(PeftConfig):
    """Diff pruning.

    density: the share of entries that train, those of largest magnitude in W.
    mask: {module name: boolean tensor (out, in)} instead, or one tensor for a single layer; in a stored config, {module
        name: number of entries}.
    """

    peft_type: ClassVar[str] = "DIFF_PRUNING"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}

    training_only: ClassVar[frozenset[str]] = frozenset({"density", "mask"})  # the chosen entries are stored

    density: float = 0.005
    mask: dict[str, Tensor | int] | Tensor | int | None = field(default=None, metadata=naming("whole"))

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} must lie in (0, 1]")

    def for_module(self, name: str) -> DiffPruningConfig:
        if not isinstance(self.mask, dict):
            return self
        if name not in self.mask:
            raise ValueError(f"mask has no entry for {name!r}, only for {', '.join(sorted(self.mask))}")
        return replace(self, target_modules=None, target_parameters=None, mask=self.mask[name])

    def stored(self) -> dict[str, Any]:
        fields = super().stored()
        count = lambda m: int(m.sum()) if isinstance(m, Tensor) else m  # noqa: E731
        fields["mask"] = (
            {n: count(m) for n, m in self.mask.items()} if isinstance(self.mask, dict) else count(self.mask)
        )
        return fields

    def describe(self) -> str:
        return f"density={self.density!r}" if self.mask is None else "mask given"


def init(W, bias, config, new):
    mask, count = config.mask, max(1, round(config.density * W.numel()))
    if W.is_meta:
        count = count if mask is None else int(mask.sum()) if isinstance(mask, Tensor) else mask
        index = torch.empty(count, dtype=torch.int64, device="meta")
    elif isinstance(mask, Tensor):
        if mask.shape != W.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, but must be boolean and of the weight's "
                f"shape (out, in) = {tuple(W.shape)}"
            )
        index = mask.to(W.device).flatten().nonzero().flatten()
    else:
        index = W.abs().flatten().topk(count if mask is None else mask).indices.sort().values
    return Init({"values": new(len(index)).zero_()}, {"index": index})


def weight(layer):
    W, values = layer.matrix, layer.values
    W = W.to(torch.promote_types(W.dtype, values.dtype))
    return added_at(W, layer.index, values.to(W.dtype))


DIFF_PRUNING = Method(
    name="diff_pruning",
    group="reconstruct",
    config=DiffPruningConfig,
    example=lambda r: DiffPruningConfig(),
    init=init,
    weight=weight,
    from_weight=True,
    disk_buffers=("index",),
)
