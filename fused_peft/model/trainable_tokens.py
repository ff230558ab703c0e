"""Rows of an embedding that train while its table is frozen: ``trainable_token_indices``, named and stored as in
Hugging Face PEFT, which documents them under "trainable tokens".

V (n, K) holds the rows E[i] of the n token ids i. The embedding gives V's row where an id is one of them and E's where
it is none; a head that is tied to the table adds h (V - E[i])ᵀ to the logits of those ids. Nothing of the table's size
is made or kept, forward or backward. As modules_to_save do, the rows belong to the first adapter and act whichever is
active; ``merge_and_unload`` writes them into the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.frozen import DENSE, LOOKUP, scaled
from ..core.sharded import fill, shape_of, whole
from ..methods import PeftConfig
from .targets import embeddings, ends_with_any, nearest

KEY = "token_adapter"  # the name beside the embedding, in the model and on disk
FIELD = "trainable_token_indices"


class TrainableTokens(nn.Module):
    """The trainable rows of one table, called by hooks of the modules that hold it; V is ``trainable_tokens_delta``."""

    def __init__(self, table: nn.Embedding, indices: list[int], dtype: torch.dtype):
        super().__init__()
        W, self.indices, self.enabled = whole(table.weight).detach(), tuple(indices), True
        ids = torch.tensor(indices, device=W.device)
        self.trainable_tokens_delta = nn.Parameter(W[ids].to(dtype, copy=True))
        position = torch.full(W.shape[:1], -1, dtype=torch.int32, device=W.device)  # in V, of every id
        position[ids] = torch.arange(len(indices), dtype=torch.int32, device=W.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("position", position, persistent=False)
        self.padding = indices.index(table.padding_idx) if table.padding_idx in indices else None

    def forward(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a module that holds the table is to give: x is ids (...) of an embedding and h (..., K) of a head, y its
        own output (..., K) or (..., V), in whose dtype the result is."""
        V = self.trainable_tokens_delta
        if not isinstance(module, nn.Embedding):
            change = F.linear(x, (V - module.weight[self.ids]).to(x.dtype))
            return y.index_add_(-1, self.ids, change.to(y.dtype))
        at = self.position[x]
        # a row in front for every other id, which takes no gradient
        padded = torch.cat((V.new_zeros(1, V.shape[1]), *self._parts(V)))
        rows = F.embedding(at + 1, padded, 0, scale_grad_by_freq=module.scale_grad_by_freq).to(y.dtype)
        return torch.where((at >= 0)[..., None], scaled(module, rows), y)

    def _parts(self, V: Tensor) -> tuple[Tensor, ...]:
        """V, of which a padding row takes no gradient."""
        if self.padding is None:
            return (V,)
        return V[: self.padding], V[self.padding : self.padding + 1].detach(), V[self.padding + 1 :]

    def called(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        """The hook."""
        return self(module, args[0] if args else kwargs["input"], y) if self.enabled else y

    def folded(self, W: Tensor) -> Tensor:
        """A copy of the table's whole values (V, K) with these rows in it."""
        return W.detach().index_copy(0, self.ids, whole(self.trainable_tokens_delta).detach().to(W.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.indices)} rows{'' if self.enabled else ', disabled'}"


def asked(model: nn.Module, config: PeftConfig) -> dict[str, list[int]]:
    """{embedding: ids} of a config. ValueError where an entry means no embedding, or more than one table."""
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if isinstance(wanted, list):
        own = embeddings(model, "input")
        names = [n for n, m in tables.items() if m is own] or [n for n in tables if ends_with_any(n, ("embed_tokens",))]
        if len(names) != 1:
            raise ValueError(
                f"{FIELD}={wanted}: the model says of no one embedding that it is its input's; name it, "
                f"{FIELD}={{{next(iter(tables), 'NAME')!r}: [...]}}"
            )
        return {names[0]: wanted}
    found = {}
    for entry, ids in wanted.items():
        names = [n for n in tables if ends_with_any(n, (entry,))]
        if not names:
            near = nearest(entry, list(tables))
            raise ValueError(
                f"{FIELD}: {entry!r} matches no embedding" + (f" (nearest: {', '.join(near)})" if near else "")
            )
        if twice := [n for n in names if n in found]:
            raise ValueError(f"{FIELD}: {twice[0]} is meant by two entries, {entry!r} the second; give one")
        found |= dict.fromkeys(names, ids)
    return found


def planned(
    model: nn.Module, config: PeftConfig, taken: Iterable[str], adapter_dtype: torch.dtype | None
) -> dict[str, TrainableTokens]:
    """{embedding: its rows} with the model as it is. taken: names of the modules that are adapted or trained whole.

    Raises ValueError, naming the entry, for ids outside the table, and for tables whose rows cannot train.
    """
    found, taken, modules = {}, set(taken), dict(model.named_modules())
    for name, ids in asked(model, config).items():
        table = modules[name]
        reason = LOOKUP.reads(table)
        if reason is not True:
            raise ValueError(f"{FIELD}: {name}: {reason}")
        rows = shape_of(table.weight)[0]
        if outside := [i for i in ids if i >= rows]:
            raise ValueError(
                f"{FIELD}={ids}: {outside[0]} is outside the {rows} rows of {name}; call resize_token_embeddings first"
            )
        for other, module in holders(model, table):
            if any(other == t or other.startswith(f"{t}.") for t in taken):
                raise ValueError(
                    f"{FIELD}: the table of {name} is also held by {other}, which is adapted or trained whole; leave "
                    "one of the two out"
                )
            if not isinstance(module, nn.Embedding) and DENSE.reads(module) is not True:
                raise ValueError(
                    f"{FIELD}: the table of {name} is also held by {other}, a {type(module).__name__}, whose rows "
                    "cannot be put in place; untie the two"
                )
        wide = torch.float32 if table.weight.itemsize == 2 else table.weight.dtype
        found[name] = TrainableTokens(table, ids, adapter_dtype or wide)
    if both := [n for n in found if sum(modules[n].weight is modules[m].weight for m in found) > 1]:
        raise ValueError(f"{FIELD}: {' and '.join(both)} hold one table; name one of them")
    return found


def holders(model: nn.Module, table: nn.Embedding) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module whose weight is the table's, itself among them."""
    return ((n, m) for n, m in model.named_modules() if m._parameters.get("weight") is table.weight)


def install(model: nn.Module, name: str, tokens: TrainableTokens) -> None:
    """Put rows beside their table, and let every module that holds it call them."""
    table = model.get_submodule(name)
    table.add_module(KEY, tokens)
    for _, module in holders(model, table):
        module.register_forward_hook(tokens.called, with_kwargs=True)


@torch.no_grad()
def remove(model: nn.Module, name: str) -> None:
    """Take rows away again; their values stay in the table."""
    table = model.get_submodule(name)
    tokens = table._modules.pop(KEY)
    fill(table.weight, tokens.folded(whole(table.weight)))
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if getattr(hook, "__self__", None) is tokens]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def refuse_infinite(tokens: dict[str, TrainableTokens]) -> None:
    """ValueError where a row is not finite."""
    for name, t in tokens.items():
        if not torch.isfinite(whole(t.trainable_tokens_delta)).all():
            raise ValueError(f"{name}.{KEY} has NaN or infinite entries; the adapter is broken")
