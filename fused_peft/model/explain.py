"""Which form and backend compute each layer, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..backends import decode
from ..core import dispatch, experts, frozen, operands, ops, table
from ..core.frozen import Frozen, now
from ..core.sharded import is_sharded
from .adapted import is_pefts
from .adapter import Bound, factors_of, why_not_foreign
from .convert import adapted_layers
from .holder import Gathered
from .layer import PeftLayer
from .parameter import PeftParameter

# a row: method, form, backend, why, and the call that the layer makes, where a backend was chosen for one
Row = tuple[str, str, str, str, operands.Problem | None]
# calls that give the rows of a Hugging Face PEFT model: (model, tokens, dtype) -> [(name, *Row)]
OF_PEFT: list[Callable[[nn.Module, int, torch.dtype | None], list[tuple]]] = []


@dataclass(frozen=True)
class LayerExplanation:
    """Which form and backend compute one layer, and why: the refusals of the backends before it, what speaks for it,
    and the call that it was chosen for, as a backend sees it."""

    name: str
    method: str
    form: str
    backend: str
    why: str
    problem: operands.Problem | None = None


class Explanation(table.Table):
    """One LayerExplanation a layer; shows as a table."""

    head = ("layer", "method", "form", "backend", "why")

    def row(self, e: LayerExplanation) -> tuple[str, ...]:
        return e.name, e.method, e.form, e.backend, e.why


def explain(model: nn.Module, tokens: int = 2048, dtype: torch.dtype | None = None) -> Explanation:
    """Which form and backend would run each layer on ``tokens`` rows of ``dtype`` (default: the weight's), and why.

    ``print(fp.explain(model))`` shows a table. In strict mode, raises StrictError as the forward would.
    """
    if is_pefts(model):
        for of_peft in OF_PEFT:
            if rows := of_peft(model, tokens, dtype):
                return Explanation(LayerExplanation(*row) for row in rows)
    rows = (
        (name, explain_layer(layer, layer.active_adapters(), tokens, dtype)) for name, layer in adapted_layers(model)
    )
    return Explanation(LayerExplanation(name, *row) for name, row in rows)


def stored_as(kind: Frozen, module: nn.Module) -> str:
    """How a weight in parts is stored and read, and how large it is; nothing of another."""
    if not kind.packed:
        return ""
    N, K = kind.shape(module)
    bits = 8 * sum(part.nbytes for part in kind.matrix(module).parts) / (N * K)
    return f"{kind.about(module)} ({bits:.3g} bits a value in all), decoded once each way; "


def explain_layer(layer: PeftLayer, adapters: Sequence[Bound], tokens: int, dtype: torch.dtype | None) -> Row:
    """The row of one layer with these adapters active."""
    names = " + ".join(a.method.name for a in adapters)
    if layer.merged or not layer.enabled or not adapters:
        state = "disabled" if not layer.enabled else "merged" if layer.merged else "no adapter is active"
        plain = "lookup" if layer.kind.lookup else "linear layer"
        return names or "none", "plain", "torch", f"{state}: one plain {plain}", None
    first = adapters[0]
    if isinstance(layer, PeftParameter):
        return _explain_parameter(layer, names, adapters, tokens, dtype)
    kind = now(layer)
    if kind.lookup:
        why = "rows of the table, and of A by one product with B"
        why += "; no dropout acts on them" if any(a.config.dropout for a in adapters) else ""
        return names, "lookup", "torch", why, None
    stored, foreign = stored_as(kind, layer.holder()), kind.opaque and not layer.kind.opaque
    if foreign and (reason := why_not_foreign(layer, adapters)):
        return names, "none", "none", reason, None
    if kind.opaque or len(adapters) > 1:
        base = type(layer.weight).__name__ if foreign else layer.base_class.__name__
        who = f"beside the product of a {base}" if kind.opaque else "one after the other"
        found = [_problem(a, tokens, dtype or layer.kind.dtype(layer.holder()), beside=True) for a in adapters]
        problem = next((p for p in found if p is not None), None) or _problem(first, tokens, dtype)
        choice = dispatch.choose(problem)
        return names, "beside", choice.backend.name, f"{stored}{who}; {choice.why()}", problem
    method = first.method
    if kind.packed and (how := _product_alone(kind, first, tokens, dtype)):
        problem = _problem(first, tokens, dtype, beside=True)
        choice = dispatch.choose(problem) if problem else None
        why = f"{stored}{how}; {choice.why() if choice else 'nothing is beside it'}"
        return names, "beside", choice.backend.name if choice else "torch", why, problem
    if first.forms_weight(tokens):
        why = f"{stored}the weight is formed in each call, then one plain GEMM"
        if method.cost:
            factored, formed = (f / 1e9 for f in method.cost(first, tokens))
            why += f": {formed:.3g} GFLOP instead of {factored:.3g} factored"
        return names, "weight", "torch", why, None
    sharded = is_sharded(layer.weight)
    problem = _problem(Gathered(first, values=False) if sharded else first, tokens, dtype)
    choice = dispatch.choose(problem)
    form = "output" if method.output else "product" if problem.hadamard else "factors"
    why = "W * (1 + s*BA) is formed once each way; " if problem.hadamard else ""
    why += stored
    why += f"sharded over {layer.weight.device_mesh.size()} processes; " if sharded else ""
    return names, form, choice.backend.name, why + choice.why(), problem


def _product_alone(kind: Frozen, adapter: Bound, tokens: int, dtype: torch.dtype | None) -> str | None:
    """How the product of few rows with a weight in parts is taken, where it is a call of its own (``ops.linear``)."""
    method, W = adapter.method, kind.matrix(adapter.holder())
    if tokens > ops.FEW or dispatch.is_eager(W.parts[0]) or method.reads_weight or method.weight:
        return None
    if method.factors is not None and not ops.apart_in_form(method.factors(adapter), adapter.training):
        return None
    w = frozen.coded(W.spec, W.parts, whole=False)
    inside = w is not None and decode.takes(w, tokens, W.compute or dtype or W.dtype)
    return f"the product of few rows is a call of its own, {'that decodes in its loop' if inside else 'after that'}"


def _explain_parameter(
    layer: PeftParameter, names: str, adapters: Sequence[Bound], tokens: int, dtype: torch.dtype | None
) -> Row:
    owner, kind = layer.owner, layer.base_class.__name__
    why = experts.why_not(owner, layer.base_class) if layer.kind.stacked else "it reads the matrix itself"
    if why is not None or not layer.routed:
        return (
            names,
            "weight",
            "torch",
            f"the weight is formed in each call of {kind}: {why or 'not in its call'}",
            None,
        )
    E, each = layer.weight.shape[0], experts.experts_per_token(owner)
    x = torch.empty(1, device="meta", dtype=dtype or layer.weight.dtype).expand(tokens * each, layer.in_features)
    weight, bias = layer.kind.matrix(layer)[0], None if layer.bias is None else layer.bias[0]
    f, later = factors_of(adapters[0]).at(0), "; the others one after the other" if len(adapters) > 1 else ""
    problem = replace(operands.foreseen(f, x, weight, bias, None, True, weight.device), groups=E)
    choice = dispatch.choose(problem)
    why = f"{E} experts, {each} a row, on their routed rows alone{later}; {choice.why()}"
    return names, "experts", choice.backend.name, why, problem


def _like_weight(adapter: Bound) -> Tensor:
    """The frozen weight, or a matrix of its shape where that is none or would have to be decoded."""
    kind = now(adapter)
    other = kind.packed or kind.opaque
    return torch.empty(adapter.out_features, adapter.in_features, device="meta") if other else adapter.matrix


def _problem(adapter: Bound, tokens: int, dtype: torch.dtype | None, beside: bool = False) -> operands.Problem | None:
    """The call that an adapter makes on ``tokens`` rows, without making it; ``beside`` a product that is there, None
    where that is no call of the expression."""
    method = adapter.method
    if beside and not method.beside:
        return None
    with torch.no_grad():
        f = (method.output or method.factors)(adapter)
    behind = method.output is not None
    if beside and not behind and f.A is None and f.d_out is None:
        return None
    width = adapter.out_features if behind else adapter.in_features
    kind, holder = adapter.kind, adapter.holder()
    weight = kind.like(holder)
    x = torch.empty(1, device="meta", dtype=dtype or kind.dtype(holder)).expand(tokens, width)
    if beside or behind:
        w, c = None, x if behind else x[:, :1].expand(tokens, adapter.out_features)
    else:
        w, c = None if method.replaces_weight else _like_weight(adapter), None
    bias = f.bias if f.bias is not None or c is not None else adapter.bias
    return operands.foreseen(f, x, w, bias, c, adapter.training, weight.device)
