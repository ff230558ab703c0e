"""Tensors that several processes hold together: gathered, and split again.

DTensor (FSDP2, tensor parallel), and DeepSpeed ZeRO-3, whose parameters look empty between calls and carry ``ds_id``.
All of it is collective: every process that holds a part must take part.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor | None) -> bool:
    return type(t) not in (Tensor, nn.Parameter) and hasattr(t, "full_tensor")  # a failing hasattr costs a microsecond


def is_partitioned(t: Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the tensor in parts."""
    return hasattr(t, "ds_id")


def is_spread(t: Tensor | None) -> bool:
    """Whether several processes hold the tensor together."""
    return is_sharded(t) or is_partitioned(t)


def shape_of(t: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(t.ds_shape if is_partitioned(t) else t.shape)


def numel(t: Tensor) -> int:
    """The elements of the whole tensor."""
    return math.prod(shape_of(t))


@contextmanager
def gathered(tensors: Iterable[Tensor | None], write: bool = False) -> Iterator[None]:
    """Within the context ZeRO-3's parameters are whole; ``write``: the first process's values stay behind."""
    parts = [t for t in tensors if is_partitioned(t)]
    if not parts:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(parts, modifier_rank=0 if write else None):
        yield


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Those whose parameters ``fully_shard`` manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the gathered copies that a forward left behind, as writing into those would be lost."""
    for module in fsdp_modules(model):
        module.reshard()


def whole(t: Tensor) -> Tensor:
    """The whole tensor on every process; t itself where one process holds it. Of ZeRO-3's a copy without gradient."""
    if is_partitioned(t):
        with gathered([t]):
            return t.detach().clone()
    return t.full_tensor() if is_sharded(t) else t


def whole_grad(t: Tensor) -> Tensor | None:
    """The whole gradient of a tensor that is spread, on every process; None where there is none."""
    if is_partitioned(t):
        return sys.modules["deepspeed"].utils.safe_get_full_grad(t)
    return None if t.grad is None else whole(t.grad)


def placed_as(value: Tensor, like: Tensor, source: int | None = None) -> Tensor:
    """A whole value split as ``like`` is: this process's own value, or that of the mesh's process ``source``."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=source)


@torch.no_grad()
def set_data(t: Tensor, value: Tensor) -> None:
    """Put a value, whole or split as t is, in place of t's: ``t.data = value``, which does nothing on a DTensor."""
    if is_spread(t):
        fill(t, value)
    else:
        t.data = value


@torch.no_grad()
def fill(t: Tensor, value: Tensor, source: int | None = None) -> None:
    """Copy a value, whole or split as t is, into t, whoever holds it; ``source`` as for ``placed_as``."""
    with gathered([t], write=True):
        t.copy_(placed_as(value, t, source))


def added_at(W: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of W (N, K) with values added at these positions of its flattened form, each of which occurs once."""
    if is_sharded(W):  # formed whole and then split: flattening W, and index_add, fail on DTensors of PyTorch 2.11
        change = values.new_zeros(W.numel()).scatter(0, index, values).view(W.shape)
        return W + change.redistribute(W.device_mesh, W.placements)
    return W.reshape(-1).index_add(0, index, values).view(W.shape)
