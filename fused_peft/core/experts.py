"""Modules that hold experts as stacks of weights (E, N, K), and what they compute from a routing.

Transformers' expert modules share one contract, by attributes: ``num_experts``, ``has_gate`` (gate_up_proj and
``_apply_gate``, else up_proj and ``act_fn``), ``has_bias``, ``is_transposed`` (stacks stored (E, K, N)),
``has_post_expert_norm``; forward(x (M, H), top_k_index (M, k), top_k_weights (M, k)) -> (M, H)

    y_i = Σ_j weight_ij · norm( act(x_i W_upᵀ) W_downᵀ )          of expert index_ij
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .groups import Groups, route
from .sharded import is_spread
from .torch_internals import constant_in_graphs, tracing, transforming

_CONTRACT = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate", "config")
# Transformers' own forwards of these modules, which differ in speed alone
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", None)
_STOCK = {"grouped_mm": "grouped_mm_experts_forward", "batched_mm": "batched_mm_experts_forward"}
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stacks(module: nn.Module) -> tuple[str, ...]:
    """The names of the stacks that an expert module multiplies by, in the order of its forward."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module says what it computes by Transformers' contract."""
    return all(hasattr(module, name) for name in _CONTRACT) and all(hasattr(module, n) for n in stacks(module))


def _moe():
    """Transformers' module of experts; it is there where a module follows the contract."""
    return sys.modules.get("transformers.integrations.moe")


@functools.cache
def _chosen_forward() -> CodeType | None:
    """The forward that Transformers' decorator of experts gives a class."""
    make = getattr(_moe(), "use_experts_implementation", None)
    return None if make is None else make(type("_", (nn.Module,), {"forward": lambda self: None})).forward.__code__


@constant_in_graphs
def class_unread(kind: type) -> str | None:
    """Why a class of experts does not follow Transformers' contract to the letter, or None."""
    owner = next(c for c in kind.__mro__ if "forward" in vars(c))
    forward = vars(owner)["forward"]
    if _moe() is None or not inspect.isfunction(forward) or forward.__code__ is not _chosen_forward():
        return f"the forward of {kind.__name__} is not one that Transformers chooses by the experts implementation"
    around = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    if around["experts_interface"].cell_contents is not _moe().ALL_EXPERTS_FUNCTIONS:
        return f"{kind.__name__} has experts implementations of its own"
    if getattr(kind, "_apply_gate", None) is not getattr(owner, "_apply_gate", None):
        return f"{kind.__name__} replaces the gate of {owner.__name__}"
    return None


def why_not(module: nn.Module, kind: type | None = None) -> str | None:
    """Why the fused call cannot take the place of an expert module's forward, that of a class (the module's own where
    none is given), or None."""
    own = kind or type(module)
    kind = own.__name__
    if not is_experts(module):
        return f"{kind} does not say what its forward computes, as Transformers' expert modules do by their attributes"
    if reason := class_unread(own):
        return reason
    if "parametrizations" in module._modules:
        return "the weights of its experts are parametrized"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return f"the experts implementation {implementation!r} is a forward of its own"
    if (known := _STOCK.get(implementation)) and _moe().ALL_EXPERTS_FUNCTIONS.get(implementation) is not getattr(
        _moe(), known, None
    ):
        return f"the experts implementation {implementation!r} was replaced by a forward of its own"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several processes (expert parallelism)"
    for name in stacks(module):
        W = getattr(module, name)
        if is_spread(W):
            return f"{kind}.{name} is sharded over several processes"
        if W.dim() != 3 or W.shape[0] != module.num_experts:
            return f"{kind}.{name} has shape {tuple(W.shape)}, which is no stack of {module.num_experts} experts"
        if W.dtype not in _COMPUTED:
            return f"{kind}.{name} has dtype {W.dtype}, and experts in a quantised format are not read"
    return None


def experts_per_token(module: nn.Module) -> int:
    """How many experts a row is routed to, as the model's config has it; 1 where it does not say."""
    names = ("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk")
    found = (getattr(module.config, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), 1)


def arguments(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor] | None:
    """(x (..., H), top_k_index (..., k), top_k_weights (..., k)) of a call; None where it says anything else."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys() or {*given, *kwargs} != set(names):
        return None
    x, index, weights = call = tuple({**given, **kwargs}[name] for name in names)
    if not all(isinstance(t, Tensor) for t in call) or x.dim() < 2 or index.dim() < 2 or index.shape != weights.shape:
        return None
    return call if x.shape[:-1].numel() == index.shape[:-1].numel() else None


def matrices(module: nn.Module, W: Tensor) -> Tensor:
    """A stack as (E, N, K), however the module stores it."""
    return W.mT if module.is_transposed else W


def forward(
    module: nn.Module,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    linear: Callable[[str, Tensor, Groups], Tensor],
) -> Tensor:
    """What the module computes (..., H), with ``linear(name, x, groups)`` -> (P, N) in place of a stack's product and
    bias. x (..., H), index and weights (..., k)."""
    shape, k = x.shape, index.shape[-1]
    if x.dim() != 2 or index.dim() != 2:
        x, index, weights = x.reshape(-1, shape[-1]), index.reshape(-1, k), weights.reshape(-1, k)
    groups, order = route(index, module.num_experts)
    up, down = stacks(module)
    h = linear(up, x, groups)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    h = linear(down, h, Groups(groups.offs))
    if module.has_post_expert_norm:
        h = module.post_expert_norm(h)
    y = combined(h, weights, groups, order).to(x.dtype)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


def combined(h: Tensor, weights: Tensor, groups: Groups, order: Tensor) -> Tensor:
    """Each row's weighted sum (M, H) of its places in h (P, H); weights (M, k)."""
    if is_compiling() or transforming() or tracing():
        M, k = weights.shape
        return (h[groups.back.view(-1)].view(M, k, -1) * weights[:, :, None]).sum(1)
    return _Combined.apply(h, weights, groups.rows, groups.back, order)


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weights, rows, back, order):
        M, k = weights.shape
        parts = h.index_select(0, back.view(-1)).view(M, k, h.shape[1])
        dt = torch.promote_types(h.dtype, weights.dtype)
        parts = parts.mul_(weights[:, :, None]) if parts.dtype == dt else parts * weights[:, :, None]
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weights, rows, back, order)
        return parts.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weights, rows, back, order = ctx.saved_tensors
        each = dy.index_select(0, rows)
        dw = None
        if h is not None:
            wide = torch.promote_types(each.dtype, torch.float32)
            dw = torch.linalg.vecdot(each.to(wide), h.to(wide))[back].to(weights.dtype)
        each *= weights.reshape(-1)[order].to(each.dtype)[:, None]
        return each, dw, None, None, None
