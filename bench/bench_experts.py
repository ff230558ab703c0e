"""One layer of experts: forward + backward with LoRA on both stacks, ours and HF PEFT's, over the frozen layer.

    python -m pytest bench/bench_experts.py --results bench/results/cpu

Transformers' Mixtral experts, hidden 512, two experts a token, 2048 tokens, r 8, adapters in the base's dtype. The
frozen layer is Transformers' own, by its faster implementation: the grouped product, or its loop. ``accelerated`` is
PEFT's model after ``fp.accelerate``, ``ours`` that of ``fp.get_peft_model``. Bytes kept are what autograd holds between
forward and backward, the layer's own tensors and its input left out.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from baselines import DTYPES
from clock import compared, spread
from torch import nn

HIDDEN, TOKENS, RANK, TOP = 512, 2048, 8, 2
SIZES = [(8, 1024), (32, 512), (128, 256)]  # experts, their width
STACKS = ["gate_up_proj", "down_proj"]


class Holder(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def layer(experts: int, hidden: int, width: int, dtype: torch.dtype, implementation: str) -> Holder:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_local_experts": experts}
    config = MixtralConfig(**sizes, num_experts_per_tok=TOP)
    config._experts_implementation = implementation
    made = MixtralExperts(config)
    for p in made.parameters():
        nn.init.normal_(p, std=hidden**-0.5)
    return Holder(made.to(dtype)).requires_grad_(False)


def contenders(experts: int, hidden: int, width: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    import peft

    import fused_peft as fp

    logging.disable(logging.WARNING)
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": [], "init_lora_weights": False}
    settings["target_parameters"] = [f"experts.{name}" for name in STACKS]
    stock = peft.get_peft_model(
        layer(experts, hidden, width, dtype, "grouped_mm"), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    )
    ours = fp.get_peft_model(
        layer(experts, hidden, width, dtype, "grouped_mm"), fp.LoraConfig(**settings), autocast_adapter_dtype=False
    )
    with torch.no_grad():  # the same adapter
        wrapper = stock.base_model.model.experts
        while hasattr(wrapper, "parameter_name"):
            own = ours.experts._modules[f"{wrapper.parameter_name}_adapter"]
            A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            own.lora_A.copy_(A.view(own.lora_A.shape))
            own.lora_B.copy_(B.view(B.shape[0], RANK, experts).permute(2, 0, 1))
            wrapper = wrapper.base_layer
    return {
        "frozen": layer(experts, hidden, width, dtype, "grouped_mm"),
        "frozen loop": layer(experts, hidden, width, dtype, "eager"),
        "ours": ours,
        "accelerated": fp.accelerate(copy.deepcopy(stock)),
        "peft": stock,
    }


def kept(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the storages that autograd holds for backward, less the model's and the inputs'."""
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        model(*inputs)
    own = {t.untyped_storage().data_ptr() for t in (*inputs, *model.parameters(), *model.buffers())}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(n for at, n in sizes.items() if at not in own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "width"), SIZES, ids=lambda n: str(n))
def test_experts(benchmark, in_turn, measured, tiny, experts, width, dtype):
    hidden, tokens = (16, 8) if tiny else (HIDDEN, TOKENS)
    width = 8 if tiny else width
    found = contenders(experts, hidden, width, DTYPES[dtype])
    torch.manual_seed(2)
    x = torch.randn(tokens, hidden, dtype=DTYPES[dtype], requires_grad=True)
    index = torch.stack([torch.randperm(experts)[:TOP] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP).to(x.dtype).requires_grad_()
    dy = torch.randn_like(x)
    trained = {who: [p for p in m.parameters() if p.requires_grad] for who, m in found.items()}

    def step(who: str):
        return torch.autograd.grad(found[who](x, index, weights), [x, weights, *trained[who]], dy)

    limit = 1e-5 if dtype == "fp32" else 2e-2
    want, *others = (found[who](x, index, weights).detach() for who in ("peft", "ours", "accelerated"))
    assert all((y - want).norm() <= limit * want.norm() for y in others)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        few = {} if dtype == "fp32" else {"warmup": 0, "most": 3}  # CPUs without bf16 products take half a minute
        seconds = in_turn({who: lambda who=who: step(who) for who in found}, "ours", **few)
    finally:
        torch.set_num_threads(threads)
    base = min(("frozen", "frozen loop"), key=lambda who: sorted(seconds[who])[len(seconds[who]) // 2])
    seconds["frozen"] = seconds[base]  # the faster of the two
    benchmark.group = f"{experts} experts {dtype}"
    for who in ("frozen", "ours", "accelerated", "peft"):
        about = {"experts": experts, "hidden": hidden, "width": width, "tokens": tokens, "top": TOP, "r": RANK}
        figures = {**spread("ms", [1e3 * s for s in seconds[who]]), **compared(seconds, who)}
        held = kept(found[who], (x, index, weights))
        measured("experts", **about, dtype=dtype, contender=who, **figures, kept_bytes=held)
