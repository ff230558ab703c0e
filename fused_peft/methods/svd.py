"""Singular values trained in W = U Σ Vᵀ. SAM-PARSER: U diag(sigma) Vᵀ. SVDiff: U diag(relu(Σ + delta)) Vᵀ.

SAM-PARSER, arXiv 2308.14604; SVDiff, arXiv 2303.11305; reconstruction group of arXiv 2407.05417. k = min(in, out); U
(out, k), S (k,), Vh (k, in) are kept beside W. Factored, a call costs 4Mk(in + out) FLOPs forward and backward; with
the weight formed, 6M·in·out + 4k·in·out. Each call takes the cheaper, a graph for every M the factored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.factors import Factors
from ..core.torch_internals import autocast_is_on
from .base import Init, Method, PeftConfig
from .defaults import LORA_TARGETS


@dataclass(kw_only=True)
class SamParserConfig(PeftConfig):
    """No hyper-parameters: all singular values train."""

    peft_type: ClassVar[str] = "SAM_PARSER"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}


@dataclass(kw_only=True)
class SVDiffConfig(PeftConfig):
    """No hyper-parameters: a shift of all singular values trains."""

    peft_type: ClassVar[str] = "SVDIFF"
    target_defaults: ClassVar[dict[str, Any]] = {"target_modules": LORA_TARGETS}


def finite(W):
    """W in at least fp32; ValueError when an entry is NaN or infinite, since a factorisation would spread it."""
    if not torch.isfinite(W).all():
        raise ValueError("the weight has NaN or infinite entries, so it has no factorisation; repair it first")
    return W.to(torch.promote_types(W.dtype, torch.float32))


def decomposed(W, new, rank=None, niter=None):
    """U (out, k), S (k,), Vh (k, in) of W in at least fp32, S descending; of the ``rank`` largest if given: by
    randomised SVD with niter, else to full accuracy.

    On the meta device uninitialised tensors of those shapes. ValueError when W is not finite.
    """
    k = rank or min(W.shape)
    if W.is_meta:
        return new(W.shape[0], k), new(k), new(k, W.shape[1])
    W = finite(W)
    if niter is not None:
        U, S, V = torch.svd_lowrank(W, rank, niter=niter)
        return U, S, V.T
    few = rank is not None and W.dtype == torch.float32 and WORTH * rank <= min(W.shape) >= 1024
    found = leading(W, rank) if few else None
    if found is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        found = U[:, :k], S[:k], Vh[:k]
    return found


WORTH = 64  # where the rank is more than a 64th of the smaller side, a full decomposition is as fast
RESIDUAL = 1e-5  # of the largest singular value; vectors are then as good as the gaps behind them let fp32 be
DEPTH, SWEEPS = 20, 5  # products with WᵀW a sweep, and sweeps before the full decomposition has to do it


def leading(W, rank):
    """U (out, rank), S, Vh of the largest singular values, to ‖WᵀU − VS‖ ≤ RESIDUAL·S₁; None where that takes too long.

    Block Krylov iteration on WᵀW with full reorthogonalisation, restarted from its best vectors (Golub and Van Loan,
    Matrix Computations, 10.4). The same result every time: the start is drawn from a seed of its own.
    """
    depth = min(DEPTH, min(W.shape) // (4 * (rank + 8)))
    generator = torch.Generator(W.device).manual_seed(0)
    start = torch.randn(W.shape[1], rank + 8, generator=generator, device=W.device, dtype=W.dtype)
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(start).Q
        images = [W @ basis]
        while len(images) < depth:
            block = W.t() @ images[-1]
            for _ in range(2):  # twice is enough
                block -= basis @ (basis.t() @ block)
            block = torch.linalg.qr(block).Q
            basis = torch.cat((basis, block), 1)
            images.append(W @ block)
        Q, R = torch.linalg.qr(torch.cat(images, 1))
        u, S, vh = torch.linalg.svd(R)
        U, S, V = Q @ u[:, :rank], S[:rank], basis @ vh[: rank + 8].t()
        if (W.t() @ U - V[:, :rank] * S).norm(dim=0).max() <= RESIDUAL * S[0]:
            return U, S, V[:, :rank].t()
        start = V
    return None


def _init(param):
    def init(W, bias, config, new):
        U, S, Vh = decomposed(W, new)
        start = S.clone() if param == "sigma" else new(len(S)).zero_()
        return Init({param: start}, {"svd_U": U.to(W.dtype), "svd_S": S, "svd_Vh": Vh.to(W.dtype).contiguous()})

    return init


def _values(layer):
    """The singular values in use, and their change."""
    S = layer.svd_S
    new = layer.sigma if hasattr(layer, "sigma") else torch.relu(S + layer.delta)
    return new, new - S


def factors(layer):
    return Factors(A=layer.svd_Vh, B=layer.svd_U, G=_values(layer)[0])


def weight(layer):
    W, change = layer.matrix, _values(layer)[1]
    U, Vh = (t.to(W.dtype) for t in (layer.svd_U * change, layer.svd_Vh))
    return torch.addmm(W, U, Vh)  # one product in W's dtype, rounded once


def cost(layer, M):
    """(factored, formed) FLOPs of a forward and backward on M rows; in half precision factored is out of the question,
    since three roundings in a row exceed the accuracy that all methods hold."""
    N, K = layer.out_features, layer.in_features
    k, half = min(N, K), layer.kind.dtype(layer.holder()).itemsize == 2 or autocast_is_on()
    return float("inf") if half else 4 * M * k * (N + K), 6 * M * N * K + 4 * k * N * K


SAM_PARSER, SVDIFF = (
    Method(
        name=name,
        group="reconstruct",
        config=config,
        example=lambda r, config=config: config(),
        init=_init(param),
        factors=factors,
        weight=weight,
        cost=cost,
        from_weight=True,
        replaces_weight=True,
    )
    for name, config, param in (("sam_parser", SamParserConfig, "sigma"), ("svdiff", SVDiffConfig, "delta"))
)
