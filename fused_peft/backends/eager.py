"""The definition, in plain PyTorch on any device; other backends must equal it.

    forward   x̂ = x⊙d_in;  T = drop(x̂)Aᵀ + a;  S = h(T)Gᵀ;  z = C + s·S Bᵀ;  y = d_out⊙z + bias
          (the bias already in z where d_out scales it too)
    backward  dz = d_out⊙dy;  dS = s·dz B;  dT = (dS G)⊙h'(T);  dx̂ = dz W + drop(dT A)
              dA = dTᵀ drop(x̂);  dB = s·dzᵀS;  dG = dSᵀh(T);  da = Σ dT;  dd_in = Σ x⊙dx̂;  dd_out = Σ dy⊙z;  dW = dzᵀx̂

One frozen GEMM each way, every skinny product once, the low-rank update accumulated into the GEMM's own output, the
dropout mask recomputed from its seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Operands, Problem
from ..dropout import Mask
from ..factors import ACTIVATIONS

_aten = torch.ops.aten
# T, h(T), dU -> dT
_ACTIVATION_GRADS = {
    "relu": lambda T, U, dU: _aten.threshold_backward(dU, U, 0),
    "silu": lambda T, U, dU: _aten.silu_backward(dU, T),
    "gelu": lambda T, U, dU: _aten.gelu_backward(dU, T),
    "tanh": lambda T, U, dU: _aten.tanh_backward(dU, U),
}


def _mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha · a b, the scale applied before rounding."""
    return torch.mm(a, b) if alpha == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _gated(U: Tensor, G: Tensor) -> Tensor:
    G = G.to(U.dtype)
    return U * G if G.dim() == 1 else torch.mm(U, G.t())


def _dot_columns(u: Tensor, v: Tensor, like: Tensor, exact: bool = False) -> Tensor:
    """Σ over rows of u ⊙ v. Half precision for an fp32 parameter, or if ``exact``, is multiplied and summed in fp32, a
    cache-sized block of rows at a time; otherwise the product is rounded once before it is summed."""
    if u.element_size() > 2 or (like.dtype == u.dtype and not exact):
        return (u * v).sum(0).to(like.dtype)
    total = torch.zeros(u.shape[1], dtype=torch.float32, device=u.device)
    step = max(1, (1 << 18) // max(1, u.shape[1])) if u.is_cpu else max(1, u.shape[0])
    for i in range(0, u.shape[0], step):
        total += (u[i : i + step].float() * v[i : i + step]).sum(0)
    return total.to(like.dtype)


class Eager:
    name = "eager"

    def available(self) -> list[str]:
        return []

    def reasons(self, problem: Problem) -> list[str]:
        return [] if problem.dtype.is_floating_point else [f"{problem.dtype} is not a floating dtype"]

    def forward(self, o: Operands, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, w, c, bias, d_in, d_out, A, a, G, B, seed, s, p, h, scale_bias = o
        dt, lead = x.dtype, None
        if x.dim() != 2:
            lead, x = x.shape[:-1], _rows(x)
            c = c if c is None else _rows(c)
        if bias is not None and bias.dtype != dt:
            bias = bias.to(dt)
        xh = x if d_in is None else x * d_in.to(dt)
        inner, outer = (bias, None) if d_out is None or scale_bias else (None, bias)

        # z = C + s·S Bᵀ + inner; fresh: z is ours to write into
        if w is not None:
            z, fresh = F.linear(xh, w, inner), True
        elif inner is not None:
            z, fresh = c + inner, True
        else:
            z, fresh = c, False
        T = None
        if A is not None:
            if A.dtype != dt:
                A = A.to(dt)
            if B.dtype != dt:
                B = B.to(dt)
            T = torch.mm(xh, A.t()) if seed is None else _mm(Mask(seed, xh.shape, p)(xh), A.t(), 1 / (1 - p))
            if a is not None:
                T.add_(a)
            S = T if h == "identity" else ACTIVATIONS[h](T)
            if G is not None:
                S = _gated(S, G)
            z, fresh = (z.addmm_ if fresh else z.addmm)(S, B.t(), alpha=s), True

        if d_out is None:
            y = z if fresh else z.clone()
        else:
            d_out = d_out.to(dt)
            if outer is not None:
                y = torch.addcmul(outer, z, d_out)
            else:
                y = z.mul_(d_out) if fresh and not keep_z else z * d_out
        return y if lead is None else y.view(*lead, y.shape[1]), T, z if keep_z else None

    def backward(
        self, dy: Tensor, o: Operands, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        x, w, _, bias, d_in, d_out, A, a, G, B, seed, s, p, h, scale_bias = o
        want_x, want_w, want_c, want_bias, want_d_in, want_d_out, want_A, want_a, want_G, want_B, _ = need
        dx = dw = dc = dbias = dd_in = dd_out = dA = da = dG = dB = None
        dy_shape, dt = dy.shape, dy.dtype
        if dy.dim() != 2:
            dy = _rows(dy)
        if want_d_out:  # before dz, so that dz takes over its temporary's memory and stays in cache for the GEMM
            dd_out = _dot_columns(dy, z, d_out, exact=d_in is not None)
        dz = dy if d_out is None else dy * d_out.to(dt)
        if want_bias:
            dbias = torch.sum(dz if scale_bias else dy, 0, dtype=bias.dtype)
        if want_c:
            dc = dz.view(dy_shape)

        into_x = want_x or want_d_in
        if x is not None:
            x = _rows(x)
        if want_A or want_w:
            xh = x if d_in is None else x * d_in.to(dt)
        if A is not None:
            mask, scale = None, 1.0
            if seed is not None and (want_A or into_x):
                mask, scale = Mask(seed, (dy.shape[0], A.shape[1]), p), 1 / (1 - p)
            U = T if h == "identity" else ACTIVATIONS[h](T)
            if want_B:
                dB = _mm((U if G is None else _gated(U, G)).t(), dz, s).t()  # (r, N) first: up to 7x faster on CPU
                if B.dtype != dt:
                    dB = dB.to(B.dtype)
            if into_x or want_A or want_a or want_G:
                dT = _mm(dz, B if B.dtype == dt else B.to(dt), s)  # dS so far
                if want_G:
                    dG = _dot_columns(dT, U, G) if G.dim() == 1 else torch.mm(dT.t(), U).to(G.dtype)
                if G is not None:
                    dT = dT * G.to(dt) if G.dim() == 1 else torch.mm(dT, G.to(dt))
                if h != "identity":
                    dT = _ACTIVATION_GRADS[h](T, U, dT)
                if want_a:
                    da = torch.sum(dT, 0, dtype=a.dtype)
                if want_A:
                    dA = _mm(dT.t(), xh if mask is None else mask(xh), scale)
                    if A.dtype != dt:
                        dA = dA.to(A.dtype)

        if want_w:
            dw = torch.mm(dz.t(), xh)
        if into_x:
            if w is not None:
                dx = torch.mm(dz, w)
            if A is not None:
                A = A if A.dtype == dt else A.to(dt)
                if mask is None and dx is not None:
                    dx.addmm_(dT, A)
                else:
                    update = _mm(dT, A, scale)
                    update = update if mask is None else mask(update)
                    dx = update if dx is None else dx.add_(update)
            if want_d_in:
                dd_in = _dot_columns(x, dx, d_in, exact=d_out is not None)
            if d_in is not None:
                dx.mul_(d_in.to(dt))
            dx = dx.view(*dy_shape[:-1], dx.shape[1]) if want_x and len(dy_shape) != 2 else dx if want_x else None
        return dx, dw, dc, dbias, dd_in, dd_out, dA, da, dG, dB, None
