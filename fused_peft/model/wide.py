"""Trainable parameters of half-precision modules, kept in fp32 while the module computes in its own dtype.

An optimizer step on fp16 or bf16 values loses small updates, and GradScaler refuses fp16 gradients. Adapters are fp32
for that reason; so are the heads and biases that train beside them.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import nn
from torch.func import functional_call

from ..core.sharded import gathered

HALF = (torch.float16, torch.bfloat16)

# PyTorch's modules that read parameters of modules below them instead of calling those
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class _Body(nn.Module):
    """The forward that a module had, without its hooks: those run once, around the call."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.replaced = module, module.__dict__.get("forward")

    def forward(self, *args, **kwargs):
        if self.replaced is not None:  # on the instance, as device_map hooks do
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class _Narrowed:
    """In place of a module's forward: the same with some of its parameters cast to the dtype that ``like`` has now."""

    def __init__(self, module: nn.Module, names: list[str], like: nn.Parameter):
        self.body, self.names, self.like = _Body(module), names, like

    def __call__(self, *args, **kwargs):
        dtype = self.like.dtype
        own = ((name, reduce(getattr, name.split("."), self.body.module)) for name in self.names)
        # inside another narrowed module they are narrow already
        narrow = {f"module.{name}": t.to(dtype) for name, t in own if t.dtype != dtype}
        return functional_call(self.body, narrow, args, kwargs)


def widen(module: nn.Module, dtype: torch.dtype, like: nn.Parameter | None, names: list[str] | None = None) -> None:
    """Keep half-precision parameters of a module (the named ones; default: all of it, whoever below owns them) in
    ``dtype``; each module that holds some still computes in the dtype of ``like``, a frozen parameter of the model."""
    if like is None:  # no half precision here
        return
    named = module.named_parameters(remove_duplicate=False)
    chosen = [p for n, p in named if (p.dtype in HALF if names is None else n in names)]
    with gathered(chosen, write=True):
        for p in chosen:
            p.data = p.data.to(dtype)
    wide = {id(p) for p in chosen}
    for m in module.modules():
        held = [n for n, p in m.named_parameters(remove_duplicate=False) if id(p) in wide]
        if any("." not in n for n in held) or (held and isinstance(m, READERS)):
            m.forward = _Narrowed(m, held, like)


def narrow(module: nn.Module) -> None:
    """Undo ``widen``: the parameters are rounded to the dtype that the module computes in."""
    for m in module.modules():
        wrapper = m.__dict__.get("forward")
        if isinstance(wrapper, _Narrowed):
            for name in wrapper.names:
                p = m.get_parameter(name)
                p.data = p.data.to(wrapper.like.dtype)
            del m.forward
            if wrapper.body.replaced is not None:
                m.forward = wrapper.body.replaced
