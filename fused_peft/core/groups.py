"""The expression on rows in groups, each with a weight and factors of its own: experts, or a batch of several adapters.

For the rows i of group e, with W (E, N, K), A (E, r, K), B (E, N, r) and every other factor stacked likewise

    y_i = d_out_e ⊙ ( x̂_i W_eᵀ + s·h(drop(x̂_i) A_eᵀ + a_e) G_eᵀ B_eᵀ ) + bias_e          x̂_i = x_rows(i) ⊙ d_in_e

LoRA's form goes product by product over all groups; every other form is ``eager``'s, a group at a time. Where W's group
stride is 0 all groups share one weight, and its product is one GEMM.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Mask
from .eager import Eager
from .operands import TENSORS, Operands
from .torch_internals import assert_async

_eager = Eager()
_STACKED = tuple(name for name in Operands._fields[:TENSORS] if name not in ("x", "c", "seed"))


class Groups(NamedTuple):
    """Which rows belong to which group: group e has the rows offs[e - 1] to offs[e] of an order sorted by group.

    offs (E,) int32. rows (P,) int64: the row of x that each of them reads; None where x is in that order itself.
    back (M, k) int64: the k places of that order in which each row of x is read; given where rows is.
    """

    offs: Tensor
    rows: Tensor | None = None
    back: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        """x (M, K) in the order of the groups, (P, K)."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def gathered(self, d: Tensor) -> Tensor:
        """Of (P, K), each row of x's sum, (M, K)."""
        if self.back is None:
            return d
        M, k = self.back.shape
        return d.index_select(0, self.back.view(-1)).view(M, k, d.shape[1]).sum(1)


