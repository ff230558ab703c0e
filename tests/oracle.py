"""Comparing a layer with its paper formula in fp64: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from unittest.mock import patch

import torch
from cases import SMALL, Case, Shape
from paper import FORMULAS

from fused_peft import PeftLinear
from fused_peft.core import ops
from fused_peft.core.dropout import keep_mask, new_seed
from fused_peft.core.operands import TENSORS, Operands, Problem

_backend_for = ops.backend_for

TOLERANCE = 1e-9
INTERPRETED = 2e-7  # of a kernel in the interpreter, which gets its scalars in fp32


def build(case: Case, shape: Shape, bias: bool = True, dtype=torch.float64, randomise: bool = True) -> PeftLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape.K, shape.N, bias=bias, dtype=dtype)
    layer = PeftLinear.from_linear(linear, case.make(shape.r))
    if randomise:
        with torch.no_grad():
            for name in layer.tensor_names:
                getattr(layer, name).add_(torch.randn(getattr(layer, name).shape, dtype=dtype))
            for name in ("dash_U", "dash_Vh"):
                if hasattr(layer, name):  # as if the warm-up were over
                    getattr(layer, name).normal_()
    return layer


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The first of the cases that make one and the same call: equal operands given, options and gradients wanted."""
    found: dict[object, Case] = {}
    for case in cases:
        calls = []

        def spy(o: Operands, calls=calls):
            wanted = tuple(isinstance(t, torch.Tensor) and t.requires_grad for t in o[:TENSORS])
            calls.append((replace(Problem.of(o), p=float(o.p > 0)), wanted))
            return _backend_for(o)

        with patch.object(ops, "backend_for", spy), patch.object(ops, "is_eager", lambda x: False):
            build(case, SMALL)(inputs(SMALL)[0])
        found.setdefault(tuple(calls) or case.name, case)
    return list(found.values())


def inputs(shape: Shape, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape.lead, shape.K, generator=generator, dtype=dtype)
    return x, torch.randn(*shape.lead, shape.N, generator=generator, dtype=dtype)


def gradients(y, tensors: dict, dy) -> dict:
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True))}


def layer_results(layer: PeftLinear, x, dy, seed: int = 7) -> dict:
    """{y, dx, and the gradient of every adapter parameter} as the layer computes them, dropout seeded."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    return gradients(layer(x), {"x": x, **{n: getattr(layer, n) for n in layer.tensor_names}}, dy)


def paper_results(case: Case, layer: PeftLinear, x, dy, seed: int = 7) -> dict:
    """The same from tests/paper.py and PyTorch's autograd."""
    leaf = x.detach().requires_grad_()
    p = {n: getattr(layer, n).detach().clone().requires_grad_() for n in layer.tensor_names}
    constants = case.constants(layer, layer.config)
    drop = next((getattr(layer.config, n) for n in ("lora_dropout", "vera_dropout") if hasattr(layer.config, n)), 0.0)
    if drop and layer.training:
        torch.manual_seed(seed)
        constants["drop"] = keep_mask(new_seed(x.device), x.shape, drop).to(x.dtype) / (1 - drop)
    bias = None if layer.bias is None else layer.bias.detach()
    y = FORMULAS[case.method](leaf, layer.weight.detach(), bias, p, constants)
    return gradients(y, {"x": leaf, **p}, dy)


def disagreements(case: Case, layer: PeftLinear, x, dy, tolerance: float = TOLERANCE) -> list[str]:
    """Names of the results that differ from the formula by more than the tolerance, relative to the largest entry."""
    got, want = layer_results(layer, x, dy), paper_results(case, layer, x, dy)
    assert got.keys() == want.keys()
    wrong = []
    for name, reference in want.items():
        value = got[name]
        assert value.shape == reference.shape, name
        scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
        if not torch.allclose(value, reference, rtol=0, atol=tolerance * scale):  # a NaN is never close
            wrong.append(name)
    return wrong
