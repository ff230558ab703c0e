"""Tensors that several processes hold together (DTensor: FSDP2, tensor parallel): gathered, and split again.

Both are collective: every process of the tensor's mesh must take part.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor | None) -> bool:
    return type(t) not in (Tensor, nn.Parameter) and hasattr(t, "full_tensor")  # a failing hasattr costs a microsecond


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Those whose parameters ``fully_shard`` manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the gathered copies that a forward left behind, as writing into those would be lost."""
    for module in fsdp_modules(model):
        module.reshard()


def whole(t: Tensor) -> Tensor:
    """The whole tensor on every process; t itself where it is no DTensor."""
    return t.full_tensor() if is_sharded(t) else t


def placed_as(value: Tensor, like: Tensor, source: int | None = None) -> Tensor:
    """A whole value split as ``like`` is: this process's own value, or that of the mesh's process ``source``."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=source)


@torch.no_grad()
def set_data(t: Tensor, value: Tensor) -> None:
    """Put a value, whole or split as t is, in place of t's: ``t.data = value``, which does nothing on a DTensor."""
    if is_sharded(t):
        t.copy_(placed_as(value, t))
    else:
        t.data = value
