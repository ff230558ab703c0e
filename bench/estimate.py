"""What fp.estimate says of two models of Llama 3's shapes, in GiB: ours and HF PEFT's. Nothing is measured.

    python bench/estimate.py [--out bench/results/estimate.csv]

Meta device, bf16 base with fp32 adapters, every linear layer but the output embedding, r = 16, 8192 tokens.
"""

from __future__ import annotations

import tables
import torch

import fused_peft as fp

TOKENS, R = 8192, 16
MODELS = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
CONFIGS = {
    "lora": fp.LoraConfig(r=R, target_modules="all-linear"),
    "lora+dropout": fp.LoraConfig(r=R, lora_dropout=0.1, target_modules="all-linear"),
    "dora": fp.DoraConfig(r=R, target_modules="all-linear"),
    "ssb": fp.SSBConfig(target_modules="all-linear"),
    "ia3": fp.IA3Config(target_modules="all-linear"),
}


def llama(name: str) -> torch.nn.Module:
    """The model on the meta device, in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**MODELS[name], num_key_value_heads=8, vocab_size=128256, dtype=torch.bfloat16)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def row(model: str, method: str, found) -> dict[str, str]:
    trained = found.adapter + found.gradients + found.optimizer
    known = found.peft_x is not None
    sizes = {
        "frozen": found.base,
        "trained": trained + found.buffers,
        "x": found.x,
        "beyond_x": found.beyond_x,
        "total": found.total,
        "peft_kept": found.peft_x + found.peft_beyond_x if known else None,
        "peft_total": found.peft_total,
    }
    gib = {name: "" if n is None else f"{n / 2**30:.2f}" for name, n in sizes.items()}
    return {"model": model, "method": method, **gib}


def rows() -> list[dict[str, str]]:
    built = {name: llama(name) for name in MODELS}
    return [row(m, name, fp.estimate(built[m], config, TOKENS)) for m in built for name, config in CONFIGS.items()]


if __name__ == "__main__":
    tables.command(__doc__, rows)
