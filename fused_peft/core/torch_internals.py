"""What this library takes from PyTorch beyond its public names, each with what stands in where the name is gone."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

# Whether torch.func's transforms (vmap, grad, jvp) are active, under which a bare autograd.Function must not be called
transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

# Whether torch.jit.trace runs, which would keep an autograd.Function as a call into Python
tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def constant_in_graphs(fn: Callable) -> Callable:
    """torch.compiler.assume_constant_result's mark, without the import of the compiler that it does on the spot."""
    fn._dynamo_marked_constant = True
    return fn


_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """Whether autograd runs a backward: a forward within it is activation checkpointing's, made again."""
    return _graph_task() != -1


# Whether autocast is on for any device; True where it cannot be asked, and the device's own answer counts
autocast_is_on: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

# A view whose autograd keeps nothing of the base, where reshape would make a view that shares its version
unsafe_view: Callable[..., Tensor] = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view)

# Fails once a GPU sees that a tensor is False, without the host waiting; nothing is checked where the name is gone
assert_async: Callable[[Tensor], object] = getattr(torch, "_assert_async", lambda true: None)

try:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
except ImportError:

    def is_traceable_wrapper_subclass(t: object) -> bool:
        """Whether a tensor is of a class that wraps others."""
        return isinstance(t, Tensor) and hasattr(t, "__tensor_flatten__")


# Sees every operation that PyTorch's dispatcher runs, below autograd
TorchDispatchMode: type = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode


def _has(name: str) -> bool:
    """What PyTorch's mkldnn says of this CPU; True where it cannot be asked."""
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return True


# Whether PyTorch multiplies matrices of a half-precision dtype with instructions that this CPU has for it
HALF_PRODUCTS = {
    torch.bfloat16: _has("_is_mkldnn_bf16_supported"),
    torch.float16: _has("_is_mkldnn_fp16_supported"),
}


def function_apply(function: type[torch.autograd.Function]) -> Callable:
    """Function.apply less its handling of torch.func's transforms, which the caller has ruled out: 2 us less a call."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)
