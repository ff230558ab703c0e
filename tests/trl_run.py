"""TRL's trainers on a small Llama, run by test_trl: prints, as JSON, what it found for five methods."""

import contextlib
import json
import sys
import uuid
import warnings
from pathlib import Path

out, sys.stdout = sys.stdout, sys.stderr  # TRL talks
import datasets  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from datasets import arrow_dataset, fingerprint  # noqa: E402
from safetensors import safe_open  # noqa: E402
from test_trainer import FIVE, FUSED, Losses, llama, through, trained_tensors  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.integrations.transformers import FusedPeftCallback  # noqa: E402

fingerprint.Hasher.hash = classmethod(
    lambda cls, value: uuid.uuid4().hex
)  # datasets' pickler does not know this pyarrow
for module in (fingerprint, arrow_dataset):
    module.generate_fingerprint = module.update_fingerprint = lambda *args, **kwargs: uuid.uuid4().hex

STEPS = 4
WORDS = [f"w{i}" for i in range(3, 40)]
vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
TEXTS = {"text": [" ".join(WORDS[i : i + 9]) for i in range(16)]}
PAIRS = {
    "prompt": [" ".join(WORDS[i : i + 3]) for i in range(16)],
    "chosen": [" " + " ".join(WORDS[i + 3 : i + 6]) for i in range(16)],
    "rejected": [" " + " ".join(WORDS[i + 16 : i + 20]) for i in range(16)],
}


def run(kind, folder, model, callback=True, resume=None, **kwargs):
    """(losses, the trainer) of a few steps."""
    args = getattr(trl, f"{kind}Config")(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=False, learning_rate=1e-2, logging_steps=1, save_steps=STEPS // 2, seed=0,
        save_strategy="steps" if kind == "SFT" else "no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict(TEXTS if kind == "SFT" else PAIRS)
    losses = Losses()
    callbacks = [FusedPeftCallback()] * callback + [losses]
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=args, train_dataset=data, processing_class=TOKENIZER, callbacks=callbacks, **kwargs
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses.seen, trainer


def shaken(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def keys(folder):
    found = []
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found += f.keys()
    return found


def sft(name, config, folder):
    losses, whole = run("SFT", folder / "whole", llama(), peft_config=config)
    half = folder / f"whole/checkpoint-{STEPS // 2}"
    _, again = run("SFT", folder / "again", llama(), peft_config=config, resume=str(half))
    resumed = trained_tensors(again.model)
    found = {
        "losses": losses,
        "resumed": all(torch.equal(t, resumed[n]) for n, t in trained_tensors(whole.model).items()),
        "fused": not any(type(m) in FUSED for m in whole.model.modules()),
        "keys": keys(half),
    }
    own = config.to_peft()
    if own is not config:
        found["stock"] = run("SFT", folder / "stock", llama(), callback=False, peft_config=own)[0]
    start = folder / "start"  # the same adapter in either library's model
    through(peft.get_peft_model, config).save_pretrained(start)
    found["theirs"] = run("SFT", folder / "theirs", peft.PeftModel.from_pretrained(llama(), start, is_trainable=True))[
        0
    ]
    ours, adapted = run("SFT", folder / "ours", fp.load_adapter(llama(), start))
    last = folder / f"ours/checkpoint-{STEPS}"
    ids = torch.arange(3, 11)[None]
    loaded = fp.load_adapter(llama(), last).eval()
    with torch.no_grad():
        far = (loaded(input_ids=ids).logits - adapted.model.eval()(input_ids=ids).logits).abs().max().item()
    return found | {"ours": ours, "reloaded": far, "our keys": keys(last)}


def dpo(name, config, folder):
    found = {"config": run("DPO", folder, llama(), peft_config=config)[0]}
    if (own := config.to_peft()) is not config:
        found["stock"] = run("DPO", folder, llama(), callback=False, peft_config=own)[0]
    found["ours, trained before"] = run("DPO", folder, shaken(through(fp.get_peft_model, config)))[0]
    if name != "adalora":  # of which PEFT lets one adapter train
        found["PEFT's, trained before"] = run("DPO", folder, shaken(through(peft.get_peft_model, config)))[0]
    return found


def grpo(config, folder):
    """Losses, PEFT's beside them, of a policy whose reference is its own base: the adapter is disabled for it."""

    def losses(config):
        args = trl.GRPOConfig(
            str(folder), max_steps=STEPS - 1, per_device_train_batch_size=4, num_generations=2, beta=0.1, report_to=[],
            max_completion_length=4, use_cpu=True, bf16=False, learning_rate=1e-2, logging_steps=1, seed=0,
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        torch.manual_seed(0)
        seen = Losses()
        trl.GRPOTrainer(
            llama(), lambda completions, **_: [float(len({*c})) for c in completions], args=args, peft_config=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]}), processing_class=TOKENIZER,
            callbacks=[FusedPeftCallback(), seen],
        ).train()  # fmt: skip
        return seen.seen

    own = config.to_peft()
    return {"ours": losses(config)} | ({"stock": losses(own)} if own is not config else {})


def refused():
    """GRPO, whose reference cannot be given."""
    args = trl.GRPOConfig("unused", beta=0.1, report_to=[], use_cpu=True, bf16=False)
    try:
        trl.GRPOTrainer(through(fp.get_peft_model, FIVE["lora"]), lambda *a, **k: [0.0], args=args)
    except ValueError as e:
        return str(e)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            "sft": {name: sft(name, config, folder / name) for name, config in FIVE.items()},
            "dpo": {name: dpo(name, config, folder / f"dpo-{name}") for name, config in FIVE.items()},
            "grpo": {name: grpo(config, folder / f"grpo-{name}") for name, config in FIVE.items()},
            "refused": refused(),
        }
    print(json.dumps(found), file=out, flush=True)
