"""The expression on rows in groups, each with a weight and factors of its own: experts, or a batch of several adapters.

For the rows i of group e, with W (E, N, K), A (E, r, K), B (E, N, r) and every other factor stacked likewise

    y_i = d_out_e ⊙ ( x̂_i W_eᵀ + s·h(drop(x̂_i) A_eᵀ + a_e) G_eᵀ B_eᵀ ) + bias_e          x̂_i = x_rows(i) ⊙ d_in_e

LoRA's form goes product by product over all groups; every other form is ``eager``'s, a group at a time. Where W's group
stride is 0 all groups share one weight, and its product is one GEMM.

Rows that share the weight may also stay in an order of their own, as runs (``Groups.of``): of a batch's samples each
follows an adapter of its own, or none. Nothing of x's or y's size is sorted then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Mask
from .eager import Eager, by_columns
from .operands import TENSORS, Operands
from .torch_internals import assert_async

TALL = 64  # rows of a group's weight from which ``by_columns`` pays
FEW = 8  # rows of a run up to which runs of a CPU are computed in one batched product
_eager = Eager()
_STACKED = tuple(name for name in Operands._fields[:TENSORS] if name not in ("x", "c", "seed"))


class Groups(NamedTuple):
    """Which rows belong to which group: group e has the rows offs[e - 1] to offs[e] of an order sorted by group.

    offs (E,) int32. rows (P,) int64: the row of x that each of them reads; None where x is in that order itself.
    back (M, k) int64: the k places of that order in which each row of x is read; given where rows is.
    of (runs,) int64: with it the rows offs[j - 1] to offs[j] of x itself are a run of group of[j], in any order and
    several to a group; -1 for none, where the frozen product and the bias stand alone. For LoRA's form on one weight.
    """

    offs: Tensor
    rows: Tensor | None = None
    back: Tensor | None = None
    of: Tensor | None = None

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


def per_run(t: Tensor, of: Tensor) -> Tensor:
    """What each run has of a stack (E, ...): nothing where it is of no group."""
    return torch.cat([t, t.new_zeros(1, *t.shape[1:])]).index_select(0, of % (len(t) + 1))


def one_for_all(t: Tensor) -> bool:
    """Whether a stack (E, ...) holds one tensor for every group."""
    return t.stride(0) == 0 or len(t) == 1


def fits_grouped_mm(*tensors: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these on a GPU: bf16, rows or columns 16-byte aligned."""
    return hasattr(F, "grouped_mm") and all(
        t.is_cuda and t.dtype == torch.bfloat16 and all(n % 8 == 0 for n in t.shape[-2:]) for t in tensors
    )


