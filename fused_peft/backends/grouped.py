"""Rows in groups (``core.groups``) as launches of the Triton kernels: experts, a batch whose rows use several adapters.

forward   down (S), then one GEMM (y, z) that reads x by the routing's index; no sorted copy of x is made
backward  down (dT), the GEMM (dx of each row that is read), the sums over each group's rows

Each call makes the tables that say where the tiles lie, a small launch each, without a word to the host.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..core import dropout
from ..core.groups import Groups, group_of, refuse_routing
from ..core.operands import Operands, Problem
from ..core.torch_internals import assert_async


def reasons(problem: Problem) -> list[str]:
    """Why the kernels cannot compute a call on rows in groups."""
    found = []
    if "runs" in problem.present:
        found.append("rows of one weight in runs, each with an adapter of its own")
    if problem.hadamard:
        found.append("a product of weights, on rows in groups")
    if problem.drop_base:
        found.append("dropout on the base term, on rows in groups")
    return found


def _fits(o: Operands, groups: Groups, P: int) -> None:
    """RuntimeError or ValueError where x or the routing does not fit, before a kernel reads beyond an operand; on a GPU
    an assertion there stops what follows."""
    w = o.A if o.w is None else o.w
    if w is not None and (o.x.shape[-1] != w.shape[2] or (o.w is not None and o.x.dtype != o.w.dtype)):
        raise RuntimeError(f"x {tuple(o.x.shape)} {o.x.dtype} does not fit the weights {tuple(w.shape)} {w.dtype}")
    E = groups.offs.shape[0]
    if any(t is not None and t.shape[0] != E for t in (o.w, o.bias, o.A, o.B, o.a, o.G, o.d_in, o.d_out)):
        raise RuntimeError(f"a stack of the call has not one part for each of {E} groups")
    if groups.offs.is_cuda:
        assert_async(groups.offs[-1] == P)
    elif groups.offs.is_cpu and (reached := int(groups.offs[-1])) != P:
        refuse_routing(reached, P, len(groups.offs))


def _dense(o: Operands) -> Operands:
    """With every vector of a stack contiguous."""
    vectors = {n: getattr(o, n) for n in ("bias", "d_in", "d_out", "a", "G")}
    return o._replace(**{n: t.contiguous() for n, t in vectors.items() if t is not None and t.dim() == 2})


def _mask(k: ModuleType, o: Operands):
    return None if o.seed is None else k.gemm_lowrank.Mask(o.seed, dropout.threshold(o.p), 1 / (1 - o.p))


def forward(k: ModuleType, o: Operands, groups: Groups, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``core.groups.forward``; k: the kernel modules."""
    P = o.x.shape[0] if groups.rows is None else groups.rows.shape[0]
    _fits(o, groups, P)
    routing, o, mask, T, update = k.grouped.Routing(groups.offs, groups.rows, P), _dense(o), _mask(k, o), None, None
    if o.A is not None:
        threshold, rescale = (0, 1.0) if mask is None else mask[1:]
        T, S = k.grouped.project(routing, o.x, o.d_in, o.A, o.a, o.G, o.h, o.seed, threshold, rescale)
        update = k.gemm_lowrank.Update(S, o.B, o.s)
    N = o.c.shape[1] if o.c is not None else (o.B if o.w is None else o.w).shape[1]
    result = k.grouped.gemm(
        routing, groups.rows, o.x, o.w, o.x, N, update, o.c, o.d_in, o.d_out, o.bias, o.d_out is None or o.scale_bias,
        want_z=keep_z,
    )  # fmt: skip
    return result.y, T, result.z


def backward(
    k: ModuleType, dy: Tensor, o: Operands, groups: Groups, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """As ``core.groups.backward``; k: the kernel modules."""
    P, dt, o, want, mask = dy.shape[0], dy.dtype, _dense(o), Operands(*need), _mask(k, o)
    routing = k.grouped.Routing(groups.offs, groups.rows, P)
    of_rows = lambda v: v.to(dt)[group_of(groups.offs, P)]  # noqa: E731
    grads, dT, sums = Operands(), None, {}
    if want.c:
        grads = grads._replace(c=dy if o.d_out is None else dy * of_rows(o.d_out))
    into_x = want.x or want.d_in
    if o.A is not None and (into_x or want.A or want.a):
        dT = k.grouped.project_back(routing, dy, o.d_out, o.B, o.G, o.h, T, o.s)
    if into_x and (o.w is not None or dT is not None):
        masked, update = mask is not None and dT is not None, None
        if dT is not None:
            update = k.gemm_lowrank.Update(dT, o.A.mT, mask.rescale if masked else 1.0, masked)
        K, wt = (o.A if o.w is None else o.w).shape[2], None if o.w is None else o.w.mT
        scale = None if want.d_in else o.d_in
        dx = k.grouped.gemm(routing, None, dy, wt, dy, K, update, None, o.d_out, scale, mask=mask).y
        if want.d_in:
            dots = k.outer.OverDy(o.x, z=dx)
            sums["d_in"] = k.grouped.reduce_rows(routing, dots, None, groups.rows)["dot"]
            dx = dx.mul_(of_rows(o.d_in)) if want.x else dx
        if want.x:
            grads = grads._replace(x=groups.gathered(dx))
    return list(_reductions(k, routing, dy, o, T, z, dT, mask, want, grads, sums)[: len(need)])


def _reductions(k, routing, dy, o, T, z, dT, mask, want, grads, sums) -> Operands:
    """The gradients that are sums over a group's rows."""
    into_b, first, second, over = want.B or want.G, None, None, k.outer
    if into_b or want.bias or want.d_out:
        first = over.OverDy(
            dy, T if into_b else None, o.h, o.d_out, o.s, want.bias, o.scale_bias and o.d_out is not None,
            z if want.d_out else None,
        )  # fmt: skip
    if want.A:
        second = over.OverX(o.x, dT, o.d_in, *(() if mask is None else mask), sums=want.a)
    found = {} if first is None and second is None else k.grouped.reduce_rows(routing, first, second)
    if want.a and not want.A:  # x is not kept then
        found["da"] = k.grouped.reduce_rows(routing, over.OverDy(dT, sums=True), None)["sum"]
    names = {"bias": "sum", "d_out": "dot", "A": "dA", "a": "da"}
    sums |= {name: found[key] for name, key in names.items() if key in found}
    if into_b:
        BG = found["dB"].to(o.B.dtype)
        if o.G is None:
            sums["B"] = BG
        elif o.G.dim() == 2:
            sums |= {"B": BG * o.G[:, None], "G": (BG * o.B).sum(1)}
        else:
            sums |= {"B": BG @ o.G.mT, "G": o.B.mT @ BG}
    wanted = {n: t for n, t in sums.items() if getattr(want, n)}
    return grads._replace(**{n: t.to(getattr(o, n).dtype) for n, t in wanted.items()})
