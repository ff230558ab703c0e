"""Training steps of all-MiniLM-L6-v2 under Hugging Face PEFT, as it is and after fp.accelerate: interleaved medians.

    python bench/accelerated.py [--rounds 15] [--out bench/results/cpu/accelerated.csv]

Forward, backward and AdamW step on 32 sequences of 32 tokens; a ratio is the median over rounds of accelerated / stock.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

import demo
import peft
import tables
import torch
from cpu import KEEP_MEMORY

import fused_peft as fp

METHODS = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=demo.TARGETS),
    "lora_dropout": lambda: peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=demo.TARGETS),
    "dora": lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=demo.TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=demo.TARGETS, feedforward_modules=["dense"]),
}


def measure(rounds: int, names: tuple[str, ...] = tuple(METHODS)) -> list[dict[str, str]]:
    torch.manual_seed(0)
    base = demo.load_model()[0].encoder
    ids = torch.randint(1000, 20000, (32, 32))
    rows = []
    for name in names:
        stock = peft.get_peft_model(copy.deepcopy(base), METHODS[name]())
        models = {"stock": stock, "accelerated": fp.accelerate(copy.deepcopy(stock))}
        trained = {k: [p for p in m.parameters() if p.requires_grad] for k, m in models.items()}
        optimizers = {k: torch.optim.AdamW(ps, lr=1e-4) for k, ps in trained.items()}
        seconds = {k: [] for k in models}
        for i in range(rounds + 2):
            for kind, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids).last_hidden_state.square().mean().backward()
                optimizers[kind].step()
                optimizers[kind].zero_grad()
                if i >= 2:
                    seconds[kind].append(time.perf_counter() - started)
        ratio = statistics.median(a / b for a, b in zip(seconds["accelerated"], seconds["stock"], strict=True))
        per_second = {k: f"{1 / statistics.median(s):.2f}" for k, s in seconds.items()}
        rows.append({"method": name, **per_second, "time_ratio_p50": f"{ratio:.3f}", "torch": torch.__version__})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.rounds)
    for row in found:
        print(*row.values(), sep="\t")
    tables.write(args.out, found)


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():  # read by the C library at start-up only
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    main()