class _Loop:
    """Products a group, one after the other."""

    def __init__(self, groups: Groups, P: int):
        ends = [0, *groups.offs.tolist()]
        if ends[-1] != P:
            refuse_routing(ends[-1], P, len(groups.offs))
        self.sizes = [t - b for b, t in pairwise(ends)]
        of = range(len(self.sizes)) if groups.of is None else groups.of.tolist()
        self.each = [(e, slice(b, t)) for e, (b, t) in zip(of, pairwise(ends), strict=True) if t > b and e >= 0]
        self.runs = [(e, j) for j, (e, n) in enumerate(zip(of, self.sizes, strict=True)) if n and e >= 0]
        self.all = groups.of is None or min(of, default=0) >= 0  # every row has a group

    def parts(self, t: Tensor) -> Sequence[Tensor]:
        """The rows of each run."""
        return t.split_with_sizes(self.sizes)

    def mm(self, u: Tensor, w: Tensor, bias: Tensor | None = None, alpha: float = 1.0) -> Tensor:
        """alpha·u_e w_e + bias_e, (P, n); u (P, m), w (E, m, n), bias (E, n)."""
        if one_for_all(w) and self.all:
            return _scaled(u, w[0], alpha) if bias is None else torch.addmm(bias[0], u, w[0], alpha=alpha)
        out = (u.new_empty if self.all else u.new_zeros)(u.shape[0], w.shape[2])
        us, ws, outs = self.parts(u), w.unbind(0), self.parts(out)
        tall = w.shape[1] >= TALL
        biases = None if bias is None else bias.unbind(0)
        for e, j in self.runs:
            right = by_columns(ws[e]) if tall else ws[e]
            if biases is not None:
                torch.addmm(biases[e], us[j], right, alpha=alpha, out=outs[j])
            else:
                _scaled(us[j], right, alpha, outs[j])
        return out

    def add(self, y: Tensor, u: Tensor, w: Tensor, alpha: float = 1.0) -> Tensor:
        """y + alpha·u_e w_e, in place."""
        ys, us, ws = self.parts(y), self.parts(u), w.unbind(0)
        for e, j in self.runs:
            ys[j].addmm_(us[j], ws[e], alpha=alpha)
        return y

    def add_masked(self, y: Tensor, u: Tensor, w: Tensor, mask: Mask, alpha: float) -> Tensor:
        """y + alpha·mask ⊙ u_e w_e, in place."""
        weights = w.unbind(0)
        for e, i in self.each:
            y[i].add_(mask.rows(i)(_scaled(u[i], weights[e], alpha)))
        return y

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """y + bias_e, in place."""
        biases = bias.unbind(0)
        for e, i in self.each:
            y[i].add_(biases[e])
        return y

    def outer(self, u: Tensor, v: Tensor, E: int, alpha: float = 1.0, interleaved: bool = False) -> Tensor:
        """alpha·u_eᵀ v_e, (E, m, n), or in memory (m, E, n) if ``interleaved``; u (P, m), v (P, n)."""
        begun, hit = set(), {e for e, _ in self.runs}
        m, n = u.shape[1], v.shape[1]
        # sums of several runs round once
        dt = torch.promote_types(u.dtype, torch.float32) if len(hit) < len(self.runs) else u.dtype
        make = u.new_empty if len(hit) == E else u.new_zeros
        out = make(m, E, n, dtype=dt).transpose(0, 1) if interleaved else make(E, m, n, dtype=dt)
        us, vs, outs = self.parts(u), self.parts(v), out.unbind(0)
        for e, j in self.runs:
            if e in begun:
                _plus(outs[e], us[j].t(), vs[j], alpha)
            elif dt == u.dtype:
                _scaled(us[j].t(), vs[j], alpha, outs[e])
            else:
                outs[e].copy_(_scaled(us[j].t(), vs[j], alpha))
            begun.add(e)
        return out


class _Batched(_Loop):
    """The same for runs of FEW rows each, all alike, in the order of the groups, and rows of no group behind them: one
    batched product on a CPU."""

    def __init__(self, groups: Groups, P: int):
        super().__init__(groups, P)
        self.count, self.rows = len(self.each), self.each[-1][1].stop

    def _split(self, t: Tensor) -> Tensor:
        return t[: self.rows].view(self.count, -1, t.shape[1])

    def mm(self, u, w, bias=None, alpha=1.0):
        out = torch.bmm(self._split(u), w).flatten(0, 1)
        out = out if alpha == 1.0 else out.mul_(alpha)
        out = out if self.rows == len(u) else F.pad(out, (0, 0, 0, len(u) - self.rows))
        return out if bias is None else self.add_bias(out, bias)

    def add(self, y, u, w, alpha=1.0):
        self._split(y).baddbmm_(self._split(u), w, alpha=alpha)
        return y


