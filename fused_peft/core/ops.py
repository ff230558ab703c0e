"""The differentiable call: y = d_out ⊙ (C + s·h(drop(x⊙d_in)Aᵀ + a)GᵀBᵀ) + bias, and all its gradients.

This file alone owns what is kept for backward: x where A, d_in or W trains, T (M, r) where the low-rank path trains,
z (M, N) where d_out trains, and a dropout seed of two words (of the bias only an empty tensor, for its dtype). One
functional pair, ``fused_peft::linear`` and ``fused_peft::linear_backward``, serves torch.compile and export; eager
calls take the same pair through a bare autograd.Function, which costs a third of a registered op's host time. Of few
rows the product with a weight in parts is a call of its own, ``fused_peft::product``, and the rest one beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import eager
from .dispatch import backend_for, is_eager
from .dropout import keep_mask, new_seed
from .factors import ACTIVATIONS, Factors
from .frozen import Stored, decode, multiplied
from .operands import SCHEMA, TENSORS, Operands, call_of
from .torch_internals import autocast_is_on, function_apply, tracing, transforming

host: ModuleType | None = None  # csrc/replay.cpp, once ``backends.replay`` has loaded it
ACTIVATION_NAMES = tuple(ACTIVATIONS)
FEW = 64  # rows up to which a product with a weight in parts is a call of its own
FORWARD, BACKWARD, NORM, OP_FORWARD, OP_BACKWARD = range(5)  # kinds of calls that it replays


def _replays(x: Tensor) -> bool:
    return not (is_eager(x) or is_compiling() or transforming() or tracing())


def tf32(x: Tensor) -> bool:
    """Whether products of x may be taken in tf32; not allow_tf32: reading it raises once a user has set this."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def flags(f: Factors | Operands, x: Tensor) -> int:
    """What a call says with yes and no, as bits."""
    return f.scale_bias | f.drop_base << 1 | f.hadamard << 2 | tf32(x) << 3


def on_dtensors() -> ModuleType:
    """The module whose ``linear`` and ``row_norm`` take DTensors; the package replaces this function."""
    raise RuntimeError("nothing computes on DTensors, since fused_peft itself is not imported")


