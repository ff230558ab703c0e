"""The definition, in plain PyTorch on any device; other backends must equal it.

forward   x̂ = x⊙d_in;  T = drop(x̂)Aᵀ + a;  S = h(T)Gᵀ;  z = C + s·S Bᵀ;  y = d_out⊙z + bias
          (the bias already in z where d_out scales it too)
backward  dz = d_out⊙dy;  dS = s·dz B;  dT = (dS G)⊙h'(T);  dx̂ = dz W + drop(dT A);  dA = dTᵀ drop(x̂);  da = Σ dT
          dB = (s·dzᵀh(T))Gᵀ;  dG = Bᵀ(s·dzᵀh(T)) = dSᵀh(T);  dd_in = Σ x⊙dx̂;  dd_out = Σ dy⊙z;  dW = dzᵀx̂
drop_base z = drop(x̂)Wᵀ + s·S Bᵀ,  y = (x̂ − drop(x̂))Wᵀ + d_out⊙z + bias
          u = dz W + dT A,  v = dy W,  dx̂ = v + drop(u − v)
hadamard  W' = W⊙(1 + s·BA) in place of W;  E = W⊙dW';  dA = s·Bᵀ E;  dB = s·E Aᵀ

One frozen GEMM each way, every skinny product once, the low-rank update accumulated into the GEMM's own output, the
dropout mask recomputed from its seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import mask_of
from .factors import ACTIVATIONS
from .operands import Operands, Problem
from .torch_internals import HALF_PRODUCTS, unsafe_view

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


BLOCK = 1 << 19  # elements of a block of rows that is worked on while a CPU's cache holds it in fp32
MANY = 1 << 16  # elements from which a CPU scales by batch norm's kernel, which fails on none
TALL, LONG = 1024, 2048  # rows of dz, and of B, from which B is read column after column on a CPU


def _narrowed(dz: Tensor, B: Tensor, s: float) -> Tensor:
    """s·dz B in dz's dtype; where both are large on a CPU from B column after column, up to a third faster."""
    if B.is_cpu and B.shape[0] >= LONG and dz.shape[0] >= TALL:
        return _mm(dz, B.t().to(dz.dtype, memory_format=torch.contiguous_format, copy=True).t(), s)
    return _mm(dz, B if B.dtype == dz.dtype else B.to(dz.dtype), s)


def by_columns(w: Tensor) -> Tensor:
    """w (m, n), to be multiplied from the left, as PyTorch reads it fast: in half precision on a CPU without
    instructions for it column after column, a copy that costs a tenth of what it saves; as it is elsewhere."""
    if not w.is_cpu or HALF_PRODUCTS.get(w.dtype, True) or w.stride(-1) != 1:
        return w
    return w.mT.contiguous().mT


def _gated(U: Tensor, G: Tensor) -> Tensor:
    G = G.to(U.dtype)
    return U * G if G.dim() == 1 else torch.mm(U, G.t())


