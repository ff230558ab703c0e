"""LoRA that PEFT puts on stacks of experts (``LoraConfig(target_parameters=[...])``), at the cost of the routed rows.

PEFT's ParamWrapper forms W_e + s·B_e A_e of every expert e in each call. Wrappers nest, one a stack, and the innermost
holds the experts' module; here the outermost computes what all of them do, by ``core.experts``, on views of PEFT's own
parameters: A (E·r, in), experts one after the other, and B (out, r·E), experts side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..core import dispatch, experts, grouped, operands, ops
from ..core.factors import Factors
from ..core.frozen import is_foreign
from ..core.groups import Groups
from ..core.sharded import is_spread
from ..model.explain import Row


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class ParamWrapper(lora.ParamWrapper):  # by this name PEFT knows its own
    """PEFT's wrapper of one stack, with a fused forward."""

    def forward(self, *args, **kwargs) -> Tensor:
        if not args and "hidden_states" in kwargs:  # PEFT has another name for it
            args = (kwargs.pop("hidden_states"),)
        call = experts.arguments(args, kwargs)
        if call is None or not self.acts() or self.unfused(call[0]):
            return super().forward(*args, **kwargs)
        x, index, weights = call
        wrappers, base = self._chain()
        found = {w.parameter_name: w.fused_factors(w._used()) for w in wrappers if w.acts()}

        def linear(name: str, x: Tensor, groups: Groups) -> Tensor:
            f = found.get(name) or Factors()
            return grouped.linear(x, experts.matrices(base, getattr(base, name)), f, groups, _bias(base, name))

        return experts.forward(base, x, index, weights, linear)

    def acts(self, adapters: list[str] | None = None) -> bool:
        """Whether the wrapper adds anything to its stack in a call."""
        return not self.disable_adapters and not self.merged and bool(self._used(adapters))

    def _used(self, adapters: list[str] | None = None) -> list[str]:
        """Those of the adapters (default: the active ones) that this wrapper has."""
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in self.lora_A]

    def _chain(self) -> tuple[list[lora.ParamWrapper], nn.Module]:
        """The wrappers from this one inwards, and the module that they wrap."""
        wrappers, base = [self], self.base_layer
        while isinstance(base, lora.ParamWrapper):
            wrappers.append(base)
            base = base.base_layer
        return wrappers, base

    def unfused(self, x: Tensor | None = None, adapters: list[str] | None = None) -> str | None:
        """Why a call of this wrapper, on x where one is given, takes PEFT's forward with these adapters (default: the
        active ones); None where it is fused, with all the wrappers in it."""
        wrappers, base = self._chain()
        kind, names = type(base).__name__, [w.parameter_name for w in wrappers]
        for w in wrappers:
            if w._param_ndim != 3:
                return f"{kind}.{w.parameter_name} is a matrix and no stack of experts"
            if w is not self and (hooked(w) or "forward" in w.__dict__ or not isinstance(w, ParamWrapper)):
                return f"the wrapper of {w.parameter_name} has hooks or a forward of its own, which would be bypassed"
            if w is not self and w.disable_adapters and w.merged:
                return f"the wrapper of {w.parameter_name} is disabled but merged, and PEFT unmerges it in its call"
        if reason := experts.class_unread(type(base)) or experts.why_not(base) or _unread(base):
            return reason
        if len(set(names)) < len(names) or not set(names) <= set(experts.stacks(base)):
            return f"{kind}.{names[0]} is not one of its stacks {experts.stacks(base)}, or is wrapped twice"
        for name in experts.stacks(base):
            W = getattr(base, name)
            if W.requires_grad:
                return f"{kind}.{name} is trained itself"
            if x is not None and x.dtype != W.dtype and not ops.autocasting(x):
                return f"x has dtype {x.dtype}, the weights {W.dtype}"
        return next(filter(None, (w._adapters_unfused(base, w._used(adapters)) for w in wrappers)), None)

    def _adapters_unfused(self, base: nn.Module, used: list[str]) -> str | None:
        E, N, K = experts.matrices(base, getattr(base, self.parameter_name)).shape
        if base.is_transposed is self._did_swap_in_out_features:
            return f"{type(base).__name__} was stored the other way round when PEFT wrapped it"
        if E == 1 and base.is_transposed:
            return "of a single expert stored (in, out) PEFT adds B A as it is"
        for name in used:
            A, B, r = self.lora_A[name].weight, self.lora_B[name].weight, self.r[name]
            if is_spread(A) or is_spread(B):
                return f"adapter {name!r} is sharded over several processes"
            if is_foreign(A) or is_foreign(B) or not (A.dtype.is_floating_point and B.dtype.is_floating_point):
                return f"adapter {name!r} is held in a quantised format"
            if A.shape[0] % E or A.shape != (A.shape[0], K) or B.shape != (N, A.shape[0]):
                return (
                    f"adapter {name!r} has A {tuple(A.shape)} and B {tuple(B.shape)}, which do not fit {E} experts of "
                    f"shape {(N, K)} with r={r}"
                )
        return None

    def fused_factors(self, used: list[str]) -> Factors:
        """What these adapters add to the stack, as one update whose rank is the sum of theirs."""
        E, scales = self.num_experts, [self.scaling[name] for name in used]
        A = [(w := self.lora_A[name].weight).view(E, -1, w.shape[1]) for name in used]
        B = [(w := self.lora_B[name].weight).view(w.shape[0], -1, E).permute(2, 0, 1) for name in used]
        s = scales[0]
        if isinstance(s, Tensor) or any(isinstance(t, Tensor) or t != s for t in scales[1:]):
            B, s = [b * t for b, t in zip(B, scales, strict=True)], 1.0
        return Factors(A=A[0], B=B[0], s=s) if len(used) == 1 else Factors(A=torch.cat(A, 1), B=torch.cat(B, 2), s=s)

    def explained(self, tokens: int, dtype: torch.dtype | None) -> Row:
        """Which backend computes the fused call of this stack, and why."""
        base = self._chain()[1]
        W = experts.matrices(base, getattr(base, self.parameter_name)).detach()
        if not (used := self._used()):
            return "lora", "plain", "torch", "no adapter of this layer is active", None
        k = getattr(base.config, "num_experts_per_tok", None)
        x = torch.empty(1, device="meta", dtype=dtype or W.dtype).expand(tokens * (k if isinstance(k, int) else 1), 1)
        with torch.no_grad():
            f = self.fused_factors(used).at(0)
        bias = _bias(base, self.parameter_name)
        bias = None if bias is None else bias[0]
        problem = operands.foreseen(f, x.expand(-1, W.shape[2]), W[0], bias, None, True, W.device)
        choice = dispatch.choose(problem := replace(problem, groups=W.shape[0]))
        return "lora", "experts", choice.backend.name, choice.why(), problem


def started_by(layers: Iterable[nn.Module], adapters: list[str] | None = None) -> dict[nn.Module, ParamWrapper]:
    """Of wrappers inside others, by whose forward they are computed; outer layers come before inner ones."""
    found = {}
    for layer in layers:
        if isinstance(layer, ParamWrapper):
            start = found.get(layer, layer)
            if start.acts(adapters) and isinstance(layer.base_layer, lora.ParamWrapper):
                found[layer.base_layer] = start
    return found


def _bias(base: nn.Module, name: str) -> Tensor | None:
    return getattr(base, f"{name}_bias") if base.has_bias else None


def _unread(base: nn.Module) -> str | None:
    """Why a module of experts does not compute by its class and its stacks alone, or None."""
    kind = type(base).__name__
    if hooked(base) or "forward" in base.__dict__ or "_apply_gate" in base.__dict__:
        return f"{kind} has hooks or a forward of its own, which the fused call would bypass"
    for name in experts.stacks(base):
        if is_foreign(getattr(base, name)):
            return f"{kind}.{name} is a {type(getattr(base, name)).__name__}, whose format is not read"
    return None
