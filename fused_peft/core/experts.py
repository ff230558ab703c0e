"""Modules that hold experts as stacks of weights (E, N, K), and what they compute from a routing.

Transformers' expert modules share one contract, by attributes: ``num_experts``, ``has_gate`` (gate_up_proj and
``_apply_gate``, else up_proj and ``act_fn``), ``has_bias``, ``is_transposed`` (stacks stored (E, K, N)),
``has_post_expert_norm``; forward(x (M, H), top_k_index (M, k), top_k_weights (M, k)) -> (M, H)

    y_i = Σ_j weight_ij · norm( act(x_i W_upᵀ) W_downᵀ )          of expert index_ij
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .groups import Groups, route
from .sharded import is_spread
from .torch_internals import tracing, transforming

_CONTRACT = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate", "config")
# Transformers' own forwards of these modules, which differ in speed alone
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", None)
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stacks(module: nn.Module) -> tuple[str, ...]:
    """The names of the stacks that an expert module multiplies by, in the order of its forward."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module says what it computes by Transformers' contract."""
    return all(hasattr(module, name) for name in _CONTRACT) and all(hasattr(module, n) for n in stacks(module))


def why_not(module: nn.Module) -> str | None:
    """Why the fused call cannot take the place of an expert module's forward, or None."""
    kind = type(module).__name__
    if not is_experts(module):
        return f"{kind} does not say what its forward computes, as Transformers' expert modules do by their attributes"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return f"the experts implementation {implementation!r} is a forward of its own"
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
    """(x (M, H), top_k_index (M, k), top_k_weights (M, k)) of a call; None where it is another one."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) + len(kwargs) != len(names) or given.keys() != set(names):
        return None
    found = tuple(given[name] for name in names)
    return found if all(isinstance(t, Tensor) and t.dim() == 2 for t in found) else None


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
    """What the module computes (M, H), with ``linear(name, x, groups)`` -> (P, N) in place of a stack's product and
    bias. x (M, H), index and weights (M, k)."""
    groups, order = route(index, module.num_experts)
    up, down = stacks(module)
    h = linear(up, x, groups)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    h = linear(down, h, Groups(groups.offs))
    if module.has_post_expert_norm:
        h = module.post_expert_norm(h)
    return combined(h, weights, groups, order).to(x.dtype)


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