def _blocks(t: Tensor) -> Iterator[slice]:
    """BLOCK elements of t's rows at a time on a CPU; all rows on other devices."""
    step = max(1, BLOCK // max(1, t.shape[1])) if t.is_cpu else max(1, t.shape[0])
    return (slice(i, i + step) for i in range(0, t.shape[0], step))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _batch_norm(z: Tensor, *others: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance with which batch norm in evaluation is z ⊙ d + bias, and its backward the sums over rows: for
    MANY contiguous half-precision elements on a CPU, which its kernel reads once and sums in fp32, row after row."""
    if not z.is_cpu or z.element_size() > 2 or z.numel() < MANY or not all(t.is_contiguous() for t in (z, *others)):
        return None
    zeros = torch.zeros(z.shape[1], dtype=torch.float32, device=z.device)
    return zeros, torch.ones_like(zeros)


def row_sum(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over rows, in that dtype."""
    if dtype == torch.float32 and (unit := _batch_norm(t)):  # sum would copy t in fp32
        need = [False, False, True]
        return _aten.native_batch_norm_backward(t, t, unit[1], *unit, None, None, False, 0.0, need)[2]
    return torch.sum(t, 0, dtype=dtype)


def _scaled(z: Tensor, d: Tensor, plus: Tensor | None = None) -> Tensor:
    """z ⊙ d (+ plus) rounded once, computed in fp32 or wider; on a CPU by one kernel or in blocks of rows."""
    if (plus is None or plus.dim() == 1) and (unit := _batch_norm(z)):
        plus = None if plus is None else plus.float()
        return _aten.native_batch_norm(z, d.float(), plus, *unit, False, 0.0, 0.0)[0]
    out, d = torch.empty_like(z), d.to(torch.promote_types(_wide(z.dtype), d.dtype))
    for i in _blocks(z):
        block = z[i] * d
        if plus is not None:
            block += plus if plus.dim() == 1 else plus[i]
        out[i] = block
    return out


def _scale_gradients(
    dy: Tensor, z: Tensor, d: Tensor, once: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Σ over rows of dy ⊙ z, in d's dtype, computed in fp32 or wider, and dy ⊙ d, ``in_place``: written over dy. d is
    rounded to dy's dtype first, unless ``once``: the product alone is."""
    wide = torch.promote_types(_wide(dy.dtype), d.dtype) if once else _wide(dy.dtype)
    scale = d.to(wide if once else dy.dtype)
    if unit := _batch_norm(dy, z):
        need = [not in_place, True, False]
        dz, total, _ = _aten.native_batch_norm_backward(dy, z, scale.float(), *unit, None, None, False, 0.0, need)
        return total.to(d.dtype), dy.mul_(scale) if in_place else dz
    total, dz = torch.zeros(dy.shape[1], dtype=wide, device=dy.device), dy if in_place else torch.empty_like(dy)
    for i in _blocks(dy):
        u = dy[i].to(wide)
        total += (u * z[i]).sum(0)
        if scale.dtype == dy.dtype:
            torch.mul(dy[i], scale, out=dz[i])
        else:
            dz[i] = u.mul_(scale)
    return total.to(d.dtype), dz


def row_norm(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B A‖ per row, (N,), in squared's dtype; of stacks (E, N, K) as well."""
    A, B = A.to(squared.dtype), B.to(squared.dtype)
    WA = torch.matmul(W, A.mT.to(W.dtype)).to(squared.dtype)
    return norm_of(squared, WA, A @ A.mT, B, s)


def norm_of(squared: Tensor, WA: Tensor, AA: Tensor, B: Tensor, s: float) -> Tensor:
    """The same from W Aᵀ (N, r) and A Aᵀ (r, r), all of one dtype."""
    return (squared + s * ((2 * WA + s * (B @ AA)) * B).sum(-1)).clamp_min_(0).sqrt_()


def _multiplied(w: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W ⊙ (1 + s·B A) in w's dtype, formed in the wider of the two."""
    wide = w.to(torch.promote_types(w.dtype, A.dtype))
    return torch.addcmul(wide, wide, B @ A, value=s).to(w.dtype)


def _multiplied_gradients(dz, xh, w, A, B, s, need) -> tuple[Tensor | None, ...]:
    """dA, dB and dw of y = x̂ (w ⊙ (1 + s·B A))ᵀ."""
    want = Operands(*need)
    if not (want.A or want.B or want.w):
        return None, None, None
    dW = torch.mm(dz.t(), xh)
    wide = dW.to(torch.promote_types(w.dtype, A.dtype))
    E = (wide * w) * s
    dA = B.t() @ E if want.A else None
    dB = E @ A.t() if want.B else None
    return dA, dB, torch.addcmul(wide, wide, B @ A, value=s).to(w.dtype) if want.w else None


class Eager:
    name = "eager"

    row_norm = staticmethod(row_norm)

    def available(self) -> list[str]:
        return []

    def slower(self, problem: Problem) -> None:
        return None

    def reasons(self, problem: Problem) -> list[str]:
        return [] if problem.dtype.is_floating_point else [f"{problem.dtype} is not a floating dtype"]

    def forward(self, o: Operands, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, w, c, bias, d_in, d_out = o.x, o.w, o.c, o.bias, o.d_in, o.d_out
        A, a, G, B, seed, s, p, h = o.A, o.a, o.G, o.B, o.seed, o.s, o.p, o.h
        drop_base = o.drop_base
        if o.hadamard:
            w, A = _multiplied(w, A, B, s), None
        dt, lead = x.dtype, None
        if x.dim() != 2:
            lead, x = x.shape[:-1], _rows(x)
            c = c if c is None else _rows(c)
        if bias is not None and bias.dtype != dt:
            bias = bias.to(dt)
        xh = x if d_in is None else x * d_in.to(dt)
        inner, outer = (bias, None) if d_out is None or o.scale_bias else (None, bias)
        xd, scale = xh, 1.0
        if seed is not None:
            xd, scale = mask_of(seed, xh.shape, p)(xh), 1 / (1 - p)
            if drop_base:
                xd, scale = xd.mul_(scale), 1.0
                outer = F.linear(xh - xd, w, outer)
                xh = xd

        # z = C + s·S Bᵀ + inner; fresh: z is ours to write into
        if w is not None:
            z, fresh = F.linear(xh, w, inner), True
        elif A is None and inner is not None:
            z, fresh = c + inner, True
        else:
            z, fresh = c, False
        T = None
        if A is not None:
            if A.dtype != dt:
                A = A.to(dt)
            if B.dtype != dt:
                B = B.to(dt)
            T = _mm(xd, A.t(), scale)
            if a is not None:
                T.add_(a)
            S = T if h == "identity" else ACTIVATIONS[h](T)
            if G is not None:
                S = _gated(S, G)
            if w is None and (z is None or inner is not None):  # the update and its bias first: one rounding of C less
                z = _mm(S, B.t(), s) if inner is None else torch.addmm(inner, S, B.t(), alpha=s)
                if c is not None:
                    z.add_(c)
            else:
                z = (z.addmm_ if fresh else z.addmm)(S, B.t(), alpha=s)
            fresh = True

        if d_out is None:
            y = z if fresh else z.clone()
            if outer is not None:
                y.add_(outer)
        else:
            if d_out.dtype != dt and A is not None:
                y = _scaled(z, d_out, outer)
            elif outer is not None:
                y = torch.addcmul(outer, z, d_out.to(dt))
            else:
                y = z.mul_(d_out.to(dt)) if fresh and not keep_z else z * d_out.to(dt)
        return y if lead is None else unsafe_view(y, (*lead, y.shape[1])), T, z if keep_z else None

    def backward(
        self, dy: Tensor, o: Operands, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        x, w, bias, d_in, d_out, hadamard = o.x, o.w, o.bias, o.d_in, o.d_out, o.hadamard
        A, a, G, B, seed, s, p, h = o.A, o.a, o.G, o.B, o.seed, o.s, o.p, o.h
        want_x, want_w, want_c, want_bias, want_d_in, want_d_out, want_A, want_a, want_G, want_B, _ = need
        dx = dw = dc = dbias = dd_in = dd_out = dA = da = dG = dB = None
        dy_shape, dt = dy.shape, dy.dtype
        if dy.dim() != 2:
            dy = _rows(dy)
        dz = dy
        if want_d_out:
            dd_out, dz = _scale_gradients(dy, z, d_out, once=A is not None)
        elif d_out is not None:
            dz = _scaled(dy, d_out) if d_out.dtype != dt and A is not None else dy * d_out.to(dt)
        if want_bias:
            dbias = row_sum(dz if o.scale_bias else dy, bias.dtype)
        if want_c:
            dc = dz.view(dy_shape)

        into_x = want_x or want_d_in
        if x is not None:
            x = _rows(x)
        if hadamard:
            dA, dB, dw = _multiplied_gradients(dz, x if d_in is None else x * d_in.to(dt), w, A, B, s, need)
            w = _multiplied(w, A, B, s) if into_x else w
            A, want_A, want_w = None, False, False
        if want_A or want_w:
            xh = x if d_in is None else x * d_in.to(dt)
        if A is not None:
            mask, scale = None, 1.0
            if seed is not None and (want_A or want_w or into_x):
                mask, scale = mask_of(seed, (dy.shape[0], A.shape[1]), p), 1 / (1 - p)
            U = T if T is None or h == "identity" else ACTIVATIONS[h](T)
            of_dS = want_G and not want_B  # dx needs dS, so dG costs no product as large as dB's
            if want_B:
                BG = _mm(U.t(), dz, s).t()  # s·dzᵀh(T), (N, r); (r, N) first: up to 7x faster on CPU
                if BG.dtype != B.dtype:
                    BG = BG.to(B.dtype)
                if G is None:
                    dB = BG
                elif G.dim() == 1:
                    dB, dG = BG * G, (BG * B).sum(0) if want_G else None
                else:
                    dB, dG = BG @ G.t(), B.t() @ BG if want_G else None
            if into_x or want_A or want_a or of_dS:
                dT = _narrowed(dz, B, s)  # dS so far
                if of_dS:
                    dG = (dT * U.to(torch.promote_types(G.dtype, dt))).sum(0) if G.dim() == 1 else torch.mm(dT.t(), U)
                    dG = dG.to(G.dtype)
                if G is not None:
                    dT = dT * G.to(dt) if G.dim() == 1 else torch.mm(dT, G.to(dt))
                if h != "identity":
                    dT = _ACTIVATION_GRADS[h](T, U, dT)
                if want_a:
                    da = row_sum(dT, a.dtype)
                if want_A:
                    dA = _mm(dT.t(), xh if mask is None else mask(xh), scale)
                    if A.dtype != dt:
                        dA = dA.to(A.dtype)

        drop_base = o.drop_base and seed is not None
        if want_w:
            xd = mask(xh).mul_(scale) if drop_base else xh
            dw = torch.mm(dz.t(), xd)
            if drop_base:
                dw.addmm_(dy.t(), xh - xd)
        if into_x:
            if w is not None:
                dx = torch.mm(dz, by_columns(w))
            if A is not None:
                A = A if A.dtype == dt else A.to(dt)
                if drop_base:
                    past = torch.mm(dy, by_columns(w))
                    dx = past.add_(mask(dx.addmm_(dT, A).sub_(past)), alpha=scale)
                elif mask is None and dx is not None:
                    dx.addmm_(dT, A)
                else:
                    update = _mm(dT, A, scale)
                    update = update if mask is None else mask(update)
                    dx = update if dx is None else dx.add_(update)
            if want_d_in:
                dd_in, dx = _scale_gradients(dx, x, d_in, in_place=True)
            elif d_in is not None:
                dx.mul_(d_in.to(dt))
            dx = dx.view(*dy_shape[:-1], dx.shape[1]) if want_x and len(dy_shape) != 2 else dx if want_x else None
        return dx, dw, dc, dbias, dd_in, dd_out, dA, da, dG, dB, None