def linear(
    x: Tensor,
    w: Tensor | Stored | None,
    f: Factors,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """y (..., N) of the expression in ``factors``, differentiable once in every tensor.

    x (..., K) in any floating dtype and any strides; w (N, K) in x's dtype, any strides, or a ``Stored`` one, or None
    when c (..., N) takes the place of x̂Wᵀ; where a ``Stored`` one has a ``compute``, the call is made in that dtype and
    y cast back to x's; bias (N,) is used unless ``f.bias`` is given. Dropout is on when ``f.p`` > 0 and ``training``;
    its seed is ``seed``, int32 (2,), or a new one. On DTensors each process computes its part
    (``distributed.parallel``).
    Under autocast x, w and c are cast to the autocast dtype, whatever ``compute`` is. Factors may have another floating
    dtype than x; their gradients come out in their own. Raises ValueError or TypeError when shapes, dtypes or devices
    do not fit.
    """
    if _distributed(x):
        return on_dtensors().linear(x, w, f, bias, c, training)
    bias = bias if f.bias is None else f.bias
    if autocasting(x):
        x, w, c = _autocast(x, w, c)
        if f.hadamard:
            with torch.autocast(x.device.type, enabled=False):  # B A is formed in its own dtype
                return linear(x, w, f, bias, c, training, seed)
    parts, spec, values = (), "", None
    if type(w) is Stored:
        if x.shape[-1:] != w.shape[1:]:
            _check(x, w)
        if w.compute not in (None, x.dtype):
            x, c, out = x.to(w.compute), None if c is None else c.to(w.compute), x.dtype
            return linear(x, w, f, bias, c, training, seed).to(out)
        values = w.values if w.values is not None and w.values.dtype == x.dtype else None
        if values is None and _apart(x, f, training):
            c = _times_stored(x if f.d_in is None else (x * f.d_in).to(x.dtype), w.spec, w.parts)
            if f.A is None and f.d_out is None:
                return c if bias is None else c + bias.to(c.dtype)
            f = f if f.A is not None else replace(f, d_in=None)
        else:
            parts, spec = w.parts, w.spec
        w = None
    if f.d_in is not None and x.shape[-1:] != f.d_in.shape:
        _check(x, w)  # would broadcast
    if f.A is None and w is not None and _native(x, f, bias):
        return _scaled_linear(x, w, f, bias)
    p = f.p if training else 0.0
    seed = None if not p else new_seed(x.device) if seed is None else seed
    if host is not None and not spec and _replays(x):
        try:
            numbers = (
                f.s,
                p,
                ACTIVATION_NAMES.index(f.h),
                f.scale_bias | f.drop_base << 1 | f.hadamard << 2 | tf32(x) << 3,
            )
            y = host.linear(x, w, c, bias, f.d_in, f.d_out, f.A, f.a, f.G, f.B, seed, *numbers)
        except (RuntimeError, IndexError):
            _check(x, w)
            raise
        if y is not None:
            return y
    o = call_of(x, w, f, bias, c, seed, p, parts, spec)
    try:
        if transforming():
            return _expression(o, f)
        if is_compiling():
            keep_z = f.d_out is not None and f.d_out.requires_grad and torch.is_grad_enabled()
            return torch.ops.fused_peft.linear(*o, keep_z)[0]
        if tracing():
            if o.p:
                raise RuntimeError(
                    "torch.jit.trace of a layer with dropout on would fix one mask; call model.eval() first"
                )
            return _expression(o, f)
        if spec:
            o = o.decoded() if values is None else o._replace(w=values)
        backend = backend_for(o)
        if torch.is_grad_enabled():
            return _apply(backend, *o)
        return backend.forward(o, False)[0]
    except (RuntimeError, IndexError):
        _check(x, w)  # the clear error, looked for only once something failed
        raise


def _apart(x: Tensor, f: Factors, training: bool) -> bool:
    """Whether the product with a weight in parts is taken by itself: of few rows a kernel can decode in its loop, and
    the rest of the call is as beside any product, so that it is replayed."""
    taken = x.numel() <= FEW * x.shape[-1] and apart_in_form(f, training)
    return x.numel() > 0 and taken and not (is_eager(x) or transforming() or (not is_compiling() and tracing()))


def apart_in_form(f: Factors, training: bool) -> bool:
    """Whether nothing of a call acts on the product with the weight itself."""
    return not (f.hadamard or (f.drop_base and f.p and training))


def _times_stored(x: Tensor, spec: str, parts: tuple[Tensor, ...]) -> Tensor:
    """x Wᵀ (..., N) of x (..., K) and a weight in parts, which alone are kept."""
    rows = x.reshape(-1, x.shape[-1])
    if is_compiling():
        z = torch.ops.fused_peft.product(rows, parts, spec, False)
    elif torch.is_grad_enabled():
        z = _product(spec, rows, *parts)
    else:
        z = multiplied(rows, spec, parts, False)
    return z.view(*x.shape[:-1], z.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, *parts):
        ctx.save_for_backward(*parts)
        ctx.spec = spec
        return multiplied(x, spec, parts, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        parts = ctx.saved_tensors
        return None, multiplied(dz, ctx.spec, parts, True), *(None for _ in parts)


_product = function_apply(_Product)


@torch.library.custom_op("fused_peft::product", mutates_args=())
def _product_op(x: Tensor, parts: list[Tensor], spec: str, back: bool) -> Tensor:
    return multiplied(x, spec, parts, back)


@_product_op.register_fake
def _(x, parts, spec, back):
    return x.new_empty(x.shape[0], decode(spec, parts, x.dtype).shape[back])


def _keep_parts(ctx, inputs, output):
    _, parts, ctx.spec, ctx.back = inputs
    ctx.save_for_backward(*parts)


def _product_backward(ctx, dz):
    parts = list(ctx.saved_tensors)
    return torch.ops.fused_peft.product(dz, parts, ctx.spec, not ctx.back), [None] * len(parts), None, None


_product_op.register_autograd(_product_backward, setup_context=_keep_parts)


def _native(x: Tensor, f: Factors, bias: Tensor | None) -> bool:
    """Whether PyTorch's own autograd does for a call without a low-rank term: eager, every tensor of one dtype. It then
    keeps what the fused call would, and its host time is less."""
    tensors = (t for t in (f.d_in, f.d_out, bias) if t is not None)
    return is_eager(x) and all(t.dtype == x.dtype for t in tensors) and not (is_compiling() or transforming())


def _scaled_linear(x: Tensor, w: Tensor, f: Factors, bias: Tensor | None) -> Tensor:
    """y = d_out ⊙ (x ⊙ d_in)Wᵀ + bias, or with the bias scaled too."""
    inside = f.d_out is None or f.scale_bias
    z = plain_linear(x if f.d_in is None else x * f.d_in, w, bias if inside else None)
    if f.d_out is None:
        return z
    return z * f.d_out if inside or bias is None else torch.addcmul(bias, z, f.d_out)


def _expression(o: Operands, f: Factors) -> Tensor:
    """The call written out, for vmap, grad, jvp and the like, which see through PyTorch's own operations only."""
    keep = keep_mask(o.seed, o.x.shape, o.p) if o.p else None
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    return replace(f.to(o.x.dtype), bias=None).expression(o.x, o.decoded().w, bias, o.c, keep)


def row_norm(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B A‖ per row (N,), not differentiated; W (N, K), squared (N,) = ‖W‖² per row, A (r, K), B (N, r); or of
    stacks of all of them.

    Computed from squared, W Aᵀ and A Aᵀ in squared's dtype (fp32 or wider): nothing of W's shape is made (arXiv
    2402.09353, whose norm is not differentiated).
    """
    if host is not None and W.dim() == 2 and not _distributed(W):
        if (norm := _replayed_norm(W, squared, A, B, s)) is not None:
            return norm
    A, B = A.detach(), B.detach()
    if _distributed(W):
        return on_dtensors().row_norm(W, squared, A, B, s)
    if is_compiling() and not transforming():
        return torch.ops.fused_peft.row_norm(W, squared, A, B, s)
    if transforming():
        return eager.row_norm(W, squared, A, B, s)
    with torch.no_grad():
        return _row_norm_op_body(W, squared, A, B, s)


def _replayed_norm(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor | None:
    return host.norm(W, squared, A, B, s, tf32(W) << 3) if _replays(W) else None


def _row_norm_op_body(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    with no_autocast(W.device.type):  # the norm is summed in fp32
        if W.dim() == 3:
            return eager.row_norm(W, squared, A, B, s)
        return backend_for(Operands(x=W, A=A, B=B, s=s)).row_norm(W, squared, A, B, s)


def plain_linear(x: Tensor, w: Tensor | Stored, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear with this library's errors; bias (N,) may be of another dtype, as when it trains."""
    if type(w) is Stored:
        return linear(x, w, Factors(), bias)
    if bias is not None and bias.dtype != x.dtype and not autocasting(x):
        bias = bias.to(x.dtype)
    try:
        return F.linear(x, w, bias)
    except RuntimeError:
        _check(x, w)
        raise


def formed_linear(x: Tensor, form: Callable[..., Tensor], tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """y = x W'ᵀ + bias with W' = form(*tensors) (N, K) made anew in forward and in backward: only x is kept.

    x (..., K), bias (N,) or None; gradients in x, the tensors and bias, once differentiable. Compiled, and on DTensors,
    PyTorch's own autograd decides what is kept, W' included.
    """
    if autocasting(x):
        (x,) = _autocast(x)
        with torch.autocast(x.device.type, enabled=False):  # W' is formed in its own dtype and rounded once
            return formed_linear(x, form, tensors, bias)
    if is_compiling() or transforming() or tracing() or not torch.is_grad_enabled() or _distributed(x):
        w = form(*tensors).to(x.dtype)
        return plain_linear(x, w, bias if bias is None else bias.to(x.dtype))
    try:
        return _Formed.apply(form, x, bias, *tensors)
    except RuntimeError:
        with torch.no_grad():
            _check(x, form(*tensors).to(x.dtype))
        raise


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, x, bias, *tensors):
        ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *tensors)
        ctx.set_materialize_grads(False)
        return F.linear(x, form(*tensors).to(x.dtype), bias if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need = ctx.needs_input_grad[1:]
        if dy is None:
            return (None,) * (1 + len(need))
        x, *tensors = ctx.saved_tensors
        with no_autocast(dy.device.type):
            return None, *_formed_gradients(ctx.form, ctx.bias_dtype, dy, x, tensors, *need)


def _formed_gradients(form, bias_dtype, dy, x, tensors, want_x, want_bias, *wanted):
    """dx, dbias and the gradient of each tensor that the weight is formed from, None where not wanted."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():
        w = form(*leaves).to(dy.dtype)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = torch.mm(rows, eager.by_columns(w.detach())).view(*dy.shape[:-1], w.shape[1]) if want_x else None
    dbias = eager.row_sum(rows, bias_dtype) if want_bias else None
    grads = iter(())
    if any(wanted):
        dw = torch.mm(rows.t(), x.reshape(-1, x.shape[-1]))
        grads = iter(torch.autograd.grad(w, [t for t, need in zip(leaves, wanted, strict=True) if need], dw))
    return dx, dbias, *(next(grads) if need else None for need in wanted)


def _distributed(t: Tensor) -> bool:
    """Whether t is a DTensor."""
    return type(t) is not Tensor and hasattr(t, "device_mesh")


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's device; PyTorch has none for meta, and raises when asked."""
    return autocast_is_on() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def read(w: Stored, x: Tensor) -> Stored:
    """w with its values, where they are read in the dtype in which a call on x is made: one decoded copy serves both.
    Compiled, each call is an operation of its own that decodes."""
    dtype = _autocast_dtype(x) if autocasting(x) else w.compute or x.dtype
    return w if is_compiling() or dtype != w.dtype else w._replace(values=decode(w.spec, w.parts, dtype))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def no_autocast(device: str):
    """For what is computed in the dtypes that it comes in: a backward, whose forward settled them, or a norm."""
    on = device != "meta" and autocast_is_on()
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _autocast(*tensors: Tensor | Stored | None) -> list[Tensor | Stored | None]:
    """What autocast, where it is on, does to a matmul's inputs."""
    dt = _autocast_dtype(tensors[0])
    if dt == torch.float64:
        return tensors
    return [t.to(dt) if isinstance(t, Tensor) else t if t is None else t._replace(compute=None) for t in tensors]


def _check(x: Tensor, w: Tensor | Stored | None) -> None:
    """Raise the error that says what does not fit between x (..., K) and w (N, K), if anything does not."""
    if w is None or (x.shape[-1:] == w.shape[1:] and x.dtype == w.dtype and x.device == w.device):
        return
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={w.shape[1]}; check the layer "
            "that feeds this one"
        )
    if x.device != w.device:
        raise ValueError(f"x is on {x.device} but the weight is on {w.device}; move one with .to()")
    raise TypeError(f"x has dtype {x.dtype} but the weight has {w.dtype}; cast x, or run under torch.autocast")


@lru_cache
def _reads(need: tuple[bool, ...], h: str, hadamard: bool) -> tuple[bool, bool]:
    """Whether backward reads x, and T, to compute the wanted gradients."""
    want = Operands(*need)
    if hadamard:
        return want.A or want.B or want.w or want.d_in, False
    x = want.A or want.d_in or want.w
    T = want.B or want.G or (h != "identity" and (want.x or want.d_in or want.A or want.a))
    return x, T


D_OUT = Operands._fields.index("d_out")
_C = Operands._fields.index("c")
_W = Operands._fields.index("w")
_BIAS = Operands._fields.index("bias")
_NOT_TENSORS = (None,) * (len(Operands._fields) - TENSORS)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *operands):
        need = ctx.needs_input_grad[1 : TENSORS + 1]
        o = Operands(*operands)
        y, T, z = backend.forward(o, need[D_OUT])
        read_x, read_T = _reads(need, o.h, o.hadamard)
        ctx.save_for_backward(*o.kept(read_x, need[_BIAS]), T if read_T else None, z, *o.parts)
        ctx.rest = (backend, need, operands[TENSORS + 1 :])
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if dy is None:
            return (None, *(None,) * TENSORS, *_NOT_TENSORS)
        backend, need, scalars = ctx.rest
        saved = ctx.saved_tensors
        T, z, *parts = saved[TENSORS:]
        o = Operands(*saved[:TENSORS], parts, *scalars)
        with no_autocast(dy.device.type):
            return (None, *_gradients(backend, dy, o, T, z, need), *_NOT_TENSORS)


def _gradients(backend, dy: Tensor, o: Operands, T, z, need) -> list[Tensor | None]:
    """The backend's backward, on the weight as a matrix."""
    if o.spec:
        o = o._replace(w=decode(o.spec, o.parts, dy.dtype))
    return backend.backward(dy, o, T, z, need)


# Function.apply less its functorch handling, which ``linear`` has already ruled out: 2 µs a call
_apply = function_apply(_Linear)


@torch.library.custom_op(
    "fused_peft::linear", mutates_args=(), schema=f"({SCHEMA}, bool keep_z) -> (Tensor, Tensor, Tensor)"
)
def _linear_op(*args):
    *operands, keep_z = args
    o = Operands(*operands).decoded()
    return tuple(_replayed(o.x, OP_FORWARD, o, (), (keep_z,)) or op_forward(backend_for(o), o, keep_z))


def op_forward(backend, o: Operands, keep_z: bool) -> list[Tensor]:
    """y, T and z of the functional op: tensors all, which share no memory."""
    y, T, z = backend.forward(o, keep_z)
    if z is not None and z.data_ptr() in (y.data_ptr(), 0 if o.c is None else o.c.data_ptr()):
        z = z.clone()
    nothing = o.x.new_empty(0)
    return [y, nothing if T is None else T, nothing.clone() if z is None else z]


def _replayed(x: Tensor, kind: int, o: Operands, more: tuple[Tensor | None, ...], need) -> list[Tensor] | None:
    """What the op returns, where calls on x are replayed."""
    if host is None or is_eager(x):
        return None
    return host.run(kind, [*o[:TENSORS], *more], o.s, o.p, ACTIVATION_NAMES.index(o.h), flags(o, x), list(need))


@_linear_op.register_fake
def _(*args):
    *operands, keep_z = args
    o = Operands(*operands).decoded()
    M = o.x.numel() // o.x.shape[-1]
    N = o.c.shape[-1] if o.c is not None else (o.B if o.w is None else o.w).shape[0]
    T = o.x.new_empty(0) if o.A is None or o.hadamard else o.x.new_empty(M, o.A.shape[0])
    return o.x.new_empty(*o.x.shape[:-1], N), T, o.x.new_empty(M, N) if keep_z else o.x.new_empty(0)


@torch.library.custom_op(
    "fused_peft::linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {SCHEMA}, Tensor? T, Tensor? z, bool[] need) -> Tensor[]",
)
def _linear_backward_op(dy, *args):
    *operands, T, z, need = args
    o = Operands(*operands)
    if o.spec:
        o = o._replace(w=decode(o.spec, o.parts, dy.dtype))
    grads = _replayed(dy, OP_BACKWARD, o, (T, z, dy), need)
    if grads is None:
        grads = op_backward(op_backward_backend(dy, o, need), dy, o, T, z, need)
    return [g for g in grads if g is not None]


def op_backward_backend(dy: Tensor, o: Operands, need: Sequence[bool]):
    """The backend of the op's backward; x and c need not be kept: dy stands in for what a Problem reads of them."""
    behind = o.w is None or need[_C]
    return backend_for(o._replace(x=dy if o.x is None else o.x, c=dy if behind else None))


def op_backward(backend, dy: Tensor, o: Operands, T, z, need: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that share no memory, as a functional op must return them; a backend may return parts of a buffer."""
    grads = backend.backward(dy, o, T, z, tuple(need))
    parts = lambda g: g is not None and g.untyped_storage().nbytes() != g.nbytes  # noqa: E731
    return [g.clone() if parts(g) else g if g is None else g.contiguous() for g in grads]


@_linear_backward_op.register_fake
def _(dy, *args):
    *operands, _, _, need = args
    o = Operands(*operands)
    if o.spec:
        o = o._replace(w=decode(o.spec, o.parts, dy.dtype))
    dx = dy.new_empty(*dy.shape[:-1], (o.w if o.A is None else o.A).shape[1])
    dbias = None if o.bias is None else o.bias.new_empty(dy.shape[-1])
    like = o._replace(x=dx, c=dy, bias=dbias)  # every other gradient has the form of its operand
    return [t.new_empty(t.shape) for t, wanted in zip(like, need, strict=False) if wanted]


def _setup_context(ctx, inputs, output):
    *operands, keep_z = inputs
    o, (_, T, z) = Operands(*operands), output
    need = tuple(ctx.needs_input_grad[:TENSORS])
    read_x, read_T = _reads(need, o.h, o.hadamard)
    kept = o.kept(read_x, need[_BIAS])
    ctx.save_for_backward(*kept, T if read_T else None, z if keep_z else None, *o.parts)
    ctx.rest = (need, operands[TENSORS + 1 :])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dT, dz):
    need, scalars = ctx.rest
    saved = ctx.saved_tensors
    T, z, *parts = saved[TENSORS:]
    # of the operands that have no gradient a list has one for each of its tensors
    nones = ([None] * len(parts), *_NOT_TENSORS[1:], None)
    if dy is None:
        return (*(None,) * TENSORS, *nones)
    o = Operands(*saved[:TENSORS], parts, *scalars)
    # dc is dy itself when nothing scales it; a functional op must not return its input
    dc_is_dy = need[_C] and o.d_out is None
    asked = [wanted and not (i == _C and dc_is_dy) for i, wanted in enumerate(need)]
    found = iter(torch.ops.fused_peft.linear_backward(dy, *o, T, z, asked))
    grads = [next(found) if wanted else None for wanted in asked]
    if dc_is_dy:
        grads[_C] = dy
    return (*grads, *nones)


@torch.library.custom_op("fused_peft::row_norm", mutates_args=())
def _row_norm_op(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    norm = None if host is None or W.dim() == 3 else _replayed_norm(W, squared, A, B, s)
    return _row_norm_op_body(W, squared, A, B, s) if norm is None else norm


@_row_norm_op.register_fake
def _(W, squared, A, B, s):
    return torch.empty_like(squared)


_linear_op.register_autograd(_backward, setup_context=_setup_context)


def squared_residual(P: Tensor, own_diagonal: bool) -> Tensor:
    """‖R‖² of R = P Pᵀ − target for each matrix of a stack P (L, r, n) -> (L,), differentiable once: ∂/∂P = 4 R P.

    The target is I, or the product's own diagonal. Backward is one batched product with the R that forward made.
    """
    return _SquaredResidual.apply(P, own_diagonal)


class _SquaredResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P, own_diagonal):
        R = torch.bmm(P, P.transpose(1, 2))
        diagonal = torch.diagonal(R, dim1=1, dim2=2)
        if own_diagonal:
            diagonal.zero_()
        else:
            diagonal.sub_(1)
        ctx.save_for_backward(P, R)
        return R.square().sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        P, R = ctx.saved_tensors
        R = R * (4 * grad)[:, None, None]  # symmetric; the gradient in P's own layout, so a Bᵀ's needs no copy
        return (torch.bmm(P.mT, R).mT if P.stride(1) == 1 else torch.bmm(R, P)), None
