"""Adapters as plain LoRA, W + B A with scaling 1, which servers read that know no other method.

Whether an adapter can be written so is read off its ``Factors``: A and s·B G are stored where a low-rank product is all
that it adds; a method that trains on a residual brings that along, at twice the rank. Every layer has one rank, filled
up with zeros, and lora_alpha equals it: vLLM, SGLang and llama.cpp read ``r`` and ``lora_alpha`` and no table of layers
that differ. ``rank`` asks for the best approximation, by SVD, of whatever can be merged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.factors import Factors, NotMergeableError
from ..core.sharded import is_spread, reshard, whole
from ..methods import LoraConfig, PeftConfig, method_of
from ..methods.base import positive_int
from ..methods.svd import decomposed
from .adapted import few, layers, plain_name, unwrap
from .adapter import Bound, factors_of, merged
from .adapter_config import reads_in_peft
from .checks import refuse_vanished
from .holder import DEFAULT, Gathered
from .prompt import SoftPromptConfig
from .save import PREFIX, disk_name, finder, folder, slots_beside, stacked_slot, write
from .state import refuse_while_disabled, state_of


class Piece(NamedTuple):
    """One layer's adapter, whoever holds its tensors.

    name, stored: of the layer in the model, and on disk.
    factors: its own and those of the residual it trains on, each of one matrix or stacked over experts; those of a
        method that does not act beside the weight are none.
    change: W' - W in fp64, (N, K) or stacked. Raises NotMergeableError where the base does not show W.
    instead: what it does, where it does not act beside the weight.
    mergeable: whether there is a W'. biased: whether the layer's bias changes. ways: what else there is to do with it.
    """

    name: str
    stored: str
    method: str
    factors: list[Factors]
    change: Callable[[], Tensor]
    instead: str | None = None
    mergeable: bool = True
    biased: bool = False
    stacked: bool = False
    transposed: bool = False
    lookup: bool = False
    ways: tuple[str, ...] = ()


class Source(NamedTuple):
    """What is exported of a model: a piece for each layer, the adapter's config, and what is stored beside them by key
    (modules_to_save, biases, embeddings)."""

    pieces: list[Piece]
    config: Any
    beside: dict[str, Tensor]


# calls that give the Source of a Hugging Face PEFT model, or None for another: (model, adapter_name)
OF_PEFT: list[Callable[[nn.Module, str], Source | None]] = []


@torch.no_grad()
def export_lora(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = DEFAULT, rank: int | None = None
) -> dict[str, float]:
    """Write an adapter as plain LoRA in Hugging Face PEFT's layout into the folder ``path``, made if need be.

    rank: None writes what is exactly a low-rank product. A number writes ranks up to it: larger ones, and changes of
    the weight that are no product, as their best approximation, and one warning names the relative errors.
    adapter_name: which, of a model that has several. Models of Hugging Face PEFT that hold this library's methods, or
    that are accelerated, are taken too.

    Returns {layer: ||B A - (W' - W)|| / ||W' - W||}, 0 where it is exact. Raises ValueError, naming the layer, why and
    what to do, for what has no such form; RuntimeError while merged or disabled; what save_pretrained raises of
    ``path``; each before anything is written. Tensors are in fp32 (fp64 where the adapter is).
    """
    if rank is not None:
        positive_int("rank", rank)
    path, source = folder(path), source_of(model, adapter_name)
    found = {piece.name: _product(piece, rank) for piece in source.pieces}
    r = max(1, *(A.shape[-2] for A, _, _ in found.values()))
    config = _config(source, r)
    lora, tensors = method_of(config), dict(source.beside)
    for piece in source.pieces:
        A, B, _ = found[piece.name]
        for part, t in ((lora.A, _padded(A, r, -2)), (lora.B, _padded(B, r, -1))):
            t = stacked_slot(t, part == lora.B).on_disk(t) if piece.stacked else t
            tensors[f"{PREFIX}{piece.stored}.{lora.disk_key(part, piece.lookup)}"] = t.contiguous().cpu()
    together = any(map(is_spread, model.parameters()))
    try:
        if not together or torch.distributed.get_rank() == 0:
            write(path, config, tensors)
    finally:
        if together:
            torch.distributed.barrier()
    errors = {name: error for name, (_, _, error) in found.items()}
    if inexact := sorted(((e, n) for n, e in errors.items() if e), reverse=True):
        warnings.warn(
            f"rank={rank} approximates {len(inexact)} of {len(errors)} layers; relative error of the change of the "
            f"weight: {few(f'{name} {error:.2g}' for error, name in inexact)}",
            stacklevel=2,
        )
    return errors


def source_of(model: nn.Module, adapter_name: str) -> Source:
    """What is exported of a model. Raises what ``export_lora`` raises of it."""
    for of_peft in OF_PEFT:
        if source := of_peft(unwrap(model), adapter_name):
            return source
    model = unwrap(model)
    state = state_of(model, "export_lora").of(adapter_name)
    if isinstance(state.config, SoftPromptConfig):
        raise ValueError(f"{type(state.config).__name__}: a soft prompt is no change of weights, so no LoRA equals it")
    refuse_while_disabled(model, "export_lora")
    refuse_vanished(model, "export_lora")
    reshard(model)
    holders = {plain_name(n): layer for n, layer in layers(model) if adapter_name in layer.adapters}
    if done := [name for name, layer in holders.items() if layer.merged]:
        raise RuntimeError(f"{done[0]} is merged; call unmerge before export_lora")
    pieces = [piece_of(n, disk_name(n, holders), layer.adapters[adapter_name]) for n, layer in holders.items()]
    slots = slots_beside(holders, state, finder(model))
    beside = {key: s.on_disk(whole(s.tensor).detach()).contiguous().cpu() for key, s in slots.items()}
    return Source(pieces, state.config, beside)


def piece_of(name: str, stored: str, adapter: Bound) -> Piece:
    """The piece of one of this library's adapters, seen whole where it is sharded."""
    method, kind, layer = adapter.method, adapter.kind, adapter.holder()
    if adapter.awaits_weight:
        raise RuntimeError(
            f"{name} starts from a weight that is not loaded; call reset_adapter_parameters() after that"
        )
    seen, factors, instead = Gathered(adapter), [], None
    if method.output is not None:
        instead = "an update of the layer's output"
    elif method.factors is None or method.replaces_weight:
        instead = "a change of the weight at full rank"
    else:
        factors = [method.residual(seen)] if method.residual is not None else []
        factors.append(factors_of(seen))

    def change() -> Tensor:
        plain = kind.as_plain(layer)
        if isinstance(plain, str):
            raise NotMergeableError(plain)
        W = plain.values(layer).double()
        return merged(seen, W, seen.bias)[0] - W

    mergeable = method.output is None and all(f.mergeable for f in factors)
    ways = ("fused_peft.save_merged writes the merged model",) if mergeable else ()
    if reads_in_peft(adapter.config):
        ways += (f"fused_peft.save_pretrained writes {method.name} in Hugging Face PEFT's own format, for PEFT alone",)
    biased, transposed = changes_bias(factors, seen.bias), kind.transposed and not (kind.stacked or kind.lookup)
    piece = Piece(name, stored, method.name, factors, change, instead, mergeable, biased, kind.stacked, transposed)
    return piece._replace(lookup=kind.lookup, ways=ways)


def changes_bias(factors: list[Factors], bias: Tensor | None) -> bool:
    """Whether factors change the bias that a layer has."""
    return any(f.bias is not None or (f.scale_bias and f.d_out is not None and bias is not None) for f in factors)


def _product(piece: Piece, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A (r, K), B (N, r) with r <= rank where one is given, and the relative error; of experts stacked."""
    beyond = [piece.instead, *(f.beyond_product() for f in piece.factors)]
    if reasons := list(filter(None, beyond)):
        return _approximated(piece, reasons[0], rank)
    wide = any(f.A is not None and f.A.dtype == torch.float64 for f in piece.factors)
    parts = [f.to(torch.float64) for f in piece.factors]
    of = [[f.at(e) for f in parts] for e in range(parts[0].A.shape[0])] if piece.stacked else [parts]
    products = [(*_joined(parts), 0.0) for parts in of]
    if not all(torch.isfinite(t).all() for A, B, _ in products for t in (A, B)):
        raise ValueError(f"{piece.name}: the adapter has NaN or infinite entries; it is broken")
    if rank is not None:
        products = [p if len(p[0]) <= rank else _truncated(*p[:2], rank) for p in products]
    return _together(piece, products, torch.float64 if wide else torch.float32)


def _joined(parts: list[Factors]) -> tuple[Tensor, Tensor]:
    """A and B of the sum of low-rank products."""
    As, Bs = zip(*(f.product() for f in parts if f.A is not None), strict=True)
    return torch.cat(As), torch.cat(Bs, dim=1)


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A, from factors alone: B A = Qb (Rb Raᵀ) Qaᵀ."""
    (Qa, Ra), (Qb, Rb) = torch.linalg.qr(A.T), torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    error = S[rank:].norm() / S.norm().clamp_min(torch.finfo(S.dtype).tiny)
    root = S[:rank].sqrt()
    return root[:, None] * (Vh[:rank] @ Qa.T), (Qb @ U[:, :rank]) * root, float(error)


def _approximated(piece: Piece, reason: str, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a change that is no product; ValueError where none is wanted, or there is none."""
    refusal = f"{piece.name}: {piece.method} is more than a low-rank product beside the weight: {reason}"
    ways = piece.ways
    if piece.mergeable and not piece.biased:
        ways = ("rank=r writes the best approximation of rank r and returns how far off it is", *ways)
    there_is = "; ".join(ways) or "serving it with this library"
    if piece.biased and piece.mergeable:
        refusal += ", and plain LoRA leaves biases as they are"
    if rank is None or piece.biased or not piece.mergeable:
        raise ValueError(f"{refusal}. What there is: {there_is}")
    try:
        change = piece.change()
    except NotMergeableError as e:
        raise ValueError(f"{refusal}, and its change of the weight is not known: {e}") from e
    return _together(piece, [_best(c, rank) for c in (change if piece.stacked else (change,))], torch.float32)


def _best(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a matrix, and its relative error as it is after all roundings."""
    U, S, Vh = decomposed(change.float(), change.new_empty, rank=min(rank, *change.shape))
    U, S, Vh = U.double(), S.double(), Vh.double()
    root = S.sqrt()
    A, B = root[:, None] * Vh, U * root
    error = (B @ A - change).norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny)
    return A, B, float(error)


def _together(piece: Piece, of: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """One layer's factors in a dtype; of experts stacked, at the rank of the largest, with the largest error."""
    if not piece.stacked:
        ((A, B, error),) = of
        return A.to(dtype), B.to(dtype), error
    r = max(len(A) for A, _, _ in of)
    A = torch.stack([_padded(A, r, 0) for A, _, _ in of])
    B = torch.stack([_padded(B, r, 1) for _, B, _ in of])
    return A.to(dtype), B.to(dtype), max(error for _, _, error in of)


def _padded(t: Tensor, r: int, dim: int) -> Tensor:
    """The tensor with zeros added up to size r along a dimension: no product with it changes."""
    shape = list(t.shape)
    shape[dim] = r - shape[dim]
    return torch.cat((t, t.new_zeros(shape)), dim)


def _config(source: Source, r: int) -> LoraConfig:
    """The exported adapter's config, by what all configs share."""
    common = {f.name: getattr(source.config, f.name, f.default) for f in fields(PeftConfig)}
    common = {name: sorted(v) if isinstance(v, set) else v for name, v in common.items()}
    bias = common.pop("bias")
    return LoraConfig(
        **common,
        bias=bias if bias in ("none", "all") else "lora_only",
        r=r,
        lora_alpha=r,
        fan_in_fan_out=any(piece.transposed for piece in source.pieces),
    )
