"""The one expression behind every factored method (arXiv 2407.05417, written in torch's layout).

x̂ = x ⊙ d_in
S = h( drop(x̂) Aᵀ + a ) Gᵀ
y = d_out ⊙ ( C + s · S Bᵀ ) + bias          C = x̂ Wᵀ, or a tensor c that is already there
y = d_out ⊙ ( C + s · S Bᵀ + bias )          where scale_bias is set
y = (x̂ − drop(x̂))Wᵀ + d_out ⊙ ( drop(x̂)Wᵀ + s · S Bᵀ ) + bias          where drop_base is set and dropout is on
y = d_out ⊙ ( x̂ (W ⊙ (1 + s · B A))ᵀ ) + bias                           where hadamard is set

merged weight = d_out ⊙ (W + s · B G A) ⊙ d_in       whenever h and a are absent
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": lambda t: t,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


class NotMergeableError(ValueError):
    """The adapter has no equivalent weight, so it cannot be merged."""


@dataclass(slots=True, eq=False)  # not frozen: that triples what making one costs
class Factors:
    """What a method multiplies and adds around one frozen linear map; an absent factor costs nothing.

    Shapes, with K = in_features, N = out_features and r = rank: A (r, K), a (r,), G (r,) or (r, r), B (N, r),
    d_in (K,), d_out (N,), bias (N,). ``bias`` replaces the layer's own bias when it is given. ``s`` is the scaling,
    ``h`` one of identity, relu, gelu, silu, tanh, ``p`` the dropout probability on the input of A, and ``scale_bias``
    says that d_out multiplies the bias too. ``drop_base``: dropout acts on C as well, and what it takes away passes
    unscaled (DoRA as Hugging Face PEFT computes it). ``hadamard``: B A multiplies the weight, entry by entry, where it
    adds to it otherwise (LieRA); dropout, h, a and G have no meaning then and must be absent.
    Floating dtypes may differ from the weight's; the computation runs in the input's dtype.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    G: Tensor | None = None
    a: Tensor | None = None
    d_in: Tensor | None = None
    d_out: Tensor | None = None
    bias: Tensor | None = None
    s: float = 1.0
    h: str = "identity"
    p: float = 0.0
    scale_bias: bool = False
    drop_base: bool = False
    hadamard: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def mergeable(self) -> bool:
        return self.h == "identity" and self.a is None

    def __add__(self, other: Factors) -> Factors:
        """The sum of both updates as one update of rank r₁ + r₂.

        Raises NotMergeableError when either side has a non-linearity, and ValueError when both sides scale, bias
        or drop out differently, since one concatenated product cannot express that.
        """
        if not isinstance(other, Factors):
            return NotImplemented
        for f in (self, other):
            if not f.mergeable or f.drop_base or f.hadamard:
                raise NotMergeableError("Factors with h, a, drop_base or hadamard do not add up to one update")
        shared = {}
        for name in ("d_in", "d_out", "bias"):
            left, right = getattr(self, name), getattr(other, name)
            if left is not None and right is not None and left is not right:
                raise ValueError(f"Factors to be added both have {name}; at most one may, or both the same tensor")
            shared[name] = right if left is None else left
        shared["scale_bias"] = self.scale_bias or other.scale_bias
        if self.A is None or other.A is None:
            return replace(other if self.A is None else self, **shared)
        if self.p != other.p:
            raise ValueError(f"Factors to be added must share the dropout probability, got {self.p} and {other.p}")
        A, B = torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1)
        if self.s == other.s and self.G is None and other.G is None:
            return Factors(A=A, B=B, s=self.s, p=self.p, **shared)
        gates = [_gate(f) for f in (self, other)]
        if any(g.dim() == 2 for g in gates):
            G = torch.block_diag(*(g if g.dim() == 2 else torch.diag(g) for g in gates))
        else:
            G = torch.cat(gates)
        return Factors(A=A, B=B, G=G, p=self.p, **shared)

    def low_rank(self) -> Tensor | None:
        """s · B G A, shape (N, K), or None when there is no low-rank term."""
        if self.A is None:
            return None
        BG = self.B if self.G is None else self.B * self.G if self.G.dim() == 1 else self.B @ self.G
        return self.s * (BG @ self.A)

    def product(self) -> tuple[Tensor, Tensor]:
        """A (r, K) and s · B G (N, r) of the low-rank term, without the parts of it that are exactly zero."""
        BG = self.B if self.G is None else self.B * self.G if self.G.dim() == 1 else self.B @ self.G
        acts = (self.A != 0).any(1) & (BG != 0).any(0)
        return self.A[acts], self.s * BG[:, acts]

    def beyond_product(self) -> str | None:
        """What it does to inputs, outside training, besides adding a low-rank product to the weight; None: nothing."""
        scaled = (("input", self.d_in), ("output", self.d_out))
        found = [f"a scale of the layer's {what}" for what, t in scaled if t is not None]
        if self.h != "identity":
            found.append(f"a non-linearity ({self.h}) between its factors")
        if self.a is not None:
            found.append("a bias between its factors")
        if self.hadamard:
            found.append("a product that multiplies the weight entry by entry")
        if self.bias is not None:
            found.append("a bias of the layer")
        return " and ".join(found) or None

    def merged(self, weight: Tensor) -> Tensor:
        """d_out ⊙ (W + s·B G A) ⊙ d_in, shape (N, K), in the widest dtype among W and the factors.

        Raises NotMergeableError when the method has a non-linearity.
        """
        if not self.mergeable:
            raise NotMergeableError(
                f"h={self.h!r}{'' if self.a is None else ' with a bias a'} lies between A and B, so no weight equals "
                "this adapter; keep the layer unmerged"
            )
        delta = self.low_rank()
        out = weight if delta is None else torch.addcmul(weight, weight, delta) if self.hadamard else weight + delta
        if self.d_in is not None:
            out = out * self.d_in
        if self.d_out is not None:
            out = self.d_out[:, None] * out
        return out

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias (N,) of the merged layer, or None, given the layer's own."""
        bias = bias if self.bias is None else self.bias
        return self.d_out * bias if self.scale_bias and self.d_out is not None and bias is not None else bias

    def expression(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None = None,
        c: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The expression written out in plain differentiable PyTorch: the oracle behind ``verify``, not a fast path.

        ``keep`` is the boolean dropout mask, shaped like x; it is used when ``p`` > 0.
        """
        if self.hadamard:
            weight = torch.addcmul(weight, weight, self.low_rank())
            return replace(self, A=None, hadamard=False).expression(x, weight, bias, c)
        xh = x if self.d_in is None else x * self.d_in
        dropped = xh if keep is None or not self.p else xh * keep / (1 - self.p)
        past = None
        if c is not None:
            out = c
        elif weight is None:
            out = x.new_zeros(())
        elif self.drop_base and dropped is not xh:
            out, past = dropped @ weight.T, (xh - dropped) @ weight.T
        else:
            out = xh @ weight.T
        if self.A is not None:
            S = dropped @ self.A.T
            S = ACTIVATIONS[self.h](S if self.a is None else S + self.a)
            if self.G is not None:
                S = S * self.G if self.G.dim() == 1 else S @ self.G.T
            out = out + self.s * (S @ self.B.T)
        bias = bias if self.bias is None else self.bias
        if bias is not None and (self.d_out is None or self.scale_bias):
            out, bias = out + bias, None
        if self.d_out is not None:
            out = out * self.d_out
        for extra in (bias, past):
            out = out if extra is None else out + extra
        return out

    def stacked(self, groups: int) -> Factors:
        """For groups that share some of the tensors: every tensor (groups, ...), those shared without a copy."""
        shared = {n: t for n in ("A", "B") if (t := getattr(self, n)) is not None and t.dim() == 2}
        shared |= {n: t for n in ("a", "d_in", "d_out", "bias") if (t := getattr(self, n)) is not None and t.dim() == 1}
        return replace(self, **{n: t.expand(groups, *t.shape) for n, t in shared.items()}) if shared else self

    def at(self, e: int) -> Factors:
        """Of stacked factors, every tensor (E, ...), those of group e."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Factors(**{k: v[e] if isinstance(v, Tensor) else v for k, v in parts.items()})

    def to(self, dtype: torch.dtype) -> Factors:
        """A copy with every tensor cast to ``dtype``."""
        cast = {f.name: getattr(self, f.name) for f in fields(self)}
        return Factors(**{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in cast.items()})


def _gate(f: Factors) -> Tensor:
    """s·G of one summand, so that the sum has s = 1."""
    return f.A.new_full((f.rank,), f.s) if f.G is None else f.s * f.G
