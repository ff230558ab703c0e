"""Which form and backend compute each layer, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..core import dispatch, operands
from ..core.sharded import is_sharded
from .adapted import is_pefts
from .convert import adapted_layers
from .layer import Gathered, PeftLinear

# calls that give the rows of a Hugging Face PEFT model: (model, tokens, dtype) -> [(name, method, form, backend, why)]
OF_PEFT: list[Callable[[nn.Module, int, torch.dtype | None], list[tuple[str, str, str, str, str]]]] = []


@dataclass(frozen=True)
class LayerExplanation:
    """Which form and backend compute one layer, and why: the refusals of the backends before it."""

    name: str
    method: str
    form: str
    backend: str
    why: str


class Explanation(list):
    """One LayerExplanation a layer; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "method", "form", "backend", "why")]
        rows += [(e.name, e.method, e.form, e.backend, e.why) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def explain(model: nn.Module, tokens: int = 2048, dtype: torch.dtype | None = None) -> Explanation:
    """Which form and backend would run each layer on ``tokens`` rows of ``dtype`` (default: the weight's), and why.

    ``print(fp.explain(model))`` shows a table. In strict mode, raises StrictError as the forward would.
    """
    if is_pefts(model):
        for of_peft in OF_PEFT:
            if rows := of_peft(model, tokens, dtype):
                return Explanation(LayerExplanation(*row) for row in rows)
    return Explanation(
        LayerExplanation(name, *explain_layer(layer, tokens, dtype)) for name, layer in adapted_layers(model)
    )


def explain_layer(layer: PeftLinear, tokens: int, dtype: torch.dtype | None) -> tuple[str, str, str, str]:
    """(method, form, backend, why) of one layer."""
    method = layer.method
    if layer.merged or not layer.enabled:
        state = "merged" if layer.merged and layer.enabled else "disabled"
        return method.name, "plain", "torch", f"{state}: one plain linear layer"
    if layer.forms_weight(tokens):
        why = "the weight is formed in each call, then one plain GEMM"
        if method.cost:
            factored, formed = (f / 1e9 for f in method.cost(layer, tokens))
            why += f": {formed:.3g} GFLOP instead of {factored:.3g} factored"
        return method.name, "weight", "torch", why
    sharded = is_sharded(layer.weight)
    problem = _problem(Gathered(layer, values=False) if sharded else layer, tokens, dtype or layer.weight.dtype)
    choice = dispatch.choose(problem)
    form = "output" if method.output else "product" if problem.hadamard else "factors"
    why = "W * (1 + s*BA) is formed once each way; " if problem.hadamard else ""
    why += f"sharded over {layer.weight.device_mesh.size()} processes; " if sharded else ""
    return method.name, form, choice.backend.name, why + choice.why()


def _problem(layer: PeftLinear, tokens: int, dtype: torch.dtype) -> operands.Problem:
    """The call that a layer makes on ``tokens`` rows, without making it."""
    with torch.no_grad():
        f = (layer.method.output or layer.method.factors)(layer)
    behind = layer.method.output is not None
    width = layer.out_features if behind else layer.in_features
    w = None if behind or layer.method.replaces_weight else layer.matrix
    bias = f.bias if f.bias is not None or behind else layer.bias
    x = torch.empty(1, device="meta", dtype=dtype).expand(tokens, width)
    return operands.foreseen(f, x, w, bias, x if behind else None, layer.training, layer.weight.device)
