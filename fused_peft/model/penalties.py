"""Penalties on the factors of a model: MPC_o and MPC_d of arXiv 2407.05417, and AdaLoRA's orthogonality term.

MPC_o: ‖A Aᵀ − I‖² + ‖Bᵀ B − I‖².   MPC_d: ‖A Aᵀ − I‖² + ‖Bᵀ B − diag(Bᵀ B)‖².   summed over layers
MPC_n is a config field: ``nonlinearity``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from ..core.ops import squared_residual
from ..core.sharded import is_partitioned, whole
from .adapted import active_layers


def _stacks(model: nn.Module, kind: str) -> list[tuple[Tensor, bool]]:
    """[(P stacked over equal shapes, own diagonal)]: A's of one shape share a stack, and so do B's."""
    groups = defaultdict(list)
    for name, layer in active_layers(model):
        A, B = (getattr(layer, name or "", None) for name in (layer.method.A, layer.method.B))
        beside = A is not None and B is not None and layer.method.output is None
        if not beside or not (A.requires_grad or B.requires_grad):
            raise ValueError(
                f"kind={kind!r}: MPC needs factors A and B, but {layer.method.name} (on {name}) trains none"
            )
        if is_partitioned(A):
            raise ValueError(
                f"model={type(model).__name__} is partitioned by DeepSpeed ZeRO-3, which gathers no factor for a "
                "penalty with its gradient; train with ZeRO-2, or without the penalty"
            )
        for P, is_b in ((whole(A), False), (whole(B), True)):
            groups[P.shape[-2:], P.dtype, P.device, is_b].extend(P if P.dim() == 3 else [P])
    if not groups:
        raise ValueError(f"model={type(model).__name__} has no adapted layer; call get_peft_model first")
    stacks = [(torch.stack(found), is_b) for (*_, is_b), found in groups.items()]
    return [(P.mT, kind == "d") if is_b else (P, False) for P, is_b in stacks]


def mpc_penalty(model: nn.Module, kind: str = "o") -> Tensor:
    """The matrix-preserving constraint summed over layers: a scalar to add to the loss, differentiable once.

    kind: "o" (A and B orthonormal) or "d" (A orthonormal, B orthogonal). One batched product a distinct shape,
    forward and backward, however many layers; sharded factors are gathered first. Raises ValueError for another
    kind, and for a model with a method without A and B.
    """
    if kind not in ("o", "d"):
        hint = "; MPC_n is the config field nonlinearity" if kind == "n" else ""
        raise ValueError(f"kind={kind!r} must be 'o' or 'd'{hint}")
    return sum(squared_residual(P, own).sum() for P, own in _stacks(model, kind))


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """AdaLoRA's term, as Hugging Face PEFT adds it to the loss: orth_reg_weight times the mean over all A and B of ‖A
    Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius, not squared). Raises ValueError for a model without AdaLoRA layers.
    """
    found = (layer for _, layer in active_layers(model) if layer.method.name == "adalora")
    weight = next((layer.config.orth_reg_weight for layer in found), None)
    if weight is None:
        raise ValueError(f"model={type(model).__name__} has no AdaLoRA layer; the penalty belongs to AdaLoraConfig")
    stacks = _stacks(model, "o")  # the clamp: at an exactly orthonormal factor the slope of sqrt is infinite
    norms = torch.cat([squared_residual(P, own).clamp_min(torch.finfo(P.dtype).tiny).sqrt() for P, own in stacks])
    return weight * norms.mean()
