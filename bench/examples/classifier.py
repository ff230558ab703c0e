"""all-MiniLM-L6-v2 learns which standard-library package a docstring comes from, with PEFT and Trainer.

    python bench/examples/classifier.py                                # PEFT and Trainer, accelerated
    python bench/examples/classifier.py --stock                        # the same without the callback
    python bench/examples/classifier.py --method dora --stop-after 70  # an interrupted run ...
    python bench/examples/classifier.py --method dora --resume         # ... ends with the same adapter, bit for bit

Model, data and split are those of ``bench/demo.py``, whose training loop becomes a Trainer here. What accelerates is
one argument, ``callbacks=[FusedPeftCallback()]``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.nn.functional as F
from shared import adapted, arguments, run, training_arguments
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo

from fused_peft.integrations.transformers import FusedPeftCallback


class Classifier(demo.Classifier):
    """The demo's model with the signature that Trainer wants."""

    def forward(self, input_ids, attention_mask, labels):
        logits = super().forward(input_ids, attention_mask)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean().item()}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = arguments(parser, argv, steps=200, output_dir=Path("out/classifier"))
    loaded, tokenizer = demo.load_model()
    train, test = ([{"input_ids": i, "labels": label} for i, label in rows] for rows in demo.examples(tokenizer))
    set_seed(args.seed)
    model = Classifier(loaded.encoder, demo.CLASSES)
    model = adapted(model, args.method, target_modules=demo.TARGETS, modules_to_save=[demo.HEAD])
    trainer = Trainer(
        model,
        training_arguments(args, per_device_train_batch_size=demo.BATCH, per_device_eval_batch_size=4 * demo.BATCH),
        DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        callbacks=[] if args.stock else [FusedPeftCallback()],
    )
    before, after = run(trainer, args)
    shares = [f"{100 * metrics['eval_accuracy']:.1f} %" for metrics in (before, after)]
    print(f"{shares[0]} right before, {shares[1]} after; {after['train_steps_per_second']} steps per second")
    return after


if __name__ == "__main__":
    main()
