"""PEFT's VeRA, DeLoRA, HiRA, MiSS and GraLoRA layers on the fused call; each says what its adapters are as ``Factors``.

VeRA      A, B random and shared: the layer's corner of them     G = d     B = diag(b) B
DeLoRA    A diag(w), w the column norms of W at the start        G = (λ/r) / (‖Aᵢ‖ ‖Bᵢ‖)
HiRA      W ⊙ (1 + B A), the sum over the active adapters within the brackets
MiSS      A sums the inputs k, k + r, k + 2r, ...: ones and zeros, which do not train
GraLoRA   k x k blocks of rank r/k: A block by block on the diagonal, and B where input and output block meet
"""

from __future__ import annotations

import torch
from peft.tuners import delora, gralora, hira, miss, vera
from torch import Tensor, nn

from ..core.factors import Factors
from ..core.frozen import Frozen, Stored
from .peft_layers import FUSED, Fused, OnPacked, called, replaceable


class _LikeX(Fused):
    """A layer whose y has the dtype of x, where LoRA's has that of the base's product."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(x, *args, **kwargs).to(x.dtype)

    def _keeps_less(self, name: str, t: Tensor) -> bool:
        """Whether PEFT's call has neither a mask nor an x in another dtype to keep."""
        return not self._dropped(name) and t.dtype == getattr(getattr(self.base_layer, "weight", None), "dtype", None)


WIDE = 32  # the rank above which VeRA's dB, a product that PEFT does without, costs a CPU more than PEFT's passes


class FusedVera(OnPacked, _LikeX, vera.layer.Linear):
    dropouts = "vera_dropout"

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        for name in used:
            if self.r[name] > WIDE and self.vera_lambda_b[name].is_cpu:
                return f"adapter {name!r} is VeRA of rank {self.r[name]}, on a CPU faster in PEFT's way above {WIDE}"
        return super()._adapters_unfused(used, kind)

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        return [self._one(name) for name in used]

    def _one(self, name: str) -> Factors:
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        A, B = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        return Factors(A=A.to(d.device), B=B.to(d.device) * b[:, None], G=d, p=self._dropped(name))


class FusedDelora(_LikeX, delora.layer.DeloraLinear):
    dropouts = "delora_dropout"

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        return [self._one(name) for name in used]

    def _one(self, name: str) -> Factors:
        A, B = self.delora_A[name], self.delora_B[name]
        norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
        G = self.delora_lambda[name] / self.r[name] / norms
        return Factors(A=A * self.delora_w_norm[name], B=B, G=G, p=self._dropped(name))


class FusedHira(Fused):
    dropouts = "hira_dropout"

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        if used and not replaceable(kind, self.base_layer):
            return f"HiRA multiplies the weight, and {type(self.base_layer).__name__} computes by itself"
        for name in used:
            if self._dropped(name):
                return f"adapter {name!r} is HiRA with dropout, which multiplies by the weight once more"
        return super()._adapters_unfused(used, kind)

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        A, B = [self.hira_A[name] for name in used], [self.hira_B[name] for name in used]
        if len(used) < 2:
            return [Factors(A=A[0], B=B[0], hadamard=True)] if used else []
        return [Factors(A=torch.cat(A), B=torch.cat(B, dim=1), hadamard=True)]


class FusedHiraLinear(FusedHira, hira.layer.Linear):
    """On a plain linear layer."""


class FusedMiss(OnPacked, _LikeX, miss.layer.MissLinear):
    dropouts = "miss_dropout"

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        if self.miss_fn == "bat" and used:
            return "MiSS with init_weights='bat' multiplies blocks of the weight"
        for name in used:
            if self._keeps_less(name, self.miss_block[name]):
                return f"adapter {name!r} is MiSS without dropout in the weight's dtype, of which PEFT keeps less"
        return super()._adapters_unfused(used, kind)

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        return [self._one(name) for name in used]

    def _one(self, name: str) -> Factors:
        B = self.miss_block[name]
        A = _sums(B.shape[0], self.in_features, B.dtype, B.device)
        if self.miss_fn == "mini":
            B = B.repeat(1, self.out_features // self.miss_mini_r[name])
        return Factors(A=A, B=B.t(), p=self._dropped(name))


_SUMS: dict[tuple, Tensor] = {}  # one for all layers of a width


def _sums(r: int, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (r, K): 1 where k mod r is the row."""
    if torch.compiler.is_compiling():
        return _made_sums(r, K, dtype, device)
    if (A := _SUMS.get((r, K, dtype, device))) is None:
        with torch.inference_mode(False):  # kept: a call that trains saves it
            A = _made_sums(r, K, dtype, device)
        if type(A) is Tensor:  # no stand-in of a trace
            _SUMS[r, K, dtype, device] = A
    return A


def _made_sums(r: int, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(K, device=device) % r == torch.arange(r, device=device)[:, None]).to(dtype)


class FusedGralora(_LikeX, gralora.layer.Linear):
    dropouts = "gralora_dropout"

    def _adapters_unfused(self, used: list[str], kind: Frozen) -> str | None:
        for name in used:
            k, r = self.gralora_k[name], self.r[name]
            if r % k:
                return f"r={r} of adapter {name!r} is no multiple of gralora_k={k}"
            if k > 2:
                return f"adapter {name!r} is GraLoRA of {k} x {k} blocks, which as one product cost {k} times PEFT's"
            if self._keeps_less(name, self.gralora_A[name]):
                return f"adapter {name!r} is GraLoRA without dropout in the weight's dtype, of which PEFT keeps less"
            for part in (self.gralora_A_general[name], self.gralora_B_general[name]):
                if reason := called(part, (nn.Linear, nn.Identity), "hybrid A or B"):
                    return reason
        return super()._adapters_unfused(used, kind)

    def fused_factors(self, used: list[str], weight: Tensor | Stored | None, bias: Tensor | None) -> list[Factors]:
        found = []
        for name in used:
            s, p = self.scaling[name], self._dropped(name)
            found.append(Factors(*_by_blocks(self.gralora_A[name], self.gralora_B[name]), s=s, p=p))
            if self.hybrid_r[name]:  # which draws a mask of its own
                A, B = self.gralora_A_general[name].weight, self.gralora_B_general[name].weight
                found.append(Factors(A=A, B=B, s=s, p=p))
        return found


def _by_blocks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(k·r, K) and (N, k·r), zeros between the blocks, of A (k, K/k, r) and B (k, r, N/k): the n-th input block's r
    sums go to the k output blocks, r/k to each."""
    k, own, r = A.shape
    full_A = torch.diag_embed(A.permute(2, 1, 0)).permute(3, 0, 2, 1).reshape(k * r, k * own)
    parts = B.view(k, k, r // k, B.shape[2]).permute(3, 1, 2, 0)  # of output block j: (o, n, t, j)
    return full_A, torch.diag_embed(parts).permute(3, 0, 1, 4, 2).reshape(k * B.shape[2], k * r)


FUSED.update(
    {
        vera.layer.Linear: FusedVera,
        delora.layer.DeloraLinear: FusedDelora,
        hira.layer.Linear: FusedHiraLinear,
        miss.layer.MissLinear: FusedMiss,
        gralora.layer.Linear: FusedGralora,
    }
)
