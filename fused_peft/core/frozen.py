"""The frozen map: what a layer's weight W (N, K) is, behind one small noun.

A kind knows how a module holds W; whatever needs W asks the kind, and nothing else sees how it is stored. Kinds have no
state: each of their methods is given the module.

    Dense        nn.Linear's weight, (N, K)
    Transposed   Transformers' Conv1D, (K, N)
    Opaque       any module that maps x to C by a forward of its own; W is read only where a trial shows that it is one
    Experts      a stack of weights, (E, N, K) or stored (E, K, N): one for each group of rows
    Lookup       nn.Embedding's table, stored (V, N): V = K, and x is ids, whose rows C = W[:, ids]ᵀ are

A weight that is stored in parts (codes and scales) is a further kind whose ``matrix`` is a ``Stored``: the fused call
decodes it at the top of forward and of backward, and keeps the parts alone (bitsandbytes': integrations.quantised).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .factors import NotMergeableError
from .sharded import is_sharded, shape_of, whole
from .torch_internals import is_traceable_wrapper_subclass, tracing, transforming


class Stored(NamedTuple):
    """A weight (N, K) as another library stores it: its own tensors, none copied, and how they are read."""

    parts: tuple[Tensor, ...]
    spec: str
    shape: tuple[int, int]
    dtype: torch.dtype  # that its values are read in, where no input says so
    compute: torch.dtype | None = None  # that x is cast to for the call, and y back from; None: x's
    values: Tensor | None = None  # what it was decoded to (``ops.read``)


class Form(NamedTuple):
    """How a ``Coded`` weight is read, its size and values left out: what decides about a kernel's machine code. Blocks
    as large as the weight, which are as large as any, have 0 there."""

    codes: torch.dtype
    scales: torch.dtype
    table: bool
    zeros: torch.dtype | None
    block: tuple[int, int] | int
    high_first: bool
    nested: int  # elements of a block of scales; 0: scales have none

    def __str__(self) -> str:
        block = self.block if isinstance(self.block, int) else "x".join(str(b) if b else "all" for b in self.block)
        said = ["4 bits" if self.table else str(self.codes), f"scales {self.scales} a {block}"]
        said += ["nested"] * bool(self.nested) + [f"zeros {self.zeros}"] * (self.zeros is not None)
        said += ["low first"] * (self.table and not self.high_first)
        return ", ".join(said).replace("torch.", "")


class Coded(NamedTuple):
    """A weight that one kernel can decode: W (N, K) = (value of the code - zero) * scale, in fp32, rounded once.

    codes   (N, K) int8 or float8_e4m3fn; or, with a table, N·K of them two to a byte, in any dtype
    scales  one for each block, row after row: floats; e8m0 (bytes: 2^(byte - 127)); or, where nested, uint8
    block   its (rows, columns), the last ones ragged; or a number: runs of that many elements of W, whatever the rows
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    block: tuple[int, int] | int
    table: Tensor | None = None  # (16,) fp32, the values of 4-bit codes
    high_first: bool = True  # whether a byte's high half comes before its low one
    zeros: Tensor | None = None  # like scales
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None  # scale = table (256,)[code] * its block's + offset; block
    by: float = 1.0  # scales that are floats are times this

    @property
    def form(self) -> Form:
        t, block, zeros = self.table is not None, self.block, None if self.zeros is None else self.zeros.dtype
        if not isinstance(block, int):
            block = tuple(b * (b < n) for b, n in zip(block, self.shape, strict=True))
        codes = torch.uint8 if t else self.codes.dtype
        nested = 0 if self.nested is None else self.nested[3]
        return Form(codes, self.scales.dtype, t, zeros, block, self.high_first, nested)

    @classmethod
    def blocks(cls, parts: Sequence[Tensor], rest: str, whole: bool = True) -> Coded:
        """Of codes (N, K), scales (ceil(N / rows), ceil(K / columns)) and maybe zeros; ``rest``: "rows,columns"."""
        codes, scales, *zeros = parts
        rows, columns = map(int, rest.split(","))
        return cls(codes, scales, tuple(codes.shape), (rows, columns), zeros=zeros[0] if zeros else None)


