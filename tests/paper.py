"""The methods as arXiv 2407.05417 writes them, one formula each, in torch's layout; imports nothing of fused_peft.

Every function maps (x, W, b, p, c) to y: x (M, K), W (N, K) the original weight, b (N,) or None, p the layer's
trainable tensors by name, c its constants: s, the non-linearity ``h``, the dropout multiplier ``drop`` shaped like x,
and whatever else the formula names. Plain differentiable torch, meant for fp64.
"""

from __future__ import annotations

import torch


def _plus(y, b):
    return y if b is None else y + b


def _low_rank(x, W, b, c, right, left, between=lambda t: t):
    """xWᵀ + b + s · between(h(drop(x) rightᵀ)) leftᵀ."""
    hidden = c.get("h", lambda t: t)((x * c.get("drop", 1.0)) @ right.T)
    return _plus(x @ W.T, b) + c["s"] * (between(hidden) @ left.T)


def lora(x, W, b, p, c):
    """y = xWᵀ + s·drop(x)(BA)ᵀ, a bias on B scaled alike."""
    y = _low_rank(x, W, b, c, p["lora_A"], p["lora_B"])
    return y + c["s"] * p["lora_B_bias"] if "lora_B_bias" in p else y


def _on_residual(x, W, b, p, c, U, S, Vh):
    """φ(W) = (W − UΣVᵀ) + s·BA with the triplets that A, B started from taken out."""
    return _low_rank(x, W - U @ torch.diag(S) @ Vh, b, c, p["lora_A"], p["lora_B"])


def pissa(x, W, b, p, c):
    """The r largest singular triplets."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["lora_A"].shape[0]
    return _on_residual(x, W, b, p, c, U[:, :r], S[:r], Vh[:r])


def milora(x, W, b, p, c):
    """The r smallest singular triplets."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["lora_A"].shape[0]
    return _on_residual(x, W, b, p, c, U[:, -r:], S[-r:], Vh[-r:])


def olora(x, W, b, p, c):
    """W = QR: s times the product of Q's first r columns and R's first r rows."""
    Q, R = torch.linalg.qr(W)
    r = p["lora_A"].shape[0]
    return _on_residual(x, W, b, p, c, Q[:, :r], torch.full((r,), c["s"], dtype=W.dtype), R[:r])


def ia3(x, W, b, p, c):
    """y = l ⊙ (xWᵀ + b), or (l ⊙ x)Wᵀ + b on a feed-forward layer."""
    l = p["ia3_l"]
    if c.get("feedforward"):
        return _plus((l * x) @ W.T, b)
    if c.get("scale_bias", True):
        return _plus(x @ W.T, b) * l
    return _plus((x @ W.T) * l, b)


def ssl(x, W, b, p, c):
    """φ(W) = W diag(d_in)."""
    return _plus(x @ (W * p["d_in"][None, :]).T, b)


def ssb(x, W, b, p, c):
    """φ(W) = diag(d_out) W diag(d_in), the bias outside."""
    return _plus(x @ (p["d_out"][:, None] * W * p["d_in"][None, :]).T, b)


def bitfit(x, W, b, p, c):
    """W stays, the bias trains."""
    return x @ W.T + p["bitfit_bias"]


def sam_parser(x, W, b, p, c):
    """φ(W) = U diag(σ) Vᵀ with U, V of W = UΣVᵀ."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return _plus(x @ (U @ torch.diag(p["sigma"]) @ Vh).T, b)


def svdiff(x, W, b, p, c):
    """φ(W) = U diag(relu(Σ + δ)) Vᵀ."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _plus(x @ (U @ torch.diag(torch.relu(S + p["delta"])) @ Vh).T, b)


def diff_pruning(x, W, b, p, c):
    """φ(W) = W + mask ⊙ values, the mask on W's largest entries."""
    chosen = torch.topk(W.abs().flatten(), len(p["values"])).indices.sort().values
    spread = torch.zeros(W.numel(), dtype=W.dtype).index_put((chosen,), p["values"]).view(W.shape)
    return _plus(x @ (W + spread).T, b)


def adalora(x, W, b, p, c):
    """φ(W) = W + s·B diag(E) A."""
    return _low_rank(x, W, b, c, p["lora_A"], p["lora_B"], lambda t: t * p["lora_E"])


trilora = adalora


