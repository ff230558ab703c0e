"""One layer on a batch whose samples use different adapters: y_i = layer with the adapter of sample i on x_i.

Adapters of LoRA's form, W + s·B G A with a bias, whatever their ranks and scales, go through one grouped call, in which
samples without an adapter are rows of no group. Ranks are padded with zeros and scales go into B, so that they stack:

    A (E, r, K)   B (E, N, r) = s_e·B_e G_e        r the largest rank

Adapters of another form or dropout probability are calls of their own on their samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import grouped, ops
from ..core.factors import Factors
from ..core.groups import FEW, Groups

BASE = "__base__"  # PEFT's name for a sample without an adapter


class Chosen(tuple):
    """The adapter of each sample, by name, as adapter_batch hands it to the layers."""


def length_error(names: Sequence[str], x: Tensor) -> str:
    return (
        f"names has {len(names)} entries, one a sample, but the batch that reaches a layer has {x.shape[0]} "
        f"(x {tuple(x.shape)}); give a name for each sample, for each beam where generate searches with several"
    )


def mixed(
    x: Tensor,
    names: Sequence[str | None],
    form: Callable[[str], Factors | None],
    alone: Callable[[str | None, Tensor], Tensor],
    base: Callable[[Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]] | None,
    training: bool = True,
) -> Tensor:
    """y (S, ..., N) of samples x (S, ..., K), each with the adapter of its name, None for none.

    form(name): its factors where they may join a grouped call. alone(name, x): the layer with that adapter. base(x):
    (w (N, K), bias (N,), None), or (None, bias, C + bias) of a base that computes C by itself; None where no call may
    be grouped.
    """
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return alone(distinct[0], x)
    found = {n: form(n) for n in distinct if n is not None} if base is not None else {}
    parts: dict[object, list[str | None]] = {}  # what is computed together -> its adapters
    for name in distinct:
        if name is not None:
            f = found.get(name)
            parts.setdefault(("alone", name) if f is None else f.p if training else 0.0, []).append(name)
    if None in distinct:
        parts.setdefault(next((key for key in parts if not isinstance(key, tuple)), ("alone", None)), []).append(None)
    if len(parts) == 1:
        return _grouped(x, names, found, base(x), training)
    order, done = [], []
    for members in parts.values():
        rows = [i for i, name in enumerate(names) if name in members]
        part = x.index_select(0, torch.tensor(rows, device=x.device))
        if len(members) == 1:
            done.append(alone(members[0], part))
        else:
            done.append(_grouped(part, [names[i] for i in rows], found, base(part), training))
        order += rows
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(done).index_select(0, torch.tensor(back, device=x.device))


def lora_form(f: Factors) -> Factors | None:
    """The same factors without G, where they are the frozen product, s·B A and a bias; None for another form."""
    others = f.A is None or f.h != "identity" or f.drop_base or f.hadamard
    if others or any(t is not None for t in (f.a, f.d_in, f.d_out)):
        return None
    if f.G is None:
        return f
    B = f.B * f.G if f.G.dim() == 1 else f.B @ f.G
    return Factors(A=f.A, B=B, bias=f.bias, s=f.s, p=f.p)


def _grouped(
    x: Tensor,
    names: Sequence[str | None],
    found: dict[str, Factors],
    base: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
) -> Tensor:
    w, bias, c = base
    of, factors = {None: -1}, []
    for name in names:
        if name not in of:
            of[name] = len(factors)
            factors.append(found[name])
    biases = None
    if any(f.bias is not None for f in factors):
        own = [bias if f.bias is None else f.bias for f in factors]
        if None in names:  # a group of zeros, whose bias is the layer's
            of[None] = len(factors)
            factors.append(
                Factors(A=factors[0].A.new_zeros(1, factors[0].A.shape[1]), B=factors[0].B[:, :1].detach() * 0)
            )
            own.append(bias)
        like = next(f.bias for f in factors if f.bias is not None)
        own = [torch.zeros_like(like) if b is None else b for b in own]
        biases = torch.stack(own if c is None or bias is None else [b - bias for b in own])
    elif bias is not None and c is None:
        biases = bias.expand(len(factors), -1)
    f, each = stacked(factors), [of[name] for name in names]
    back = None
    if (per := x[0].numel() // x.shape[-1]) <= FEW:  # so short that sorting costs less than a run for each sample
        order = sorted(range(len(each)), key=lambda i: each[i] % (len(factors) + 1))  # those of no group last
        if order != [*range(len(each))]:
            back = torch.tensor(sorted(range(len(each)), key=order.__getitem__), device=x.device)
            order, each = torch.tensor(order, device=x.device), [each[i] for i in order]
            x, c = x.index_select(0, order), None if c is None else c.index_select(0, order)
    groups = runs(tuple(each), per, x.device)
    rows = x.reshape(-1, x.shape[-1])
    if c is None:
        y = grouped.linear(rows, w.expand(len(factors), *w.shape), f, groups, biases, None, training)
    else:
        with ops.no_autocast(c.device.type):  # which c's dtype has settled
            c = c.reshape(-1, c.shape[-1])
            y = grouped.linear(rows.to(c.dtype), None, f, groups, biases, c, training)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if back is None else y.index_select(0, back)


def stacked(factors: Sequence[Factors]) -> Factors:
    """Factors of LoRA's form as stacks, differentiable in each: A (E, r, K), B (E, N, r)."""
    r = max(f.A.shape[0] for f in factors)
    s = factors[0].s
    alike = all(f.s == s for f in factors)
    A = [f.A if f.A.shape[0] == r else F.pad(f.A, (0, 0, 0, r - f.A.shape[0])) for f in factors]
    B = [f.B if alike else f.B * f.s for f in factors]
    B = [b if b.shape[1] == r else F.pad(b, (0, r - b.shape[1])) for b in B]
    return Factors(A=_stack(A), B=_stack(B), s=s if alike else 1.0, p=factors[0].p)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.stack([t.to(dtype) for t in tensors])


@lru_cache(maxsize=256)
def runs(of: tuple[int, ...], rows: int, device: torch.device) -> Groups:
    """The runs of a batch of samples of that many rows, sample i of group of[i]; neighbours of one group are one."""
    ends, groups = [], []
    for i, e in enumerate(of, 1):
        if groups and groups[-1] == e:
            ends[-1] = i * rows
        else:
            ends.append(i * rows)
            groups.append(e)
    with torch.inference_mode(False):  # kept: a call that trains saves them
        offs = torch.tensor(ends, dtype=torch.int32, device=device)
        return Groups(offs, of=torch.tensor(groups, device=device))
