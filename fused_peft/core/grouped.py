"""The differentiable call on rows in groups (``groups``): experts' rows, or a batch whose rows use different adapters.

What is kept for backward is what ``ops`` keeps: x as it came, T (P, r) where the low-rank path trains, z (P, N) where
d_out trains, a dropout seed; of the routing the offsets and two index vectors, and no sorted copy of x. One functional
pair, ``fused_peft::grouped`` and ``fused_peft::grouped_backward``, serves torch.compile and export; eager calls take
the same pair through an autograd.Function.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import ops
from .dispatch import backend_for
from .dropout import keep_mask, new_seed
from .factors import Factors
from .groups import Groups, at, one_for_all
from .operands import SCHEMA, TENSORS, Operands, Problem, call_of
from .torch_internals import function_apply, tracing, transforming

_ROUTING = "Tensor offs, Tensor? rows, Tensor? back, Tensor? of"


def linear(
    x: Tensor,
    w: Tensor | None,
    f: Factors,
    groups: Groups,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """y (P, N) in the order of the groups, differentiable once in x and in every factor; the weight stays frozen.

    x (M, K), of which each group reads its rows by ``groups``; w (E, N, K) in x's dtype, any strides (a group stride of
    0: one weight for all), or None where c (P, N) takes the place of x̂Wᵀ; bias (E, N) is used unless ``f.bias`` is
    given. Every tensor of ``f`` is stacked: A (E, r, K), B (E, N, r), G (E, r) or (E, r, r), d_in (E, K), d_out (E, N),
    bias (E, N). Dropout draws one mask for (P, K). Groups in runs (``Groups.of``) leave rows where they are: LoRA's
    form on one weight alone, and where a run is of no group one bias too (group stride 0). Autocast as in
    ``ops.linear``. Raises ValueError or TypeError when shapes, dtypes or devices do not fit, and for a routing that
    names no group.
    """
    bias = bias if f.bias is None else f.bias
    if ops.autocasting(x) and x.dtype != torch.float64:
        dt = torch.get_autocast_dtype(x.device.type)
        x, w, c = (None if t is None else t.to(dt) for t in (x, w, c))
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, w, f, groups, bias, c, training, seed)
    if not is_compiling():
        _check(x, w, f, groups, bias, c)
    p = f.p if training else 0.0
    seed = None if not p else new_seed(x.device) if seed is None else seed
    o = call_of(x, w, f, bias, c, seed, p)
    if transforming():
        return written_out(o, groups, f)
    if is_compiling():
        keep_z = f.d_out is not None and f.d_out.requires_grad and torch.is_grad_enabled()
        return torch.ops.fused_peft.grouped(*o, *groups, keep_z)[0]
    if tracing():
        if p:
            raise RuntimeError(
                "torch.jit.trace of rows in groups with dropout on would fix one mask; call model.eval()"
            )
        return written_out(o, groups, f)
    backend = backend_of(o, groups)
    if torch.is_grad_enabled():
        return _apply(backend, groups, *o)
    return backend.grouped_forward(o, groups, False)[0]


def written_out(o: Operands, groups: Groups, f: Factors) -> Tensor:
    """The call in plain differentiable PyTorch, a group at a time: for functional transforms, and to check by."""
    x, parts = groups.read(o.x), []
    keep = keep_mask(o.seed, x.shape, o.p) if o.seed is not None else None
    f = replace(f.to(x.dtype), bias=None)
    of = range(len(groups.offs)) if groups.of is None else groups.of.tolist()
    for e, (b, t) in zip(of, pairwise([0, *groups.offs.tolist()]), strict=True):
        if e < 0:
            z = o.c[b:t] if o.w is None else x[b:t] @ o.w[0].mT
            parts.append(z if o.bias is None else z + o.bias[0].to(x.dtype))
            continue
        one = [None if v is None else v[e] for v in (o.w, o.bias)]
        bias = None if one[1] is None else one[1].to(x.dtype)
        rest = [None if v is None else v[b:t] for v in (o.c, keep)]
        parts.append(f.at(e).expression(x[b:t], one[0], bias, *rest))
    return torch.cat(parts)


def _check(x: Tensor, w: Tensor | None, f: Factors, groups: Groups, bias: Tensor | None, c: Tensor | None) -> None:
    """Raise the error that says what does not fit."""
    E = groups.offs.shape[0] if groups.of is None else f.A.shape[0] if f.A is not None else 0
    P = x.shape[0] if groups.rows is None else groups.rows.shape[0]
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but rows in groups are a matrix (M, in_features); reshape it")
    K = next((t.shape[-1] for t in (w, f.A, f.d_in) if t is not None), x.shape[1])
    if x.shape[1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={K}")
    if w is not None and (w.dtype != x.dtype or w.device != x.device):
        if w.device != x.device:
            raise ValueError(f"x is on {x.device} but the weights are on {w.device}; move one with .to()")
        raise TypeError(f"x has dtype {x.dtype} but the weights have {w.dtype}; cast x, or run under torch.autocast")
    stacks = {"w": w, "bias": bias, **{n: getattr(f, n) for n in ("A", "B", "G", "a", "d_in", "d_out")}}
    for name, t in stacks.items():
        if t is not None and (t.dim() < 2 or t.shape[0] != E):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but one for each of {E} groups is needed, ({E}, ...)")
    if groups.of is not None:
        others = f.A is None or f.h != "identity" or f.drop_base or f.hadamard
        if others or any(t is not None for t in (f.G, f.a, f.d_in, f.d_out)) or not (w is None or one_for_all(w)):
            raise ValueError("groups in runs (of) take LoRA's form on one weight (a group stride of 0)")
    if f.A is not None and f.A.shape[1] != f.B.shape[2]:
        raise ValueError(f"A has rank {f.A.shape[1]} and B {f.B.shape[2]}; they must be equal")
    if c is not None and c.shape[0] != P:
        raise ValueError(f"c has {c.shape[0]} rows, but the groups have {P}")


def backend_of(o: Operands, groups: Groups):
    """The backend of a call in groups."""
    return backend_for(o, lambda o: problem_of(o, groups))


def problem_of(o: Operands, groups: Groups) -> Problem:
    """The call as a backend judges it."""
    rows = o.x.shape[0] if groups.rows is None else groups.rows.shape[0]
    one = Problem.of(at(o._replace(bias=None), 0, bias=o.bias))
    if groups.of is None:
        return replace(one, M=rows, groups=groups.offs.shape[0])
    return replace(one, M=rows, groups=o.A.shape[0], present=one.present | {"runs"})


def _kept(o: Operands, need: tuple[bool, ...]) -> tuple[tuple[Tensor | None, ...], bool]:
    """(what backward reads of the operands, whether it reads T)."""
    if need[ops._W]:
        raise RuntimeError("the weights of experts stay frozen in the fused call; set requires_grad_(False) on them")
    read_x, read_T = ops._reads(need, o.h, o.hadamard)
    return o.kept(read_x, need[ops._BIAS]), read_T


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, groups, *operands):
        need = ctx.needs_input_grad[2 : TENSORS + 2]
        o = Operands(*operands)
        kept, read_T = _kept(o, need)
        y, T, z = backend.grouped_forward(o, groups, need[ops.D_OUT])
        ctx.save_for_backward(*kept, T if read_T else None, z, *groups)
        ctx.rest = (backend, need, operands[TENSORS:])
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        backend, need, scalars = ctx.rest
        nones = (None,) * len(scalars)
        if dy is None:
            return (None, None, *(None,) * TENSORS, *nones)
        saved = ctx.saved_tensors
        T, z, *groups = saved[TENSORS:]
        o = Operands(*saved[:TENSORS], *scalars)
        with ops.no_autocast(dy.device.type):
            grads = backend.grouped_backward(dy.contiguous(), o, Groups(*groups), T, z, need)
        return (None, None, *grads, *nones)


_apply = function_apply(_Grouped)


@torch.library.custom_op(
    "fused_peft::grouped",
    mutates_args=(),
    schema=f"({SCHEMA}, {_ROUTING}, bool keep_z) -> (Tensor, Tensor, Tensor)",
)
def _grouped_op(*args):
    *operands, offs, rows, back, of, keep_z = args
    o, groups = Operands(*operands), Groups(offs, rows, back, of)
    y, T, z = backend_of(o, groups).grouped_forward(o, groups, keep_z)
    nothing = o.x.new_empty(0)
    if z is not None and z.data_ptr() == y.data_ptr():
        z = z.clone()
    return y, nothing if T is None else T, nothing.clone() if z is None else z


@_grouped_op.register_fake
def _(*args):
    *operands, _, rows, _, _, keep_z = args
    o = Operands(*operands)
    P = (o.x if rows is None else rows).shape[0]
    N = o.c.shape[-1] if o.c is not None else (o.B if o.w is None else o.w).shape[1]
    T = o.x.new_empty(0) if o.A is None or o.hadamard else o.x.new_empty(P, o.A.shape[1])
    return o.x.new_empty(P, N), T, o.x.new_empty(P, N) if keep_z else o.x.new_empty(0)


@torch.library.custom_op(
    "fused_peft::grouped_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {SCHEMA}, {_ROUTING}, Tensor? T, Tensor? z, bool[] need) -> Tensor[]",
)
def _grouped_backward_op(dy, *args):
    *operands, offs, rows, back, of, T, z, need = args
    o, groups = Operands(*operands), Groups(offs, rows, back, of)
    like = o._replace(x=dy if o.x is None else o.x)
    grads = backend_of(like, groups).grouped_backward(dy.contiguous(), o, groups, T, z, tuple(need))
    parts = lambda g: g.untyped_storage().nbytes() != g.nbytes or not g.is_contiguous()  # noqa: E731
    return [
        g.clone(memory_format=torch.contiguous_format) if parts(g) or g is dy else g for g in grads if g is not None
    ]


@_grouped_backward_op.register_fake
def _(dy, *args):
    *operands, offs, _, back, of, _, _, need = args
    o = Operands(*operands)
    M = dy.shape[0] if back is None else back.shape[0]
    dx = dy.new_empty(M, next(t for t in (o.w, o.A, o.x) if t is not None).shape[-1])
    dbias = None if o.bias is None else o.bias.new_empty(len(offs if of is None else o.A), dy.shape[-1])
    like = o._replace(x=dx, c=dy, bias=dbias)
    return [t.new_empty(t.shape) for t, wanted in zip(like, need, strict=False) if wanted]


def _setup_context(ctx, inputs, output):
    *operands, offs, rows, back, of, keep_z = inputs
    o, (_, T, z) = Operands(*operands), output
    need = tuple(ctx.needs_input_grad[:TENSORS])
    kept, read_T = _kept(o, need)
    ctx.save_for_backward(*kept, T if read_T else None, z if keep_z else None, offs, rows, back, of)
    ctx.rest = (need, operands[TENSORS:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dT, dz):
    need, scalars = ctx.rest
    nones = (*([] if isinstance(s, list) else None for s in scalars), None, None, None, None, None)
    if dy is None:
        return (*(None,) * TENSORS, *nones)
    saved = ctx.saved_tensors
    T, z, *groups = saved[TENSORS:]
    found = iter(torch.ops.fused_peft.grouped_backward(dy, *saved[:TENSORS], *scalars, *groups, T, z, list(need)))
    return (*(next(found) if wanted else None for wanted in need), *nones)


_grouped_op.register_autograd(_backward, setup_context=_setup_context)