def kasa(x, W, b, p, c):
    """φ(W) = W + s·B diag(ΔΣ) A."""
    return _low_rank(x, W, b, c, p["lora_A"], p["lora_B"] @ torch.diag(p["lora_diag"]))


def flora(x, W, b, p, c):
    """φ(W) = W + s·B M A."""
    return _low_rank(x, W, b, c, p["lora_A"], p["lora_B"], lambda t: t @ p["lora_M"].T)


moslora = flora


def liera(x, W, b, p, c):
    """φ(W) = W ⊙ (1 + s·BA)."""
    return _plus(x @ (W * (1 + c["s"] * p["lora_B"] @ p["lora_A"])).T, b)


def parallel_adapter(x, W, b, p, c):
    """y = xWᵀ + b + s·scale·h(drop(x)Aᵀ + a)Bᵀ + c."""
    hidden = (x * c.get("drop", 1.0)) @ p["lora_A"].T + p.get("down_bias", 0.0)
    update = c["s"] * p.get("scale", 1.0) * (c["h"](hidden) @ p["lora_B"].T)
    return _plus(x @ W.T, b) + update + p.get("up_bias", 0.0)


def houlsby(x, W, b, p, c):
    """y = z + s·h(zAᵀ + a)Bᵀ + c on the block's output z."""
    z = _plus(x @ W.T, b)
    return z + c["s"] * (c["h"](z @ p["down"].T + p.get("down_bias", 0.0)) @ p["up"].T) + p.get("up_bias", 0.0)


pfeiffer = houlsby


def dora(x, W, b, p, c):
    """φ(W) = diag(m / ‖W + sBA‖) (W + s·BA), the norm a constant; PEFT's two terms under dropout."""
    A, B, s = p["lora_A"], p["lora_B"], c["s"]
    norm = torch.linalg.norm(W + s * B @ A, dim=1).detach()
    g, dropped = p["magnitude"] / norm, x * c.get("drop", 1.0)
    return _plus(x @ W.T, b) + (g - 1) * (dropped @ W.T) + g * s * (dropped @ A.T @ B.T)


def spectral_adapter(x, W, b, p, c):
    """φ(W) = W + s·(AΣᵣB + UᵣΣᵣB + AΣᵣVᵣᵀ); under dropout the update reads drop(x)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B, r = p["lora_A"], p["lora_B"], p["lora_B"].shape[0]
    U, S, Vh = U[:, :r], torch.diag(S[:r]), Vh[:r]
    update = A @ S @ B + U @ S @ B + A @ S @ Vh
    return _plus(x @ W.T, b) + c["s"] * ((x * c.get("drop", 1.0)) @ update.T)


def lora_dash(x, W, b, p, c):
    """φ(W) = W + s·BA + Σᵢ dashᵢ uᵢvᵢᵀ over the chosen directions (none before the warm-up)."""
    return _low_rank(x, W + c["U"] @ torch.diag(p["dash"]) @ c["Vh"], b, c, p["lora_A"], p["lora_B"])


def lora_xs(x, W, b, p, c):
    """φ(W) = W + s·UᵣΣᵣ R Vᵣᵀ."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["lora_R"].shape[0]
    return _plus(x @ (W + c["s"] * U[:, :r] @ torch.diag(S[:r]) @ p["lora_R"] @ Vh[:r]).T, b)


def vera(x, W, b, p, c):
    """φ(W) = W + diag(λ_b) B diag(λ_d) A, A and B frozen."""
    update = p["vera_lambda_b"][:, None] * (c["B0"] @ torch.diag(p["vera_lambda_d"]) @ c["A0"])
    return _plus(x @ W.T, b) + (x * c.get("drop", 1.0)) @ update.T


def delora(x, W, b, p, c):
    """φ(W) = W + (λ/r) Σᵢ Bᵢ Aᵢ / (‖Bᵢ‖ ‖Aᵢ‖) diag(column norms of W), norms at least 1e-4."""
    A, B = p["delora_A"], p["delora_B"]
    xi = p["delora_lambda"] / A.shape[0] / (A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4))
    update = B @ torch.diag(xi) @ A * W.norm(dim=0)[None, :]
    return _plus(x @ W.T, b) + (x * c.get("drop", 1.0)) @ update.T


FORMULAS = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and not name.startswith("_") and function.__module__ == __name__
}
