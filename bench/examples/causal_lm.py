"""A small Llama learns Python source byte by byte; PEFT's LoRA then teaches it the prose of the language reference.

    python bench/examples/causal_lm.py                                # PEFT and Trainer, accelerated
    python bench/examples/causal_lm.py --stock                        # the same without the callback
    python bench/examples/causal_lm.py --method dora --stop-after 70  # an interrupted run ...
    python bench/examples/causal_lm.py --method dora --resume         # ... ends with the same adapter, bit for bit

All text comes with Python. The base trains on sources of the standard library, once, and is kept in the output folder;
the adapter trains on ``pydoc_data.topics``, what ``help("lambda")`` prints. The figure is bits per byte of topics that
were not trained on. What accelerates is one argument, ``callbacks=[FusedPeftCallback()]``.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from shared import BARS, adapted, arguments, run, training_arguments
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from fused_peft.integrations.transformers import FusedPeftCallback

START, BLOCK, BATCH = 256, 128, 16  # the token in front of every block; bytes a block; blocks a batch
PACKAGES = "asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LlamaConfig(
    vocab_size=257, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
    max_position_embeddings=256, bos_token_id=START, eos_token_id=None, use_cache=False,
)  # fmt: skip


def blocks(text: bytes) -> list[dict[str, torch.Tensor]]:
    """The text as training examples; what is left at the end is dropped."""
    rows = [torch.tensor([START, *text[i : i + BLOCK]]) for i in range(0, len(text) - BLOCK + 1, BLOCK)]
    return [{"input_ids": row, "labels": row} for row in rows]


def sources() -> bytes:
    """The sources of PACKAGES, one after the other."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for package in PACKAGES for file in sorted((root / package).glob("*.py"))]
    return b"\n".join(file.read_bytes() for file in files)


def base_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """The Llama that PACKAGES trained, read from the output folder where it is there."""
    folder = args.output_dir / f"base-{args.base_steps}"
    if not (folder / "config.json").is_file():
        set_seed(0)
        options = TrainingArguments(
            str(folder), max_steps=args.base_steps, learning_rate=3e-3, warmup_steps=20, lr_scheduler_type="cosine",
            per_device_train_batch_size=BATCH, save_strategy="no", logging_steps=50, report_to=[], use_cpu=args.cpu,
            disable_tqdm=not BARS,
        )  # fmt: skip
        data = blocks(sources())
        trainer = Trainer(LlamaForCausalLM(CONFIG), options, default_data_collator, data)
        trainer.train()
        trainer.save_model()
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=300, help="training steps of the base")
    args = arguments(parser, argv, steps=200, output_dir=Path("out/causal_lm"))
    model = base_model(args)
    set_seed(args.seed)
    model = adapted(model, args.method, target_modules=TARGETS, task_type="CAUSAL_LM")
    texts = [text.encode() for _, text in sorted(topics.items())]
    trainer = Trainer(
        model,
        training_arguments(args, per_device_train_batch_size=BATCH, per_device_eval_batch_size=4 * BATCH),
        default_data_collator,
        train_dataset=blocks(b"\n".join(text for i, text in enumerate(texts) if i % 8)),
        eval_dataset=blocks(b"\n".join(texts[::8])),
        callbacks=[] if args.stock else [FusedPeftCallback()],
    )
    before, after = run(trainer, args)
    bits = [f"{metrics['eval_loss'] / math.log(2):.4f}" for metrics in (before, after)]
    print(f"{bits[0]} bits per byte before, {bits[1]} after; {after['train_steps_per_second']} steps per second")
    return after


if __name__ == "__main__":
    main()