class _GroupedMM:
    """The same by PyTorch's grouped product, which the host does not wait for."""

    def __init__(self, groups: Groups, P: int):
        self.offs, self.of = groups.offs, groups.of
        assert_async(self.offs[-1] == P)  # an expert that does not exist

    def _each(self, t: Tensor) -> Tensor:
        """What each run has of a stack (E, ...)."""
        if self.of is None:
            return t
        return per_run(t, self.of)

    def _mm(self, u: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(u, self._each(w), offs=self.offs)

    def mm(self, u, w, bias=None, alpha=1.0):
        out = torch.mm(u, w[0]) if w.stride(0) == 0 else self._mm(u, w)
        out = out if alpha == 1.0 else out.mul_(alpha)
        return out if bias is None else self.add_bias(out, bias)

    def add(self, y, u, w, alpha=1.0):
        return y.add_(self._mm(u, w), alpha=alpha)

    def add_masked(self, y, u, w, mask, alpha):
        return y.add_(mask(self._mm(u, w)), alpha=alpha)

    def add_bias(self, y, bias):
        return y.add_(self._each(bias)[group_of(self.offs, y.shape[0])])

    def outer(self, u, v, E, alpha=1.0, interleaved=False):
        out = F.grouped_mm(u.t(), v, offs=self.offs)
        if self.of is not None:  # no index_add_, whose order of summation is not fixed
            runs = (torch.arange(E, device=out.device)[:, None] == self.of).to(torch.float32)
            out = torch.mm(runs, out.flatten(1).to(torch.float32)).view(E, *out.shape[1:])
        return out if alpha == 1.0 else out.mul_(alpha)


def _plus(out: Tensor, u: Tensor, v: Tensor, alpha: float) -> None:
    if out.dtype == u.dtype:
        out.addmm_(u, v, alpha=alpha)
    else:
        out.add_(_scaled(u, v, alpha))


def _scaled(u: Tensor, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    if alpha == 1.0:
        return torch.mm(u, w, out=out)
    return torch.addmm(u.new_empty(()), u, w, beta=0, alpha=alpha, out=out)


def refuse_routing(reached: int, P: int, experts: int) -> None:
    raise ValueError(
        f"the routing sends {P - reached} of {P} rows to no expert of 0 ... {experts - 1}; check top_k_index (the "
        "sentinels of expert parallelism are not taken)"
    )


def _is_lora(o: Operands) -> bool:
    """Whether a call is frozen products and s·B A, or either alone, dropout and a bias included."""
    plain = o.h == "identity" and not (o.hadamard or o.drop_base)
    return plain and all(t is None for t in (o.a, o.G, o.d_in, o.d_out))


def _by_rank(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Bᵀ (E, r, N), its rows contiguous: half the time of both products with it, whichever way B is stored."""
    B = B.to(dtype)
    if _interleaved(B):  # one transposition of a matrix, where one of three dimensions takes several times as long
        E, N, r = B.shape
        return B.permute(1, 2, 0).view(N, r * E).t().contiguous().view(r, E, N).transpose(0, 1)
    return B.mT.contiguous()


def _interleaved(B: Tensor) -> bool:
    """Whether B (E, N, r) is stored as (N, r, E), as PEFT stores that of experts."""
    return len(B) > 1 and B.permute(1, 2, 0).is_contiguous()


def _products(o: Operands, groups: Groups, P: int):
    A, B, w = o.A, o.B, o.w
    on_gpu = fits_grouped_mm(*(t for t in (o.c if o.x is None else o.x, w) if t is not None))
    wide = A is None or all(t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0 for t in (A, B))
    if on_gpu and wide:
        return _GroupedMM(groups, P)
    return (_Batched if groups.of is not None and A is not None and A.is_cpu and _alike(groups, len(A)) else _Loop)(
        groups, P
    )


def _alike(groups: Groups, E: int) -> bool:
    """Whether the runs are what one batched product takes."""
    ends = groups.offs.tolist()[:E]
    n, of = ends[0], groups.of.tolist()
    return E > 1 and 0 < n <= FEW and ends == [n * e for e in range(1, E + 1)] and of in ([*range(E)], [*range(E), -1])


def forward(o: Operands, groups: Groups, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (P, N), T (P, r) and z (P, N), as ``Backend.forward``; x (M, K), c (P, N)."""
    x = groups.read(o.x)
    P, dt = x.shape[0], x.dtype
    if _is_lora(o):
        p, bias, T = _products(o, groups, P), None if o.bias is None else o.bias.to(dt), None
        if o.w is None:
            y = None if o.c is None else o.c.clone() if bias is None else _biased(p, o.c.clone(), bias)
        elif one_for_all(o.w):
            alike = bias is not None and one_for_all(bias)
            y = F.linear(x, o.w[0], bias[0] if alike else None)
            y = y if bias is None or alike else p.add_bias(y, bias)
        else:
            y = p.mm(x, o.w.mT, bias)
        if o.A is not None:
            xd, scale = (x, 1.0) if o.seed is None else (Mask(o.seed, x.shape, o.p)(x), 1 / (1 - o.p))
            T, B = p.mm(xd, o.A.to(dt).mT, alpha=scale), _by_rank(o.B, dt)
            y = p.mm(T, B, bias, o.s) if y is None else p.add(y, T, B, o.s)
        return y, T, None
    loop, found = _Loop(groups, P), []
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
        p = _products(o._replace(x=dy, c=None), groups, P)
        E = len(next(t for t in (o.A, o.w, groups.offs) if t is not None))
        if want.bias:
            grads = grads._replace(bias=_sums(dy, o.bias, groups, E))
        if want.B:
            dB = p.outer(T, dy, E, o.s, _interleaved(o.B)).mT  # (E, r, N) first, as the single layer's
            grads = grads._replace(B=dB.to(o.B.dtype))
        if o.A is None and want.x and o.w is not None:
            dx = torch.mm(dy, by_columns(o.w[0])) if one_for_all(o.w) else p.mm(dy, o.w)
            grads = grads._replace(x=groups.gathered(dx))
        if o.A is None or not (into_x or want.A):
            return list(grads[: len(need)])
        mask, scale = None, 1.0
        if o.seed is not None:
            mask, scale = Mask(o.seed, (P, o.A.shape[2]), o.p), 1 / (1 - o.p)
        dT = p.mm(dy, _by_rank(o.B, dt).mT, alpha=o.s)
        if want.A:
            dA = p.outer(dT, x if mask is None else mask(x), E, scale)
            grads = grads._replace(A=dA.to(o.A.dtype))
        if into_x:
            A = o.A.to(dt)
            if mask is None and o.w is not None:
                dx = p.add(torch.mm(dy, by_columns(o.w[0])) if one_for_all(o.w) else p.mm(dy, o.w), dT, A)
            elif groups.of is not None:  # where a run is of no group, dT has nothing
                dx = dy.new_zeros(P, o.A.shape[2]) if o.w is None else torch.mm(dy, by_columns(o.w[0]))
                dx = p.add(dx, dT, A) if mask is None else p.add_masked(dx, dT, A, mask, scale)
            else:
                dx = p.mm(dT, A, alpha=scale)
                dx = dx if mask is None else mask(dx)
                dx = dx if o.w is None else dx.add_(p.mm(dy, o.w))
            grads = grads._replace(x=groups.gathered(dx))
        return list(grads[: len(need)])
    loop = _Loop(groups, P)
    K = next((t.shape[-1] for t in (o.w, o.A) if t is not None), None)  # None: x takes no part
    mask = None if o.seed is None else Mask(o.seed, (P, K), o.p)
    stacked = {n: torch.zeros_like(t) for n in _STACKED if getattr(want, n) and (t := getattr(o, n)) is not None}
    if want.bias:
        stacked["bias"] = o.bias.new_zeros(len(groups.offs), dy.shape[1])
    parts = o._replace(bias=None, c=None)  # the bias is kept for its dtype alone
    dx, dc = dy.new_empty(P, K) if want.x and K else None, torch.empty_like(dy) if want.c else None
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


def _biased(p, y: Tensor, bias: Tensor) -> Tensor:
    """y + bias_e, in place, to rows of no group too where all have one bias."""
    return y.add_(bias[0]) if one_for_all(bias) else p.add_bias(y, bias)


def _sums(dy: Tensor, bias: Tensor, groups: Groups, E: int | None = None) -> Tensor:
    """Each group's sum over rows, (E, N), in the bias's dtype; rows of no group, whose bias is everyone's, in the
    first one's."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    lengths = torch.diff(groups.offs, prepend=groups.offs.new_zeros(1)).long()
    sums = torch.segment_reduce(dy.to(wide), "sum", lengths=lengths, axis=0, initial=0)
    if groups.of is not None:
        sums = torch.mm((torch.arange(E, device=dy.device)[:, None] == groups.of.clamp(min=0)).to(wide), sums)
    return sums.to(bias.dtype)
