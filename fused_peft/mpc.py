"""Penalties on the factors of a model: MPC_o and MPC_d of arXiv 2407.05417, and AdaLoRA's orthogonality term.

MPC_o: ‖A Aᵀ − I‖² + ‖Bᵀ B − I‖².   MPC_d: ‖A Aᵀ − I‖² + ‖Bᵀ B − diag(Bᵀ B)‖².   summed over layers
MPC_n is a config field: ``nonlinearity``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from .convert import layers
from .ops import squared_residual


def _stacks(model: nn.Module, kind: str) -> list[tuple[Tensor, bool]]:
    """[(P stacked over equal shapes, own diagonal)]: A's and Bᵀ's of one shape and target share a stack."""
    groups = defaultdict(list)
    for name, layer in layers(model):
        A, B = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if A is None or B is None or not (A.requires_grad or B.requires_grad):
            raise ValueError(
                f"kind={kind!r}: MPC needs factors A and B, but {layer.method.name} (on {name}) trains none"
            )
        for P, own in ((A, False), (B.t(), kind == "d")):
            groups[P.shape, P.dtype, P.device, own].append(P)
    if not groups:
        raise ValueError(f"model={type(model).__name__} has no adapted layer; call get_peft_model first")
    return [(torch.stack(found), own) for (*_, own), found in groups.items()]


def mpc_penalty(model: nn.Module, kind: str = "o") -> Tensor:
    """The matrix-preserving constraint summed over layers: a scalar to add to the loss, differentiable once.

    kind: "o" (A and B orthonormal) or "d" (A orthonormal, B orthogonal). One batched product a distinct shape,
    forward and backward, however many layers. Raises ValueError for another kind, and for a model with a method
    without A and B.
    """
    if kind not in ("o", "d"):
        hint = "; MPC_n is the config field nonlinearity" if kind == "n" else ""
        raise ValueError(f"kind={kind!r} must be 'o' or 'd'{hint}")
    return sum(squared_residual(P, own).sum() for P, own in _stacks(model, kind))


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """AdaLoRA's term, as Hugging Face PEFT adds it to the loss: orth_reg_weight times the mean over all A and B of ‖A
    Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius, not squared). Raises ValueError for a model without AdaLoRA layers.
    """
    weight = next((layer.config.orth_reg_weight for _, layer in layers(model) if layer.method.name == "adalora"), None)
    if weight is None:
        raise ValueError(f"model={type(model).__name__} has no AdaLoRA layer; the penalty belongs to AdaLoraConfig")
    norms = torch.cat([squared_residual(P, own).sqrt() for P, own in _stacks(model, "o")])
    return weight * norms.mean()