# format -> (parts, the rest of the spec, dtype) -> W (N, K) in that dtype; and (parts, rest, whole) -> Coded
_DECODERS: dict[str, Callable[[Sequence[Tensor], str, torch.dtype], Tensor]] = {}
_CODED: dict[str, Callable[[Sequence[Tensor], str, bool], Coded | None]] = {}


def register_decoder(
    name: str,
    decoder: Callable[[Sequence[Tensor], str, torch.dtype], Tensor],
    coded: Callable[[Sequence[Tensor], str, bool], Coded | None] | None = None,
) -> None:
    """Say how weights of a format are decoded: ``decoder(parts, rest, dtype)`` -> W (N, K), for the specs "name" and
    "name:rest". It must run on fake tensors too. ``coded(parts, rest, whole)``: the same weight for a kernel to decode
    to the same bits, or None; ``whole``: in the decoder's place, which may have a kernel of its own, else in the loop
    of a product. Raises ValueError for a name that is taken.
    """
    if name in _DECODERS:
        raise ValueError(f"name={name!r} has a decoder already; choose another name")
    _DECODERS[name] = decoder
    if coded is not None:
        _CODED[name] = coded


def register_kinds(*kinds: Frozen, **formats: tuple[Callable, Callable]) -> None:
    """Add kinds behind the plain ones, which then cost what they did, and what ``register_decoder`` takes of their
    formats, by name; kinds that are there already, since their file is imported anew, once."""
    if any(type(kind).__name__ == type(kinds[0]).__name__ for kind in KINDS):
        return
    at = KINDS.index(OPAQUE)
    KINDS[at:at] = kinds
    for name, given in formats.items():
        register_decoder(name, *given)


