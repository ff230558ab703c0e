"""Training steps under Hugging Face PEFT, as it is and after fp.accelerate: interleaved medians.

    python bench/accelerated.py [--rounds 15] [--out bench/results/cpu/accelerated.csv]

all-MiniLM-L6-v2 on 32 sequences of 32 tokens, and the small Llama of examples/causal_lm.py on 16 of 129: forward,
backward and AdamW step. A ratio is the median over rounds of accelerated / stock.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import demo
import peft
import tables
import torch
from clock import environment, interleave, keep_memory, relative, spread
from torch import nn

import fused_peft as fp

sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))
import causal_lm

RANKED = {"r": 8, "lora_alpha": 16}
METHODS = {  # of the names of modules, all and those of the feed-forward output
    "lora": lambda names, out: peft.LoraConfig(**RANKED, target_modules=names),
    "lora_dropout": lambda names, out: peft.LoraConfig(**RANKED, lora_dropout=0.1, target_modules=names),
    "dora": lambda names, out: peft.LoraConfig(**RANKED, use_dora=True, target_modules=names),
    "ia3": lambda names, out: peft.IA3Config(target_modules=names, feedforward_modules=out),
}


def minilm() -> tuple[nn.Module, Callable, list[str], list[str]]:
    """(model, its loss, names of its linear layers, and of those of the feed-forward output)"""
    ids = torch.randint(1000, 20000, (32, 32))
    step = lambda model: model(input_ids=ids).last_hidden_state.square().mean()  # noqa: E731
    return demo.load_model()[0].encoder, step, demo.TARGETS, ["dense"]


def llama() -> tuple[nn.Module, Callable, list[str], list[str]]:
    ids = torch.randint(0, 256, (causal_lm.BATCH, causal_lm.BLOCK + 1))
    step = lambda model: model(input_ids=ids, labels=ids).loss  # noqa: E731
    return causal_lm.LlamaForCausalLM(causal_lm.CONFIG), step, causal_lm.TARGETS, ["down_proj"]


MODELS = {"MiniLM": minilm, "small Llama": llama}


def measure(rounds: int, names: tuple[str, ...] = tuple(METHODS), models=MODELS) -> list[dict[str, str]]:
    rows = []
    for of in models:
        torch.manual_seed(0)
        base, loss, targets, out = models[of]()
        for name in names:
            stock = peft.get_peft_model(copy.deepcopy(base), METHODS[name](targets, out))
            both = {"stock": stock, "accelerated": fp.accelerate(copy.deepcopy(stock))}
            trained = {k: [p for p in m.parameters() if p.requires_grad] for k, m in both.items()}
            optimizers = {k: torch.optim.AdamW(ps, lr=1e-4) for k, ps in trained.items()}

            def step(kind: str) -> None:
                loss(both[kind]).backward()  # noqa: B023
                optimizers[kind].step()  # noqa: B023
                optimizers[kind].zero_grad()  # noqa: B023

            seconds = interleave({kind: partial(step, kind) for kind in both}, rounds)
            rates = {}
            for kind, each in seconds.items():
                rates |= spread(f"{kind}_per_second", [1 / s for s in each], 2)
            ratio = spread("time_ratio", relative(seconds, "accelerated", "stock"))
            rows.append({"model": of, "method": name, **rates, **ratio, **environment()})
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tables.write(args.out, measure(args.rounds))


if __name__ == "__main__":
    keep_memory(sys.argv)
    main()
