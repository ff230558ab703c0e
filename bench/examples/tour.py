"""From a PEFT script to an adapter that a server reads, in words and on a small model: a minute or two on two cores.

    python bench/examples/tour.py

The words, the code and what it prints are docs/tour.md, written by ``page.py``: a call of ``say`` begins a cell.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import mean, median

import peft
import torch
from causal_lm import CONFIG, TARGETS, blocks, sources, topics
from shared import kept
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

import fused_peft as fp


def say(words: str) -> None:
    print(f"\n{words.strip()}\n", flush=True)


say("""
# A tour

From a script that uses Hugging Face PEFT to the same adapter trained on the fused call, looked into, sized up, saved
and made ready for a server, on a model small enough for two CPU cores and a minute.
""")

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--base-steps", type=int, default=80, help="training steps of the base model")
options.add_argument("--steps", type=int, default=30, help="training steps of each adapter")
options.add_argument("--out", type=Path, default=Path("out/tour"), help="folder of the adapters")
options = options.parse_args()

say("""
## A base model

A Llama of random weights, made in memory, that reads bytes. A few steps on the sources of Python's standard library
give it something to know; in your script this is `from_pretrained("...")`.
""")


def batches(text: bytes, steps: int, size: int = 8) -> list[torch.Tensor]:
    """Token ids (size, 129), one batch a step."""
    rows = torch.stack([block["input_ids"] for block in blocks(text)])
    return [rows[torch.randint(len(rows), (size,))] for _ in range(steps)]


def trainer(model, rate):
    """A step of plain PyTorch: ids in, loss out."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def fell(losses: list[float], some: int = 5) -> str:
    return f"loss {mean(losses[:some]):.4f} in the first {some} steps, {mean(losses[-some:]):.4f} in the last"


torch.set_num_threads(1)  # enough for layers this small, and steadier times
set_seed(0)
base = LlamaForCausalLM(CONFIG)
step = trainer(base, 3e-3)
losses = [step(ids) for ids in batches(sources(), options.base_steps)]
print(f"{sum(p.numel() for p in base.parameters()):,} parameters; {fell(losses)}")

say("""
## The script you have

PEFT's own LoRA on every linear layer. The text that it learns is what `help("lambda")` and its like print.
""")

config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
set_seed(0)
stock = peft.get_peft_model(copy.deepcopy(base), config)
stock.print_trainable_parameters()

say("""
## The one line

The same model again, and `fp.accelerate`. It is still PEFT's model, with PEFT's layers, parameters and files; how its
layers compute has changed.
""")

set_seed(0)
model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
fp.accelerate(model)  # the one line

say("""
Both train on the same batches, in turn, so that a busy machine slows both alike. The losses are the same to rounding,
which adds up over a run. The time is that of a whole step, of which the adapted layers are a part; the models that
people train have wider layers than this one, and [speed on a CPU](speed-cpu.md) and [on a GPU](speed-gpu.md) have
measured figures.
""")

text = "\n".join(topics[name] for name in sorted(topics)).encode()
learning, steps = batches(text, options.steps), {"PEFT": trainer(stock, 4e-3), "accelerated": trainer(model, 4e-3)}
losses, seconds = {name: [] for name in steps}, {name: [] for name in steps}
for ids in learning:
    for name, step in steps.items():
        started = time.perf_counter()
        losses[name].append(step(ids))
        seconds[name].append(time.perf_counter() - started)
for name, found in losses.items():
    print(f"{name:<12} {fell(found)}; {median(seconds[name]):.3f} s a step")
apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
ratio = median(a / b for a, b in zip(seconds["accelerated"], seconds["PEFT"], strict=True))
print(f"the losses differ by {apart:.0e} at most; a step takes {ratio:.2f} of PEFT's time (median of the pairs)")

say("""
## What runs, and why

`fp.explain` has a row for each adapted layer: which form of its method runs, on which backend, and the reason. A
layer that stays PEFT's says so there, and `fp.set_strict(True)` turns a fall-back into an error. Where something is
slower than you expect, look here first.
""")

found = fp.explain(model)
print(*str(found).splitlines()[:4], sep="\n")
print(f"... {len(found)} layers in all, {sum(row.form == 'factors' for row in found)} of them fused")

