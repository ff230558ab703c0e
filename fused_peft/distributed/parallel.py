"""Tensor parallel adapters: PyTorch's parallel styles for PeftLinear, and the expression on DTensors.

column-wise  every side of length out is sharded (W, B, d_out, bias), the others replicated; y is sharded
             y_l = d_out_l ⊙ (x̂ W_lᵀ + s·S B_lᵀ) + b_l
row-wise     every side of length in is sharded (x, W, A, d_in), the others replicated; y is the sum over processes
             y = Σ_l d_out ⊙ (x̂_l W_lᵀ + s·S_l Bᵀ) + b          S_l = x̂_l A_lᵀ Gᵀ

Each process makes one fused call on its plain local tensors. What is not linear in S row-wise (h, a), and what acts
behind the layer, is written out on DTensors instead, which insert the reductions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor, parallel

from ..core import ops
from ..core.dropout import keep_mask, new_seed
from ..core.eager import norm_of
from ..core.factors import Factors
from ..model.layer import PeftLayer, PeftLinear


def sides(layer: PeftLinear) -> dict[str, tuple[str | None, ...]]:
    """Parameter and buffer names of a layer -> for each dimension "out" or "in" where it has that length, else None.

    Compared are the shapes that the method's ``init`` gives for a weight of this shape and for its transpose: what is
    out long for the one and in long for the other lies along out. A square weight says nothing: then one twice as wide.
    """
    out, into = layer.out_features, layer.in_features
    into = 2 * out if into == out else into
    starts = []
    for shape in ((out, into), (into, out)):
        meta = torch.empty(shape, device="meta", dtype=torch.float32)
        start = layer.method.start(meta, meta[:, 0], layer.config, meta.new_empty)
        starts.append({n: t.shape for n, t in (start.params | start.buffers).items()})
    found = {}
    for name, first in starts[0].items():
        pairs = zip(first, starts[1][name], strict=True)
        found[name] = tuple({(out, into): "out", (into, out): "in"}.get(pair) for pair in pairs)
    weight = ("in", "out") if layer.fan_in_fan_out else ("out", "in")
    return {**found, "weight": weight, "bias": ("out",)}


def shard(layer: PeftLinear, mesh: DeviceMesh, side: str, src_data_rank: int | None = 0) -> None:
    """Make every tensor of the layer a DTensor on the mesh: sharded along ``side`` ("out" or "in"), else replicated.

    Raises ValueError with nothing changed: a mesh of several dimensions, a side that the mesh does not divide, a layer
    that is merged or sharded already.
    """
    length = layer.out_features if side == "out" else layer.in_features
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh={mesh} has {mesh.ndim} dimensions, but a layer is parallel along one; give e.g. mesh['tp']"
        )
    if length % mesh.size():
        raise ValueError(
            f"{side}_features={length} cannot be split evenly over {mesh.size()} processes; use a mesh whose size "
            f"divides it, or parallelise the layer along the other side"
        )
    if isinstance(layer.weight, DTensor):
        raise ValueError(f"the layer is sharded already, on {layer.weight.device_mesh}; parallelise it once")
    if len(layer.adapters) > 1:
        raise ValueError(f"the layer has adapters {', '.join(layer.adapters)}; delete_adapter the added ones first")
    if layer.merged:
        raise ValueError("the layer is merged; call unmerge before sharding it")
    known = sides(layer)
    for registry, wrap in ((layer._parameters, nn.Parameter), (layer._buffers, lambda t, requires_grad: t)):
        for name, t in registry.items():
            if t is None:
                continue
            along = [i for i, s in enumerate(known.get(name, ())) if s == side]
            placement = Shard(along[0]) if along else Replicate()
            split = distribute_tensor(t.detach(), mesh, [placement], src_data_rank=src_data_rank)
            registry[name] = wrap(split, requires_grad=t.requires_grad)


class _OfAdapters:
    """In front of one of torch's styles: a PeftLinear is sharded along ``side``."""

    side: str

    def _partition_linear_fn(self, name, module, device_mesh):
        if isinstance(module, PeftLinear):
            shard(module, device_mesh, self.side, self.src_data_rank)
        else:
            super()._partition_linear_fn(name, module, device_mesh)

    def _partition_embedding_fn(self, name, module, device_mesh):
        if isinstance(module, PeftLayer):
            raise ValueError(f"{name or 'the module'} is an adapted nn.Embedding, which is not split; leave it whole")
        super()._partition_embedding_fn(name, module, device_mesh)


class ColwiseParallel(_OfAdapters, parallel.ColwiseParallel):
    """torch's ColwiseParallel, which also takes a PeftLinear: A replicated, B sharded, scales sharded with their side.

    ``parallelize_module(model, mesh["tp"], {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()})`` after
    get_peft_model. Raises ValueError as ``shard`` does.
    """

    side = "out"


class RowwiseParallel(_OfAdapters, parallel.RowwiseParallel):
    """torch's RowwiseParallel, which also takes a PeftLinear: A sharded, B replicated, scales sharded with their side.

    Raises ValueError as ``shard`` does.
    """

    side = "in"