def decode(spec: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """W (N, K) in a dtype from the parts that a spec describes. KeyError for a format that nobody registered."""
    name, _, rest = spec.partition(":")
    W = None if parts[0].is_cpu else _launched(spec, parts, dtype)
    return _DECODERS[name](parts, rest, dtype) if W is None else W


def coded(spec: str, parts: Sequence[Tensor], whole: bool) -> Coded | None:
    """The weight for a kernel to decode, if it can and the parts are tensors with a memory of their own."""
    name, _, rest = spec.partition(":")
    if name not in _CODED or is_compiling() or tracing() or transforming():
        return None
    return _CODED[name](parts, rest, whole) if all(type(t) in (Tensor, nn.Parameter) for t in parts) else None


def _launched(spec: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """What ``in_one_launch`` makes of the parts."""
    w = coded(spec, parts, whole=True)
    return None if w is None else in_one_launch(w, dtype)


def multiplied(x: Tensor, spec: str, parts: Sequence[Tensor], back: bool) -> Tensor:
    """x Wᵀ (M, N), or ``back`` x W (M, K), in x's dtype, of a few rows."""
    w = coded(spec, parts, whole=False)
    product = None if w is None else in_loop(w, x, back)
    if product is None:
        W = decode(spec, parts, x.dtype)
        product = torch.mm(x, W if back else W.mT)
    return product


def in_one_launch(w: Coded, dtype: torch.dtype) -> Tensor | None:
    """W in a dtype from a kernel, or None; a backend that has kernels replaces this function."""
    return None


def in_loop(w: Coded, x: Tensor, back: bool) -> Tensor | None:
    """``multiplied`` by a kernel that decodes in its loop, or None; replaced likewise."""
    return None


class Frozen:
    """One kind of base. Subclass it for another; a module without state is enough, and ``KINDS`` is where it goes."""

    transposed = False  # W is stored (K, N)
    opaque = False  # C is the module's own forward
    stacked = False  # W is a stack of matrices, one a group of rows
    lookup = False  # x is ids, of columns of W
    packed = False  # W is stored in parts, and the module computes what the fused call does with them decoded
    requantised = "loses much of the update"  # what becomes of a merged W in a packed kind's own format

    def __reduce__(self):
        return type(self), ()  # a kind has no state

    def __eq__(self, other) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def reads(self, module: nn.Module) -> bool | str:
        """Whether the module is of this kind; a string says why it is and cannot be adapted all the same."""
        raise NotImplementedError

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight by itself shows that its layer is of this kind, as a quantiser's tensor class does."""
        return False

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(N, K)."""
        shape = shape_of(module.weight)[-2:]
        return shape[::-1] if self.transposed else shape

    def placed(self, t: Tensor) -> Tensor:
        """A stored weight as (N, K), or the other way round: its own inverse."""
        return t.mT if self.transposed else t

    def device(self, module: nn.Module) -> torch.device:
        """Where the module computes: of weights that hooks keep elsewhere between calls, where they bring them."""
        device, hook = self.like(module).device, getattr(module, "_hf_hook", None)
        where = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,))]
        where = next((w for w in where if w is not None), None)
        return torch.device(where) if device.type == "meta" and where is not None else device

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating dtype that W's values have; fp32 where nothing tells."""
        W = None if self.opaque else self.matrix(module)
        dtype = W.dtype if W is not None else self.like(module).dtype
        return dtype if dtype.is_floating_point else torch.float32

    def like(self, module: nn.Module) -> Tensor:
        """A tensor that the module holds, its weight where it has one of that name."""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        return next(t for t in (*module.parameters(), *module.buffers()))

    def matrix(self, module: nn.Module) -> Tensor | Stored:
        """What the fused call multiplies by."""
        return module.weight.mT if self.transposed else module.weight

    def dense(self, module: nn.Module) -> Tensor:
        """W (N, K) as a matrix, for who needs its values."""
        W = self.matrix(module)
        return decode(W.spec, W.parts, W.dtype) if isinstance(W, Stored) else W

    def values(self, module: nn.Module) -> Tensor:
        """W (N, K), whole where several processes hold it, apart from autograd."""
        W = self.matrix(module)
        if isinstance(W, Stored):
            return decode(W.spec, [whole(part) for part in W.parts], W.dtype)
        return self.placed(whole(module.weight).detach())

    def as_plain(self, module: nn.Module) -> Frozen | str:
        """The kind by which W's values are read, mostly this one; or why they cannot be."""
        return self

    def about(self, module: nn.Module) -> str:
        """How W is stored, in a few words, where it is packed."""
        return ""

    def why_unwritable(self, module: nn.Module) -> str | None:
        """Why a merged W cannot be written in its place, or None."""
        if self.packed:
            return (
                f"its weight is stored in {self.about(module)}, and quantising a merged one anew {self.requantised} "
                "(merge_and_unload(model, dequantize=True) makes plain layers that keep all of it)"
            )
        if not self.opaque and isinstance(self.matrix(module), Stored):
            return f"the weight of {type(module).__name__} is stored in parts, and its kind says no way to write it"
        if hasattr(module, "parametrizations") or module.weight.is_meta:
            why = "is on the meta device (offloaded?)" if module.weight.is_meta else "is parametrized"
            return f"its weight {why}, so what merging writes would not stay"
        if is_foreign(module.weight):
            kind = type(module.weight).__name__
            return f"its weight is a {kind}, which would round the merged values to its own format"
        return None

    def write(self, W: Tensor, module: nn.Module) -> Tensor:
        """W (N, K) as the module stores it. Raises NotMergeableError where it cannot be written."""
        if reason := self.why_unwritable(module):
            raise NotMergeableError(f"{reason}; keep the layer unmerged")
        return self.placed(W.to(module.weight.dtype)).contiguous()


class Dense(Frozen):
    """nn.Linear with a floating weight of its own."""

    def reads(self, module: nn.Module) -> bool | str:
        return isinstance(module, nn.Linear) and _plain(module, nn.Linear)


class Transposed(Frozen):
    """Transformers' Conv1D."""

    transposed = True

    def reads(self, module: nn.Module) -> bool | str:
        conv1d = conv1d_type()
        return conv1d is not None and isinstance(module, conv1d) and _plain(module, conv1d)


class Lookup(Frozen):
    """nn.Embedding, and Transformers' that scale its rows by ``embed_scale``."""

    transposed = lookup = True

    def reads(self, module: nn.Module) -> bool | str:
        if not isinstance(module, nn.Embedding):
            return False
        weight, name = module.weight, type(module).__name__
        if is_foreign(weight) or not weight.dtype.is_floating_point:
            what = type(weight).__name__ if is_foreign(weight) else weight.dtype
            return f"the table of {name} is a {what}, whose values are not read; keep it out of the quantisation"
        if module.max_norm is not None:
            return f"max_norm={module.max_norm} of {name} changes rows of its table in each call; exclude it"
        if module.sparse:
            return f"{name} has sparse=True, and the gradient of an adapter is dense; set sparse=False, or exclude it"
        own = type(module).forward is not nn.Embedding.forward or "forward" in module.__dict__
        if own and not _looks_up(module, self.device(module)):
            return f"{name} has a forward of its own, which does more than look up rows and scale them; exclude it"
        return True


class Experts(Frozen):
    """A stack of weights (E, N, K) in one parameter, such as a model's experts; no module is of this kind itself."""

    stacked = True

    def reads(self, module: nn.Module) -> bool | str:
        return False


class TransposedExperts(Experts):
    """The same stored (E, K, N)."""

    transposed = True


class Opaque(Frozen):
    """A module whose forward is its own: C = module(x), and the update through the expression's c."""

    opaque = True

    def reads(self, module: nn.Module) -> bool | str:
        known = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
        return known or is_linear(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        if hasattr(module, "in_features"):
            return module.out_features, module.in_features
        return (TRANSPOSED if not isinstance(module, nn.Linear) else DENSE).shape(module)

    def as_plain(self, module: nn.Module) -> Frozen | str:
        """The plain kind that the module is as well, or why it is none: a trial on four random rows shows whether it
        computes x Wᵀ + b with its ``weight``."""
        weight, kind = getattr(module, "weight", None), type(module).__name__
        if not isinstance(weight, Tensor) or is_foreign(weight) or not weight.dtype.is_floating_point:
            what = getattr(weight, "dtype", "no tensor") if not is_foreign(weight) else f"a {type(weight).__name__}"
            return f"{kind} holds its weight in a form that cannot be read ({what})"
        if weight.is_meta:
            return f"the weight of {kind} is on the meta device (offloaded?)"
        for plain in (DENSE, TRANSPOSED):
            W = plain.placed(weight)
            if W.shape == self.shape(module) and _computes(module, W):
                return plain
        return f"{kind} has a forward of its own, which does not compute x W^T + b with its weight"

    def why_unwritable(self, module: nn.Module) -> str | None:
        plain = self.as_plain(module)
        return plain if isinstance(plain, str) else super().why_unwritable(module)

    def placed(self, t: Tensor) -> Tensor:
        return t


def _computes(module: nn.Module, W: Tensor) -> bool:
    """Whether a module's forward is x Wᵀ + b, on four rows drawn from a generator of their own."""
    made = torch.Generator(W.device).manual_seed(0)
    x = torch.randn(4, W.shape[1], generator=made, device=W.device, dtype=torch.float32).to(W.dtype)
    bias = getattr(module, "bias", None)
    bias = bias if isinstance(bias, Tensor) else None
    try:
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            got, want = own_forward(module, x), F.linear(x, W, bias)
    except Exception:  # whatever it does, it is not this
        return False
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.allclose(got.float(), want.float(), rtol=0, atol=32 * torch.finfo(W.dtype).eps * want.float().norm())


def _looks_up(module: nn.Embedding, device: torch.device) -> bool:
    """Whether a module's forward gives rows of its table, scaled: a trial on three of them."""
    weight = module.weight
    if module._modules or len(module._parameters) > 1:
        return False
    ids = torch.tensor([0, module.num_embeddings // 2, module.num_embeddings - 1], device=device)
    try:
        with torch.no_grad():
            got, want = module.forward(ids), looked_up(module, ids.to(weight.device), weight)
    except Exception:  # whatever it does, it is not this
        return False
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    known = not (got.is_meta or want.is_meta)
    return not known or torch.allclose(got.float(), want.float(), rtol=8 * torch.finfo(want.dtype).eps, atol=0)


def row_scale(table: nn.Module) -> Tensor | float | None:
    """What a table multiplies its rows by in its own forward, as Transformers' scaled word embeddings do."""
    by = getattr(table, "embed_scale", None)
    return None if isinstance(by, Tensor) and by.numel() != 1 else by


def looked_up(table: nn.Embedding, ids: Tensor, weight: Tensor) -> Tensor:
    """The rows (..., N) at ids (...) of a weight (V, N) in a table's place."""
    return scaled(table, F.embedding(ids, weight, table.padding_idx))


def scaled(table: nn.Module, rows: Tensor) -> Tensor:
    """Rows of a table as its own forward gives them."""
    by = row_scale(table)
    return rows if by is None else rows * (by.to(rows.dtype) if isinstance(by, Tensor) else by)


def own_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a module of kind Opaque computes, before or after it carries an adapter."""
    call = getattr(module, "base_forward", None)
    return module.forward(x) if call is None else call(x)


def conv1d_type() -> type | None:
    """Transformers' Conv1D (a linear layer with its weight stored (in, out)), if Transformers is in use."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_linear(module: nn.Module) -> bool:
    conv1d = conv1d_type()
    return isinstance(module, nn.Linear) or (conv1d is not None and isinstance(module, conv1d))


def is_foreign(t: Tensor | None) -> bool:
    """Whether a tensor is of a class that stores its values in a way of its own (torchao's quantised ones)."""
    plain = t is None or type(t) in (
        Tensor,
        nn.Parameter,
    )  # the common ones first: asking the class takes a microsecond
    return not plain and not is_sharded(t) and is_traceable_wrapper_subclass(t)


def _plain(module: nn.Module, kind: type) -> bool:
    """Whether nothing but the class's own forward, on a floating weight, computes the module's output."""
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        return False
    weight = module.weight
    return weight.dtype.is_floating_point and not is_foreign(weight)


DENSE, TRANSPOSED, LOOKUP, OPAQUE = Dense(), Transposed(), Lookup(), Opaque()
EXPERTS, TRANSPOSED_EXPERTS = Experts(), TransposedExperts()
KINDS: list[Frozen] = [DENSE, TRANSPOSED, LOOKUP, OPAQUE]  # the first that reads a module; integrations add theirs


def now(layer: nn.Module) -> Frozen:
    """The kind of an adapted layer, which is another than its ``kind`` where its weight was quantised since."""
    kind: Frozen = layer.kind
    if kind.opaque or kind.packed or type(weight := layer.weight) is nn.Parameter or not is_foreign(weight):
        return kind
    return kind if kind.lookup else next((k for k in KINDS if k.holds(weight)), OPAQUE)


def kind_of(module: nn.Module) -> Frozen | str:
    """The kind of a module's base, or why it is of none."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it, so an adapter would do nothing; exclude it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its shape is not known yet; run one batch through the model first"
    if "parametrizations" in module._modules:  # where a hasattr that fails takes a microsecond
        return "its weight is parametrized; remove the parametrization first"
    own = "forward" in module.__dict__  # which may make the weight of what it holds under other names
    if is_linear(module) and module._parameters.get("weight") is None and not own:
        return "a hook computes its weight (pruning, weight_norm); make that permanent first, e.g. by prune.remove"
    weight = getattr(module, "weight", None)
    if is_sharded(weight):
        return "its weight is sharded over several processes; adapt the model before parallelising or sharding it"
    if type(module).forward is nn.Linear.forward and not own and not is_foreign(weight):
        if not weight.dtype.is_floating_point:
            return f"its weight has dtype {weight.dtype}, but a floating dtype is needed; dequantise it first"
    for kind in KINDS:
        if found := kind.reads(module):
            return found if isinstance(found, str) else kind
    name = type(module).__name__
    if isinstance(module, nn.EmbeddingBag):
        return f"{name} pools the rows that it looks up, in a call that takes no update of each; exclude it"
    return f"{name} is not a linear layer (torch.nn.Linear, Transformers' Conv1D, or one with in_features); exclude it"
