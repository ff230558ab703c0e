"""Training steps of whole models: forward, backward and AdamW, on one core.

    python -m pytest bench/bench_training.py --results bench/results/cpu

The demo's classifier (all-MiniLM-L6-v2, 32 sequences of 32 tokens) and the small Llama of examples/causal_lm.py (16 of
129). Contenders step in turn: HF PEFT's model, the same accelerated, our own layers, and the floor, the model with
gradients through every frozen layer and nothing but a head (a final norm) to train. Nothing is timed before
their losses and gradients agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import causal_lm
import demo
import peft
import pytest
import torch
import torch.nn.functional as F
from baselines import right
from clock import compared, environment, spread
from torch import nn
from transformers import RobertaConfig, RobertaModel

import fused_peft as fp


class Task(NamedTuple):
    """A model, what trains of it beside any adapter, its loss, the tokens a step; and what to adapt: its linear layers,
    and those of the feed-forward output among them."""

    model: nn.Module
    head: str
    loss: Callable[[nn.Module], torch.Tensor]
    tokens: int
    targets: list[str]
    out: list[str]


@cache
def minilm() -> Task:
    ids, labels = torch.randint(1000, 20000, (32, 32)), torch.randint(demo.CLASSES, (32,))
    loss = lambda model: F.cross_entropy(model(ids, torch.ones_like(ids)), labels)  # noqa: E731
    return Task(demo.load_model()[0], demo.HEAD, loss, ids.numel(), demo.TARGETS, ["dense"])


@cache
def llama() -> Task:
    ids = torch.randint(0, 256, (causal_lm.BATCH, causal_lm.BLOCK + 1))
    loss = lambda model: model(input_ids=ids, labels=ids).loss  # noqa: E731
    model = causal_lm.LlamaForCausalLM(causal_lm.CONFIG)
    return Task(model, "model.norm", loss, ids.numel(), causal_lm.TARGETS, ["down_proj"])


TASKS = {"MiniLM": minilm, "small Llama": llama}
RANKED = {"r": 8, "lora_alpha": 16}
METHODS = {  # PEFT's config, ours, their options
    "lora": (peft.LoraConfig, fp.LoraConfig, RANKED),
    "lora+dropout": (peft.LoraConfig, fp.LoraConfig, RANKED | {"lora_dropout": 0.1}),
    "dora": (peft.LoraConfig, fp.LoraConfig, RANKED | {"use_dora": True}),
    "ia3": (peft.IA3Config, fp.IA3Config, {}),
    "ssb": (None, fp.SSBConfig, {}),
}


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def models(task: Task, name: str, folder: Path) -> dict[str, nn.Module]:
    """{contender: its model}, PEFT's adapter in all that have it."""
    theirs, own, options = METHODS[name]
    options = {**options, "target_modules": task.targets, "modules_to_save": [task.head]}
    options |= {"feedforward_modules": task.out} if name == "ia3" else {}
    floor = copy.deepcopy(task.model).requires_grad_(False)
    floor.get_submodule(task.head).requires_grad_()
    for path, module in floor.named_modules():  # gradients begin where the first adapters are in the others
        if path.rpartition(".")[2] in task.targets:
            module.register_forward_hook(lambda m, i, y: y if y.requires_grad else y.requires_grad_())
    found = {"frozen": floor, "ours": fp.get_peft_model(copy.deepcopy(task.model), own(**options))}
    if theirs is not None:
        found["peft"] = peft.get_peft_model(copy.deepcopy(task.model), theirs(**options))
        with torch.no_grad():  # away from B = 0, where most gradients say nothing
            for p in trained(found["peft"]):
                p.add_(torch.randn_like(p) * 0.02)
        found["peft"].save_pretrained(folder)
        found["accelerated"] = fp.accelerate(copy.deepcopy(found["peft"]))
        fp.load_adapter(found["ours"], folder)
    return {who: model.train() for who, model in found.items()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def agree(task: Task, found: dict[str, nn.Module]) -> None:
    """Raises AssertionError unless losses and gradients of the three that train PEFT's adapter are the same, without
    dropout, whose masks are each one's own. Gradients are compared by their norms, since names differ."""
    seen = {}
    for who in ("peft", "accelerated", "ours"):
        model = found[who].eval()
        loss = task.loss(model)
        loss.backward()
        seen[who] = [loss.item(), *sorted(p.grad.norm().item() for p in trained(model))]
        model.zero_grad()
        model.train()
        assert seen[who] == pytest.approx(seen["peft"], rel=1e-3), who


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("of", TASKS)
def test_training(benchmark, in_turn, measured, tmp_path, of, name):
    torch.manual_seed(0)
    task = TASKS[of]()
    found = models(task, name, tmp_path)
    optimizers = {k: torch.optim.AdamW(trained(m), 1e-3) for k, m in found.items()}

    def step(who: str) -> None:
        task.loss(found[who]).backward()
        optimizers[who].step()
        optimizers[who].zero_grad()

    benchmark.group = of
    with one_thread():
        if "peft" in found:
            agree(task, found)
        else:
            right(name, torch.float32)
        seconds = in_turn({who: partial(step, who) for who in found}, "ours")
        for who, each in seconds.items():
            rates = spread("steps_per_second", [1 / s for s in each])
            rates |= spread("tokens_per_second", [task.tokens / s for s in each], 0)
            measured("training", model=of, method=name, contender=who, **rates, **compared(seconds, who))
            benchmark.extra_info[who] = rates["steps_per_second_p50"]


def test_penalty(benchmark, in_turn, measured, tiny):
    """What the MPC penalty costs beside a model: RoBERTa-base's shape, LoRA r = 8 on its 72 linear layers."""
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_hidden_layers=1 if tiny else 12)
    model = RobertaModel(config, add_pooling_layer=False)
    fp.get_peft_model(model, fp.LoraConfig(r=8, target_modules=["query", "key", "value", "dense"]))
    ids = torch.randint(3, config.vocab_size, (1, 8) if tiny else (16, 128))
    runs = {
        "model": lambda: model(ids).last_hidden_state.square().mean().backward(),
        "MPC_o": lambda: fp.mpc_penalty(model, "o").backward(),
        "MPC_d": lambda: fp.mpc_penalty(model, "d").backward(),
    }
    benchmark.group = "penalty"
    seconds = in_turn(runs, "MPC_o", most=3)  # a share of seconds that needs no third digit
    for name, each in seconds.items():
        share = spread("percent_of_the_model", [100 * a / b for a, b in zip(each, seconds["model"], strict=True)])
        measured("mpc", step=name, **spread("ms", [1e3 * s for s in each]), **share, **environment())
