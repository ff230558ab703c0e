"""LoRA on the experts of a small Qwen3-MoE: stock PEFT and an accelerated copy, step by step on the same batches.

    OMP_NUM_THREADS=1 python bench/examples/moe.py             # within a minute on one core
    OMP_NUM_THREADS=1 python bench/examples/moe.py --steps 10  # a glance

The text is the standard library's sources, byte by byte. PEFT's ``target_parameters`` puts adapters on both stacks
of experts, ``target_modules`` on q_proj and v_proj. Printed are both losses, a step's time as the median of steps that
take turns, and the bytes that one forward keeps for backward beside the model's own.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time

import peft
import torch
from causal_lm import START, blocks, sources
from shared import kept
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

import fused_peft as fp

BATCH = 8  # blocks of 1 + 128 tokens
CONFIG = Qwen3MoeConfig(
    vocab_size=257, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192, max_position_embeddings=256, bos_token_id=START,
    eos_token_id=None, use_cache=False,
)  # fmt: skip
ADAPTERS = peft.LoraConfig(
    r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """{figure: {who: it}}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)
    data = [block["input_ids"] for block in blocks(sources())]
    random.Random(args.seed).shuffle(data)
    stock = peft.get_peft_model(Qwen3MoeForCausalLM(CONFIG), ADAPTERS).train()
    models = {"PEFT": stock, "accelerated": fp.accelerate(copy.deepcopy(stock))}
    forms = {row.form for row in fp.explain(models["accelerated"])}
    print("forms of the accelerated layers:", ", ".join(sorted(forms)))
    optimizers = {
        who: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3) for who, m in models.items()
    }
    losses, seconds = {who: [] for who in models}, {who: [] for who in models}
    for step in range(args.steps):
        ids = torch.stack([data[(step * BATCH + i) % len(data)] for i in range(BATCH)])
        for who in list(models)[:: -1 if step % 2 else 1]:  # each goes first in turn
            start = time.perf_counter()
            loss = models[who](input_ids=ids, labels=ids).loss
            loss.backward()
            optimizers[who].step()
            optimizers[who].zero_grad()
            seconds[who].append(time.perf_counter() - start)
            losses[who].append(loss.item())
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3d}", *(f"  {who} {each[-1]:.6f}" for who, each in losses.items()), flush=True)
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    nbytes = {who: kept(m, input_ids=ids, labels=ids) for who, m in models.items()}
    medians = {who: statistics.median(each) for who, each in seconds.items()}
    print(f"losses differ by {apart:.1e} at most")
    for who in models:
        print(f"{who:>11}: {1e3 * medians[who]:6.1f} ms a step, {nbytes[who] / 2**20:6.1f} MiB kept for backward")
    return {"losses": losses, "seconds": medians, "kept": nbytes}


if __name__ == "__main__":
    main()