say("""
## What it keeps in memory

Between forward and backward PyTorch keeps what backward needs. With dropout the difference is largest: PEFT keeps
what it dropped from, and the mask, of every layer; the fused call makes the mask again from a seed of 8 bytes.
""")

with_dropout = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM")
dropping = peft.get_peft_model(copy.deepcopy(base), with_dropout).train()
ids = learning[0]
bytes_kept = {"PEFT": kept(dropping, input_ids=ids, labels=ids)}
fp.accelerate(dropping)
bytes_kept["accelerated"] = kept(dropping, input_ids=ids, labels=ids)
for name, found in bytes_kept.items():
    print(f"{name:<12} keeps {found / 1e6:.1f} MB of a step on {ids.numel()} tokens")

say("""
## Calibrating

On a GPU, `fp.calibrate(model)` tests the kernels against plain PyTorch there, times them on the model's own shapes
for half a minute, and keeps the record on disk; `FusedPeftCallback` does so by itself in a Trainer. A CPU has one
backend, so there is nothing to choose, and the call says so.
""")

try:
    print(fp.calibrate(model))
except ValueError as why:
    print(f"ValueError: {why}")

say("""
## Will a large model fit?

`fp.estimate` counts the bytes of a training step without making a tensor. This is an 8-billion-parameter Llama in
bf16, on the meta device, as it would train on 8192 tokens a step; [memory](memory.md) says what is counted and what
not.
""")

with torch.device("meta"):
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
    large = AutoModelForCausalLM.from_config(LlamaConfig(**llama, dtype=torch.bfloat16))
print(fp.estimate(large, fp.LoraConfig(r=16, lora_dropout=0.1, target_modules="all-linear"), tokens=8192))

say("""
## Saving

PEFT saves its model, accelerated or not, and the folder is PEFT's: it loads where this library is not installed.
""")

adapter = options.out / "adapter"
model.save_pretrained(adapter)
loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter)
with torch.no_grad():
    difference = (loaded.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
print(f"{', '.join(sorted(file.name for file in adapter.glob('adapter*')))}: logits differ by {difference:.0e} at most")

say("""
## For a server

vLLM, SGLang and llama.cpp read plain LoRA with one rank. `fp.export_lora` writes it for every method that is a
low-rank product, and gives each layer's error, which is 0 where the export is exact; [serving](saving.md#serving) has
the list. `merge_and_unload` gives the model without an adapter.
""")

errors = fp.export_lora(model, options.out / "plain-lora")
print(f"{len(errors)} layers exported, largest relative error {max(errors.values())}")
served = peft.PeftModel.from_pretrained(copy.deepcopy(base), options.out / "plain-lora")
merged = model.merge_and_unload()
with torch.no_grad():
    logits = [each.eval()(ids).logits for each in (loaded, served, merged)]
difference = max((other - logits[0]).abs().max().item() for other in logits[1:])
print(f"exported and merged: logits differ from the adapter's by {difference:.0e} at most")

say("""
## The other two doors

`peft.get_peft_model` also takes a config of this library, for a method that PEFT lacks; so do Transformers and TRL.
And without PEFT, `fp.get_peft_model` does the same for plain PyTorch. SSB trains two vectors a layer:
""")

ssb = peft.get_peft_model(copy.deepcopy(base), fp.SSBConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
ssb.print_trainable_parameters()
own = fp.get_peft_model(copy.deepcopy(base), fp.SSBConfig(target_modules=TARGETS))
fp.print_trainable_parameters(own)
step = trainer(own, 3e-2)
losses["ssb"] = [step(ids) for ids in learning]
print(f"ssb          {fell(losses['ssb'])}")
fp.save_pretrained(own, options.out / "ssb")
again = fp.load_adapter(copy.deepcopy(base), options.out / "ssb")
with torch.no_grad():
    reloaded = (again.eval()(ids).logits - own.eval()(ids).logits).abs().max().item()
print(f"saved and loaded: logits differ by {reloaded:.0e} at most")

say("""
## Where to go next

`out/tour` holds the three adapters. The same one line in a Trainer, with checkpoints and resuming, is
`bench/examples/causal_lm.py`; a model in 4 bits is `bench/examples/qlora.py`, a mixture of experts
`bench/examples/moe.py`, several processes `bench/examples/distributed.py`. [accelerate](accelerate.md) says what is
fused and what stays PEFT's, and [methods](methods.md) lists the methods.
""")