# the side of length out, or in, of each operand
_OUT = {"w": 0, "B": 0, "d_out": 0, "bias": 0}
_IN = {"w": 1, "A": 1, "d_in": 0}


def linear(x: DTensor, w: DTensor | None, f: Factors, bias, c: DTensor | None, training: bool) -> DTensor:
    """``ops.linear`` on DTensors of one mesh of one dimension; y sharded column-wise, or a sum still to be made.

    Raises ValueError when operands live on different meshes, TypeError when plain tensors are among them.
    """
    bias = bias if f.bias is None else f.bias
    operands = {"w": w, "bias": bias, **{n: getattr(f, n) for n in ("A", "a", "G", "B", "d_in", "d_out")}}
    operands = {n: t for n, t in operands.items() if t is not None}
    mesh = x.device_mesh
    for name, t in {**operands, **({} if c is None else {"c": c})}.items():
        if not isinstance(t, DTensor):
            raise TypeError(
                f"x is a DTensor but {name} is a plain tensor; parallelise the layer with {__name__}'s styles"
            )
        if t.device_mesh != mesh:
            raise ValueError(f"x is on {mesh} but {name} on {t.device_mesh}; give both the same device mesh")
    column = any(operands[n].placements == (Shard(d),) for n, d in _OUT.items() if n in operands)
    row = any(operands[n].placements == (Shard(d),) for n, d in _IN.items() if n in operands)
    if c is not None or (row and (f.h != "identity" or f.a is not None)):
        return _written_out(x, w, f, bias, c, training)
    splits, last = _OUT if column else _IN if row else {}, Shard(x.dim() - 1)
    summed, varies = splits is _IN, bool(splits)
    result = last if column else Partial() if summed else Replicate()
    local = {"x": _local(x, last if summed else Replicate(), varies)}
    for name, t in operands.items():
        local[name] = _local(t, Shard(splits[name]) if name in splits else Replicate(), varies)
    if "bias" in local and summed and mesh.get_local_rank():
        local["bias"] = local["bias"] * 0  # the sum over processes shall hold it once
    inner = replace(f, **{n: local.get(n) for n in ("A", "a", "G", "B", "d_in", "d_out", "bias")})
    seed = _seed(x, mesh, differs=summed) if training and f.p else None
    y = ops.linear(local["x"], local.get("w"), inner, None, None, training, seed)
    return DTensor.from_local(y, mesh, [result], run_check=False)


def _local(t: DTensor, placement, varies: bool) -> Tensor:
    """This process's part of t in that placement; the gradient of a replicated one is summed over the processes where
    each computes its own share of it."""
    t = t.redistribute(placements=[placement])
    grad = [Partial()] if varies and placement == Replicate() else [placement]
    return t.to_local(grad_placements=grad)


def _seed(x: DTensor, mesh: DeviceMesh, differs: bool) -> Tensor:
    """One seed for all processes, from the first one's generator; ``differs``: each process's own derived from it."""
    seed = distribute_tensor(new_seed(x.device), mesh, [Replicate()]).to_local()
    return seed + mesh.get_local_rank() * seed.new_tensor([0, 1]) if differs else seed


def _written_out(x, w, f: Factors, bias, c, training: bool) -> DTensor:
    """The expression in DTensor's own operations."""
    reduced = lambda t: t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])  # noqa: E731
    x = reduced(x)
    c = c if c is None else x if c is x else reduced(c)
    keep = None
    if training and f.p:
        seed = _seed(x, x.device_mesh, differs=False)
        keep = distribute_tensor(keep_mask(seed, x.shape, f.p), x.device_mesh, x.placements, src_data_rank=None)
    bias = None if bias is None else bias.to(x.dtype)
    return replace(f.to(x.dtype), bias=None).expression(x, w, bias, c, keep)


def row_norm(W: DTensor, squared: DTensor, A: DTensor, B: DTensor, s: float) -> DTensor:
    """``ops.row_norm`` on DTensors: local column-wise; row-wise W Aᵀ and A Aᵀ are summed over the processes."""
    mesh = W.device_mesh
    if W.placements != (Shard(1),):
        norm = ops.row_norm(W.to_local(), squared.to_local(), A.to_local(), B.to_local(), s)
        return DTensor.from_local(norm, mesh, squared.placements, run_check=False)
    wide = squared.dtype
    W, A = W.to_local(), A.to_local().to(wide)
    with ops.no_autocast(W.device.type):
        parts = torch.cat([torch.mm(W, A.t().to(W.dtype)).to(wide), torch.mm(A, A.t())])
        products = DTensor.from_local(parts, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        WA, AA = products.to_local().split([W.shape[0], A.shape[0]])
        norm = norm_of(squared.to_local(), WA, AA, B.to_local().to(wide), s)
    return DTensor.from_local(norm, mesh, [Replicate()], run_check=False)