def route(index: Tensor, experts: int) -> tuple[Groups, Tensor]:
    """The groups of a routing, index (M, k) of each row's experts, and the permutation (P,) that sorts its flattened
    form. An index outside 0 ... experts - 1 leaves offs[-1] below P, which a call refuses."""
    M, k = index.shape
    ids, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.arange(experts, dtype=ids.dtype, device=ids.device)
    offs = torch.searchsorted(ids, ends, right=True).to(torch.int32)
    back = torch.empty_like(order)
    back[order] = torch.arange(M * k, device=order.device)
    return Groups(offs, order // k, back.view(M, k)), order


def group_of(offs: Tensor, P: int) -> Tensor:
    """The group (P,) of each row."""
    return torch.searchsorted(offs, torch.arange(P, dtype=offs.dtype, device=offs.device), right=True)


def at(o: Operands, e: int, **others) -> Operands:
    """One group's operands, on these others."""
    return o._replace(**{n: t[e] for n in _STACKED if (t := getattr(o, n)) is not None}, **others)


def fits_grouped_mm(*tensors: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these on a GPU: bf16, rows or columns 16-byte aligned."""
    return hasattr(F, "grouped_mm") and all(
        t.is_cuda and t.dtype == torch.bfloat16 and all(n % 8 == 0 for n in t.shape[-2:]) for t in tensors
    )


class _Loop:
    """Products a group, one after the other."""

    def __init__(self, offs: Tensor, P: int):
        self.offs, self.ends = offs, [0, *offs.tolist()]
        if self.ends[-1] != P:
            refuse_routing(self.ends[-1], P, len(offs))
        self.each = [(e, slice(b, t)) for e, (b, t) in enumerate(pairwise(self.ends)) if t > b]

    def mm(self, u: Tensor, w: Tensor, bias: Tensor | None = None, alpha: float = 1.0) -> Tensor:
        """alpha·u_e w_e + bias_e, (P, n); u (P, m), w (E, m, n), bias (E, n)."""
        if w.stride(0) == 0:
            return _scaled(u, w[0], alpha) if bias is None else torch.addmm(bias[0], u, w[0], alpha=alpha)
        out = u.new_empty(u.shape[0], w.shape[2])
        weights, biases = w.unbind(0), None if bias is None else bias.unbind(0)
        for e, i in self.each:
            if biases is not None:
                torch.addmm(biases[e], u[i], weights[e], alpha=alpha, out=out[i])
            else:
                _scaled(u[i], weights[e], alpha, out[i])
        return out

    def add(self, y: Tensor, u: Tensor, w: Tensor, alpha: float = 1.0) -> Tensor:
        """y + alpha·u_e w_e, in place."""
        weights = w.unbind(0)
        for e, i in self.each:
            y[i].addmm_(u[i], weights[e], alpha=alpha)
        return y

    def outer(self, u: Tensor, v: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha·u_eᵀ v_e, (E, m, n); u (P, m), v (P, n)."""
        out = u.new_empty(len(self.offs), u.shape[1], v.shape[1])
        if len(self.each) < len(out):
            out.zero_()
        for e, i in self.each:
            _scaled(u[i].t(), v[i], alpha, out[e])
        return out


class _GroupedMM:
    """The same by PyTorch's grouped product, which the host does not wait for."""

    def __init__(self, offs: Tensor, P: int):
        self.offs = offs
        assert_async(offs[-1] == P)  # an expert that does not exist

    def mm(self, u, w, bias=None, alpha=1.0):
        out = torch.mm(u, w[0]) if w.stride(0) == 0 else F.grouped_mm(u, w, offs=self.offs)
        out = out if alpha == 1.0 else out.mul_(alpha)
        return out if bias is None else out.add_(bias[group_of(self.offs, u.shape[0])])

    def add(self, y, u, w, alpha=1.0):
        return y.add_(F.grouped_mm(u, w, offs=self.offs), alpha=alpha)

    def outer(self, u, v, alpha=1.0):
        out = F.grouped_mm(u.t(), v, offs=self.offs)
        return out if alpha == 1.0 else out.mul_(alpha)


def _scaled(u: Tensor, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    if alpha == 1.0:
        return torch.mm(u, w, out=out)
    return torch.addmm(u.new_empty(()), u, w, beta=0, alpha=alpha, out=out)


def refuse_routing(reached: int, P: int, experts: int) -> None:
    raise ValueError(
        f"the routing sends {P - reached} of {P} rows to no expert of 0 ... {experts - 1}; check top_k_index "
        "(sentinels of expert parallelism are not taken)"
    )


def _is_lora(o: Operands) -> bool:
    """Whether a call is the frozen products and s·B A, dropout and the frozen bias included."""
    plain = o.h == "identity" and not (o.hadamard or o.drop_base)
    return plain and o.A is not None and all(t is None for t in (o.a, o.G, o.d_in, o.d_out))


def _products(o: Operands, offs: Tensor, P: int):
    A, B, w = o.A, o.B, o.w
    on_gpu = fits_grouped_mm(*(t for t in (o.c if o.x is None else o.x, w) if t is not None))
    wide = A is None or all(t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0 for t in (A, B))
    return (_GroupedMM if on_gpu and wide else _Loop)(offs, P)


def forward(o: Operands, groups: Groups, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (P, N), T (P, r) and z (P, N), as ``Backend.forward``; x (M, K), c (P, N)."""
    x = groups.read(o.x)
    P, dt = x.shape[0], x.dtype
    if _is_lora(o):
        with_bias = o.bias is not None
        bias = o.bias.to(dt) if with_bias else None
        p = _products(o, groups.offs, P)
        xd, scale = (x, 1.0) if o.seed is None else (Mask(o.seed, x.shape, o.p)(x), 1 / (1 - o.p))
        T = p.mm(xd, o.A.to(dt).mT, alpha=scale)
        if o.w is not None:
            shared = with_bias and o.w.stride(0) == 0
            y = p.mm(x, o.w.mT, None if shared else bias)
            y = y.add_(bias[group_of(groups.offs, P)]) if shared else y
        else:
            y = o.c.clone() if bias is None else o.c + bias[group_of(groups.offs, P)]
        return p.add(y, T, o.B.to(dt).mT, o.s), T, None
    loop, found = _Loop(groups.offs, P), []
    mask = None if o.seed is None else Mask(o.seed, x.shape, o.p)
    for e, i in loop.each:
        c, seed = None if o.c is None else o.c[i], None if mask is None else mask.rows(i)
        found.append(_eager.forward(at(o, e, x=x[i], c=c, seed=seed), keep_z))
    if not found:
        N = (o.c if o.c is not None else o.w).shape[-1 if o.c is not None else 1]
        r = None if o.A is None or o.hadamard else o.A.shape[1]
        y = x.new_empty(0, N)
        return y, None if r is None else x.new_empty(0, r), y.clone() if keep_z else None
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True))


def backward(
    dy: Tensor, o: Operands, groups: Groups, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients as ``Backend.backward``; dy (P, N), dx (M, K). The weights' own is not among them."""
    want, P, dt = Operands(*need), dy.shape[0], dy.dtype
    into_x = want.x or want.d_in
    x = None if o.x is None else groups.read(o.x)
    if _is_lora(o):
        grads = Operands(c=dy if want.c else None)
        p = _products(o._replace(x=dy, c=None), groups.offs, P)
        if want.bias:
            grads = grads._replace(bias=_sums(dy, o.bias, groups.offs))
        if want.B:
            dB = p.outer(T, dy, o.s).mT  # (E, r, N) first, as the single layer's
            grads = grads._replace(B=dB.to(o.B.dtype))
        if not (into_x or want.A):
            return list(grads[: len(need)])
        mask, scale = None, 1.0
        if o.seed is not None:
            mask, scale = Mask(o.seed, (P, o.A.shape[2]), o.p), 1 / (1 - o.p)
        dT = p.mm(dy, o.B.to(dt), alpha=o.s)
        if want.A:
            dA = p.outer(dT, x if mask is None else mask(x), scale)
            grads = grads._replace(A=dA.to(o.A.dtype))
        if into_x:
            A = o.A.to(dt)
            if mask is None and o.w is not None:
                dx = p.add(p.mm(dy, o.w), dT, A)
            else:
                dx = p.mm(dT, A, alpha=scale)
                dx = dx if mask is None else mask(dx)
                dx = dx if o.w is None else dx.add_(p.mm(dy, o.w))
            grads = grads._replace(x=groups.gathered(dx))
        return list(grads[: len(need)])
    loop = _Loop(groups.offs, P)
    K = next(t for t in (o.w, o.A, o.x) if t is not None).shape[-1]
    mask = None if o.seed is None else Mask(o.seed, (P, K), o.p)
    stacked = {n: torch.zeros_like(t) for n in _STACKED if getattr(want, n) and (t := getattr(o, n)) is not None}
    if want.bias:
        stacked["bias"] = o.bias.new_zeros(len(groups.offs), dy.shape[1])
    parts = o._replace(bias=None, c=None)  # the bias is kept for its dtype alone
    dx, dc = dy.new_empty(P, K) if want.x else None, torch.empty_like(dy) if want.c else None
    for e, i in loop.each:
        part = at(parts, e, x=None if x is None else x[i], seed=None if mask is None else mask.rows(i), bias=o.bias)
        found = Operands(*_eager.backward(dy[i], part, None if T is None else T[i], None if z is None else z[i], need))
        for n, grad in stacked.items():
            grad[e] = getattr(found, n)
        if dx is not None:
            dx[i] = found.x
        if dc is not None:
            dc[i] = found.c
    dx = dx if dx is None else groups.gathered(dx)
    return list(Operands(x=dx, c=dc, **stacked)[: len(need)])


class EagerBackend(Eager):
    """The definition, for rows in groups too."""

    grouped_forward = staticmethod(forward)
    grouped_backward = staticmethod(backward)


def _sums(dy: Tensor, bias: Tensor, offs: Tensor) -> Tensor:
    """Each group's sum over rows, (E, N), in the bias's dtype."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    lengths = torch.diff(offs, prepend=offs.new_zeros(1)).long()
    return torch.segment_reduce(dy.to(wide), "sum", lengths=lengths, axis=0, initial=0).to(bias.dtype)
