"""Trainable parameters of half-precision modules, kept in fp32 while the module computes in its own dtype.

An optimizer step on fp16 or bf16 values loses small updates, and GradScaler refuses fp16 gradients. Adapters are fp32
for that reason; so are the heads and biases that train beside them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from .sharded import gathered

HALF = (torch.float16, torch.bfloat16)


class _Body(nn.Module):
    """The forward of a module's class, without its hooks: those run once, around the call."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)


class _Narrowed:
    """In place of a module's forward: the same with some of its parameters cast to the dtypes it computes in."""

    def __init__(self, module: nn.Module, dtypes: dict[str, torch.dtype]):
        self.body, self.dtypes = _Body(module), dtypes

    def __call__(self, *args, **kwargs):
        module = self.body.module
        own = ((name, module.get_parameter(name), dtype) for name, dtype in self.dtypes.items())
        narrow = {f"module.{name}": p.to(dtype) for name, p, dtype in own if p.dtype != dtype}
        return functional_call(self.body, narrow, args, kwargs)


def widen(module: nn.Module, dtype: torch.dtype, names: list[str] | None = None) -> None:
    """Keep half-precision parameters of a module (the named ones; default: all of it, whoever below owns them) in
    ``dtype``; each module that owns or holds some still computes in the dtype it had."""
    halves = {n: p for n, p in module.named_parameters() if p.dtype in HALF and (names is None or n in names)}
    before = {id(p): p.dtype for p in halves.values()}
    with gathered(halves.values(), write=True):
        for p in halves.values():
            p.data = p.data.to(dtype)
    for m in module.modules():
        if any(id(p) in before for p in m.parameters(recurse=False)):
            m.forward = _Narrowed(m, {n: before[id(p)] for n, p in m.named_parameters() if id(p) in before})


def narrow(module: nn.Module) -> None:
    """Undo ``widen``: the parameters are rounded to the dtypes that the module computes in."""
    for m in module.modules():
        wrapper = m.__dict__.get("forward")
        if isinstance(wrapper, _Narrowed):
            for name, dtype in wrapper.dtypes.items():
                p = m.get_parameter(name)
                p.data = p.data.to(dtype)
            del m.forward
