"""What the examples share: the options, the adapters by name, the run, the bytes that are kept for backward."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import peft
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, logging
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kept import held_by
from kept import kept as bytes_kept

import fused_peft as fp

BARS = sys.stderr.isatty()  # in a log, Trainer's lines every logging_steps
if not BARS:
    logging.disable_progress_bar()

RANKED = {"r": 8, "lora_alpha": 16}
PEFT = {  # Hugging Face PEFT's methods: (config, learning rate)
    "lora": (lambda **k: peft.LoraConfig(**RANKED, **k), 2e-3),
    "lora_dropout": (lambda **k: peft.LoraConfig(**RANKED, lora_dropout=0.1, **k), 2e-3),
    "dora": (lambda **k: peft.LoraConfig(**RANKED, use_dora=True, **k), 2e-3),
    "ia3": (lambda **k: peft.IA3Config(feedforward_modules=[], **k), 1e-2),
}
OURS = {  # methods that PEFT does not have by itself
    "ssb": (fp.SSBConfig, 1e-2),
    "ssl": (fp.SSLConfig, 1e-2),
    "flora": (lambda **k: fp.FloraConfig(**RANKED, lora_dropout=0.1, **k), 2e-3),
}


def arguments(parser: argparse.ArgumentParser, argv: list[str] | None, **defaults) -> argparse.Namespace:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--method", default="lora", choices=[*PEFT, *OURS], help=f"{', '.join(OURS)} are not in PEFT")
    parser.add_argument("--stock", action="store_true", help="PEFT as it is, not accelerated")
    parser.add_argument("--steps", type=int, help="training steps in all")
    parser.add_argument("--output-dir", type=Path, help="checkpoints go to METHOD in it, a stock run's to METHOD-stock")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="save and stop after this step, as if interrupted")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.stock and args.method in OURS:
        parser.error(f"--stock: PEFT has no {args.method}")
    args.folder = args.output_dir / (args.method + "-stock" * args.stock)
    found = args.folder.exists() and get_last_checkpoint(args.folder)
    if found and not args.resume:
        parser.error(f"{args.folder} has checkpoints: --resume continues from them, another --output-dir starts anew")
    if args.resume and not found:
        parser.error(f"--resume: {args.folder} has no checkpoint")
    return args


def adapted(model: nn.Module, method: str, **where) -> nn.Module:
    return peft.get_peft_model(model, {**PEFT, **OURS}[method][0](**where))


def training_arguments(args: argparse.Namespace, **options) -> TrainingArguments:
    return TrainingArguments(
        str(args.folder), max_steps=args.steps, learning_rate={**PEFT, **OURS}[args.method][1], warmup_steps=10,
        save_steps=args.save_steps, save_total_limit=2, logging_steps=50, seed=args.seed, use_cpu=args.cpu,
        report_to=[], disable_tqdm=not BARS, **options,
    )  # fmt: skip


class StopAfter(TrainerCallback):
    """Saves and stops after a step, as an interrupted run would have."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(trainer: Trainer, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate, train and evaluate; the adapter of a finished run is saved. (metrics before, metrics after)."""
    trainer.add_callback(StopAfter(args.stop_after))
    before = trainer.evaluate()
    trained = trainer.train(resume_from_checkpoint=args.resume).metrics
    after = {**trained, **trainer.evaluate()}
    if trainer.state.global_step < args.steps:
        print(f"stopped after step {trainer.state.global_step} of {args.steps}; --resume continues")
    else:
        trainer.model.save_pretrained(args.folder / "adapter")
    return before, after


def kept(model: nn.Module, **batch: Tensor) -> int:
    """Bytes that a forward keeps for backward beside the batch and what the model itself holds."""
    return bytes_kept(lambda: model(**batch).loss, [*batch.values(), *held_by(model)])
