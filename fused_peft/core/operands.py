"""What one call of the expression reads, and the call as a backend judges it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import Factors
from .frozen import Form, decode


class Operands(NamedTuple):
    """Everything one call of the expression reads, declared once: the op's schema, its fake, what autograd keeps and
    the order of the gradients follow from this list. Shapes as in ``Factors``; x (..., K), w (N, K), c (..., N).

    The weight is ``w``, or what ``frozen.decode(spec, parts)`` makes of ``parts``: at the top of forward and again of
    backward, so that the parts alone are kept.
    """

    x: Tensor | None = None
    w: Tensor | None = None
    c: Tensor | None = None
    bias: Tensor | None = None
    d_in: Tensor | None = None
    d_out: Tensor | None = None
    A: Tensor | None = None
    a: Tensor | None = None
    G: Tensor | None = None
    B: Tensor | None = None
    seed: Tensor | None = None  # int32 (2,): dropout is on
    parts: Sequence[Tensor] = ()
    s: float = 1.0
    p: float = 0.0
    h: str = "identity"
    scale_bias: bool = False
    drop_base: bool = False
    hadamard: bool = False
    spec: str = ""

    def decoded(self) -> Operands:
        """With the weight as a matrix in x's dtype where it is stored in parts."""
        return self._replace(w=decode(self.spec, self.parts, self.x.dtype)) if self.spec else self

    def factors(self) -> Factors:
        """What ``call_of`` was given, less the bias that replaces a layer's own."""
        return Factors(
            A=self.A, B=self.B, G=self.G, a=self.a, d_in=self.d_in, d_out=self.d_out, s=self.s, h=self.h, p=self.p,
            scale_bias=self.scale_bias, drop_base=self.drop_base, hadamard=self.hadamard,
        )  # fmt: skip

    def kept(self, reads_x: bool, bias: bool) -> tuple[Tensor | None, ...]:
        """The tensors that backward reads, by their places; ``bias``: for its dtype alone, as its gradient's."""
        x, w, _, b, *rest = self[:TENSORS]
        w = None if self.spec else w
        return (x if reads_x else None, w, None, b.new_empty(0) if bias else None, *rest)


_SCHEMA = {"Tensor | None": "Tensor?", "Sequence[Tensor]": "Tensor[]"}  # other types are spelled alike
_TYPES = {name: getattr(kind, "__forward_arg__", kind) for name, kind in Operands.__annotations__.items()}
SCHEMA = ", ".join(f"{_SCHEMA.get(kind, kind)} {name}" for name, kind in _TYPES.items())
TENSORS = list(_TYPES.values()).count("Tensor | None")  # the leading fields: what can have a gradient
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


def place(device: torch.device) -> dict:
    """The fields of a Problem that its device decides."""
    return {
        "device": device.type,
        "arch": torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    }


@dataclass(frozen=True)
class Problem:
    """One call of the expression as a backend judges it: M rows, K in, N out, rank r, and what is present."""

    device: str
    arch: tuple[int, int] | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    M: int
    K: int
    N: int
    r: int
    present: frozenset[str]
    G: str = "none"
    h: str = "identity"
    p: float = 0.0
    scale_bias: bool = False
    drop_base: bool = False
    hadamard: bool = False
    elsewhere: frozenset[str] = frozenset()  # operands on another device than x
    groups: int = 0  # of which each has a weight and factors of its own; 0: one for all rows
    subclasses: frozenset[str] = frozenset()  # operands that are no plain tensors (DTensor, quantised weights)
    stored: Form | None = None  # x times a weight in parts, of few rows, and nothing else

    @classmethod
    def of(cls, o: Operands) -> Problem:
        x, factor = o.x, next((t for t in (o.A, o.d_in, o.d_out) if t is not None), None)
        K = next(t for t in (o.w, o.A, x) if t is not None).shape[-1]
        given = [(n, v) for n, v in zip(o._fields, o[:TENSORS], strict=False) if v is not None]
        return cls(
            **place(x.device),
            dtype=x.dtype,
            adapter_dtype=None if factor is None else factor.dtype,
            M=math.prod(x.shape[:-1]),
            K=K,
            N=next(t for t in (o.w, o.B) if t is not None).shape[0] if o.c is None else o.c.shape[-1],
            r=0 if o.A is None else o.A.shape[0],
            present=frozenset(n for n, _ in given),
            G="none" if o.G is None else ("vector", "matrix")[o.G.dim() - 1],
            h=o.h,
            p=o.p if o.seed is not None else 0.0,
            scale_bias=o.scale_bias,
            drop_base=o.drop_base and o.seed is not None,
            hadamard=o.hadamard,
            elsewhere=frozenset(f"{n} on {v.device}" for n, v in given if v.device != x.device),
            subclasses=frozenset(f"{n} is a {type(v).__name__}" for n, v in given if type(v) not in _PLAIN),
        )


def call_of(x, w, f: Factors, bias, c, seed, p: float, parts: Sequence[Tensor] = (), spec: str = "") -> Operands:
    """The operands of a call with these factors."""
    return Operands(
        x, w, c, bias, f.d_in, f.d_out, f.A, f.a, f.G, f.B, seed, parts,
        f.s, p, f.h, f.scale_bias, f.drop_base, f.hadamard, spec,
    )  # fmt: skip


def foreseen(f: Factors, x: Tensor, w: Tensor | None, bias, c, training: bool, device: torch.device) -> Problem:
    """The Problem of a call on ``device`` with these factors, without making it; x and c may be on the meta device."""
    seed = x if f.p and training else None
    o = call_of(x, w, f, bias, c, seed, f.p)
    return replace(Problem.of(o), elsewhere=frozenset(), **place(device))
