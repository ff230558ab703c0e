"""Trainable parameters of half-precision modules, kept in fp32 while the module computes in its own dtype.

An optimizer step on fp16 or bf16 values loses small updates, and GradScaler refuses fp16 gradients. Adapters are fp32
for that reason; so are the heads and biases that train beside them.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
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


def _called_with(module: nn.Module, tensors: dict[str, Tensor], args: tuple, kwargs: dict):
    """``functional_call``, by plain assignments."""
    held = [(module.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in tensors]
    before = [parameters[key] for parameters, key in held]
    try:
        for (parameters, key), t in zip(held, tensors.values(), strict=True):
            parameters[key] = t
        return module(*args, **kwargs)
    finally:
        for (parameters, key), t in zip(held, before, strict=True):
            parameters[key] = t


class _Narrowed:
    """In place of a module's forward: the same with some of its parameters cast to the dtype that ``like`` has now."""

    def __init__(self, module: nn.Module, names: list[str], like: nn.Parameter):
        self.body, self.names, self.like = _Body(module), names, like

    def __call__(self, *args, **kwargs):
        dtype = self.like.dtype
        own = {name: reduce(getattr, name.split("."), self.body.module) for name in self.names}
        # inside another narrowed module they are narrow already
        narrow = {name: t for name, t in own.items() if t.dtype != dtype}
        if type(self.body.module).forward is nn.Linear.forward and "weight" in narrow:
            # the caller may have made x as wide as the weight that it sees (T5's feed-forward layers do)
            x, wide = args[0], narrow["weight"].dtype
            if x.dtype == wide and not torch.is_autocast_enabled(x.device.type):
                args = (x.to(dtype),)
        narrow = {f"module.{name}": t.to(dtype) for name, t in narrow.items()}
        if torch.jit.is_tracing():  # where functional_call refuses
            return _called_with(self.body, narrow, args, kwargs)
        return functional_call(self.body, narrow, args, kwargs)

    def replica(self) -> nn.Module:
        """nn.DataParallel's copy of the module for another GPU, which computes from the tensors that it gets there."""
        module = self.body.module
        copied = type(module)._replicate_for_data_parallel(module)
        copied.forward = _Narrowed(copied, self.names, self.like)
        copied.forward.body.replaced = self.body.replaced
        return copied


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
            m._replicate_for_data_parallel = m.forward.replica


def narrowed(module: nn.Module) -> dict[str, torch.dtype]:
    """{parameter: the dtype that it had and computes in} of everything that ``widen`` made wider."""
    wrappers = ((name, m.__dict__.get("forward")) for name, m in module.named_modules())
    return {
        f"{name}.{below}" if name else below: wrapper.like.dtype
        for name, wrapper in wrappers
        if isinstance(wrapper, _Narrowed)
        for below in wrapper.names
    }


def narrow(module: nn.Module) -> None:
    """Undo ``widen``: the parameters are rounded to the dtype that the module computes in."""
    for m in module.modules():
        wrapper = m.__dict__.get("forward")
        if isinstance(wrapper, _Narrowed):
            for name in wrapper.names:
                p = m.get_parameter(name)
                p.data = p.data.to(wrapper.like.dtype)
            del m.forward
            m.__dict__.pop("_replicate_for_data_parallel", None)  # pickles of older versions have none
            if wrapper.body.replaced is not None:
                m.forward = wrapper.body.replaced
