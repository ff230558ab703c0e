"""What the MPC penalty costs beside a model: RoBERTa-base's shape, LoRA r = 8 on its 72 linear layers, 16 x 128 tokens.

    python bench/mpc.py [--out bench/results/cpu/mpc.csv] [--rounds 5]

Forward + backward of the penalty, and of the model without it; medians of interleaved rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import tables
import torch
from transformers import RobertaConfig, RobertaModel

import fused_peft as fp

TARGETS = ["query", "key", "value", "dense"]
BATCH, TOKENS, RANK = 16, 128, 8


def measure(rounds: int, layers: int = 12) -> dict[str, float]:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_hidden_layers=layers)  # -base else
    model = RobertaModel(config, add_pooling_layer=False)
    fp.get_peft_model(model, fp.LoraConfig(r=RANK, target_modules=TARGETS))
    ids = torch.randint(3, config.vocab_size, (BATCH, TOKENS))
    runs = {
        "model": lambda: model(ids).last_hidden_state.square().mean(),
        "MPC_o": lambda: fp.mpc_penalty(model, "o"),
        "MPC_d": lambda: fp.mpc_penalty(model, "d"),
    }
    times = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            model.zero_grad()
            started = time.perf_counter()
            run().backward()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = measure(args.rounds)
    columns = ("forward + backward", "milliseconds", "percent_of_the_model", "torch")
    rows = [(name, f"{ms:.2f}", f"{100 * ms / found['model']:.3f}", torch.__version__) for name, ms in found.items()]
    for row in rows:
        print(f"{row[0]:<8}{row[1]:>12} ms{row[2]:>10} %")
    tables.write(args.out, [dict(zip(columns, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
