"""The methods as arXiv 2407.05417 writes them, one formula each, in torch's layout; imports nothing of fused_peft.

Every function maps (x, W, b, p, c) to y: x (M, K), W (N, K), b (N,) or None, p the layer's trainable tensors by name,
c its constants (s, the dropout multiplier ``drop`` shaped like x). Plain differentiable torch, meant for fp64.
"""

from __future__ import annotations


def _plus(y, b):
    return y if b is None else y + b


def lora(x, W, b, p, c):
    """y = xWᵀ + s·drop(x)(BA)ᵀ, a bias on B scaled alike."""
    y = _plus(x @ W.T, b) + c["s"] * ((x * c.get("drop", 1.0)) @ (p["lora_B"] @ p["lora_A"]).T)
    return y + c["s"] * p["lora_B_bias"] if "lora_B_bias" in p else y


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


FORMULAS = {f.__name__: f for f in (lora, ia3, ssl, ssb, bitfit)}
