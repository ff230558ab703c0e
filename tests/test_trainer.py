"""Transformers' Trainer with adapted models: PEFT's are accelerated, schedules run, a run resumes exactly."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

import fused_peft as fp  # noqa: E402
from fused_peft.integrations.peft import FUSED  # noqa: E402
from fused_peft.integrations.transformers import FusedPeftCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8
WHERE = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
RANKS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": STEPS, **WHERE}


def base():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


def trainer(folder, model, *callbacks, **kwargs):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 40, (4 * STEPS, 7), generator=generator)
    data = [{"input_ids": r, "labels": int(r[0]) % 2} for r in rows]
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, report_to=[], seed=0,
        save_steps=STEPS // 2, logging_strategy="no", use_cpu=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[*callbacks])


def test_trainer_drives_the_allocator_and_resumes_exactly(tmp_path):
    def adapted(folder):
        model = fp.get_peft_model(base(), fp.AdaLoraConfig(**RANKS, lora_dropout=0.1))
        return trainer(tmp_path / folder, model, FusedPeftCallback())

    whole = adapted("whole")
    whole.train()
    layers = [m for m in whole.model.modules() if isinstance(m, fp.PeftLinear)]
    assert sum(int(m.kept.sum()) for m in layers) == 2 * len(layers)
    again = adapted("again")
    again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{STEPS // 2}"))
    resumed = again.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_a_quantised_model_trains_and_resumes(tmp_path):
    """Trainer refuses quantised models without an adapter of PEFT's; with one of this library's they train."""
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "base")

    def quantised(*but):
        bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=[*but],
        )  # fmt: skip
        kind = transformers.BertForSequenceClassification
        return kind.from_pretrained(tmp_path / "base", quantization_config=bits, device_map="cpu")

    whole = quantised()
    with pytest.raises(
        ValueError, match=r"classifier would train whole, and weight of its Linear4bit is a torch.uint8"
    ):
        fp.get_peft_model(whole, fp.SSBConfig(**WHERE))
    assert not [m for m in whole.modules() if isinstance(m, fp.PeftLinear)]

    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(tmp_path, quantised(), FusedPeftCallback())
    runs = []
    for name, resume in (("whole", None), ("again", str(tmp_path / f"whole/checkpoint-{STEPS // 2}"))):
        model = fp.get_peft_model(quantised("classifier"), fp.SSBConfig(**WHERE))
        runs.append(trainer(tmp_path / name, model, FusedPeftCallback()))
        runs[-1].train(resume_from_checkpoint=resume)
    first, again = ({n: p for n, p in r.model.named_parameters() if p.requires_grad} for r in runs)
    assert any((p != 1).any() for n, p in first.items() if n.endswith("d_in"))
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    saved = load_file(tmp_path / f"whole/checkpoint-{STEPS}/adapter_model.safetensors")
    assert not [n for n in saved if "quant" in n or n.endswith("query.weight")]


def test_a_model_adapted_in_part_is_refused_before_it_trains_for_nothing(tmp_path):
    model = base()
    fp.get_peft_model(model.bert, fp.LoraConfig(target_modules=["query"]))
    with pytest.raises(
        RuntimeError, match=r"A checkpoint by .* lose .* fused_peft.save_pretrained\(model.bert, path\)"
    ):
        trainer(tmp_path, model, FusedPeftCallback()).train()
    with pytest.raises(RuntimeError, match="save_pretrained of Bert"):  # at the first checkpoint, without the callback
        trainer(tmp_path, model).train()
    (text,) = told(trainer(tmp_path, model, FusedPeftCallback(), save_strategy="no").train)
    assert "would lose the adapter of its part" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            fp.LoraConfig(r=2, lora_alpha=8, **WHERE),
            r"has lora_alpha=4 for bert.*was adapted with lora_alpha=8.*load_config",
        ),
        (fp.LoraConfig(r=2, lora_alpha=4, use_rslora=True, **WHERE), r"has use_rslora=False for bert"),
        (fp.LoraConfig(r=2, lora_alpha=4, alpha_pattern={"1.*value": 9}, **WHERE), r"lora_alpha=9"),
        (fp.PissaConfig(r=2, lora_alpha=4, **WHERE), "is for lora, but the model carries pissa"),
        (fp.SSBConfig(**WHERE), "is for lora, but the model carries ssb"),
        (fp.LoraConfig(r=2, lora_alpha=4, **WHERE), None),
        (fp.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, **WHERE), None),
    ],
    ids=["alpha", "rslora", "pattern", "pissa", "ssb", "same", "dropout"],
)
@pytest.mark.parametrize("callback", [True, False])
def test_a_run_resumes_under_the_settings_that_it_began_with(tmp_path, config, message, callback):
    first = trainer(tmp_path, fp.get_peft_model(base(), fp.LoraConfig(r=2, lora_alpha=4, **WHERE)))
    first.train()
    folder = str(tmp_path / f"checkpoint-{STEPS // 2}")
    again = trainer(tmp_path, fp.get_peft_model(base(), config), *[FusedPeftCallback()] * callback)
    before = {n: t.clone() for n, t in again.model.state_dict().items()}
    if message is None:
        again.train(resume_from_checkpoint=folder)
        assert again.state.global_step == STEPS
        return
    with pytest.raises(fp.AdapterFormatError, match=message):
        again.train(resume_from_checkpoint=folder)
    assert all(torch.equal(t, before[n]) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize("config", [fp.LoraConfig(r=2, lora_alpha=None, **WHERE), fp.AdaLoraConfig(**RANKS)], ids=str)
def test_what_resuming_reads_warns_of_nothing_else(tmp_path, config):
    trainer(tmp_path, fp.get_peft_model(base(), config), FusedPeftCallback()).train()
    again = trainer(tmp_path, fp.get_peft_model(base(), config), FusedPeftCallback())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert not [w for w in caught if "other settings" in str(w.message)]
    state = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    assert not again.model.load_state_dict(state, strict=False).unexpected_keys
    plain = fp.merge_and_unload(again.model)
    assert not plain._load_state_dict_pre_hooks
    assert not plain._state_dict_pre_hooks


class Watch(transformers.TrainerCallback):
    """How many layers were PEFT's and how many accelerated, at every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(kinds(model))


def kinds(model):
    """(PEFT's own layers, accelerated ones)"""
    types = [type(m) for m in model.modules()]
    return sum(t in FUSED for t in types), sum(t in FUSED.values() for t in types)


@pytest.mark.parametrize("restore", [False, True])
def test_a_peft_model_is_accelerated_when_training_begins(tmp_path, restore):
    losses = {}
    for name, callbacks in {"stock": [], "accelerated": [FusedPeftCallback(restore=restore)]}.items():
        model, watch = peft.get_peft_model(base(), peft.LoraConfig(**WHERE)), Watch()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        losses[name] = trainer(tmp_path / name, model, watch, *callbacks).train().training_loss
        assert watch.seen == [(4, 0) if name == "stock" else (0, 4)] * STEPS
        assert kinds(model) == ((4, 0) if restore or name == "stock" else (0, 4))
    assert losses["accelerated"] == pytest.approx(losses["stock"], rel=1e-5)


def test_peft_adalora_allocates_after_every_optimizer_step(tmp_path, monkeypatch):
    steps, update = [], peft.AdaLoraModel.update_and_allocate
    monkeypatch.setattr(
        peft.AdaLoraModel, "update_and_allocate", lambda self, step: steps.append(step) or update(self, step)
    )
    model = peft.get_peft_model(base(), peft.AdaLoraConfig(**RANKS))
    trainer(tmp_path, model, FusedPeftCallback()).train()
    assert steps == list(range(STEPS))
    kept = [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(kept) == 2 * len(kept)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
def test_the_callback_sees_through_wrappers_and_skips_skipped_steps(wrap, ours):
    if ours:
        model = fp.get_peft_model(base(), fp.AdaLoraConfig(**RANKS))
    else:
        model = peft.get_peft_model(base(), peft.AdaLoraConfig(**RANKS))
    callback, wrapped = FusedPeftCallback(restore=True), wrap(model)
    callback.on_train_begin(None, None, None, model=wrapped)
    assert kinds(model) == (0, 0 if ours else 4)
    model(torch.randint(0, 40, (2, 5)), labels=torch.tensor([0, 1])).loss.backward()
    falling = SimpleNamespace(global_step=5)  # the budget has begun to fall
    kept = [p for name, p in model.named_parameters() if "lora_E" in name]
    with torch.no_grad():
        for p in kept:
            p.fill_(1.0)
    skipped = SimpleNamespace(step_was_skipped=True)
    callback.on_optimizer_step(None, falling, None, model=wrapped, optimizer=skipped)
    assert all(p.all() for p in kept)
    callback.on_optimizer_step(None, falling, None, model=wrapped)
    assert sum(int((p != 0).sum()) for p in kept) < sum(p.numel() for p in kept)
    callback.on_train_end(None, None, None, model=wrapped)
    assert kinds(model) == (0 if ours else 4, 0)


# --- what the callback says ------------------------------------------------------------------------------------------


def with_a_layer_that_nothing_calls():
    model = base()
    model.unused = nn.Linear(16, 16)
    return model


def told(act, *args, **kwargs):
    """The texts of this library's warnings meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act(*args, **kwargs)
    return [str(w.message) for w in caught if re.search("adapted|Training would|accelerate fused", str(w.message))]


def adapted(ours, model, **kwargs):
    kwargs = WHERE | kwargs
    if ours:
        return fp.get_peft_model(model, fp.LoraConfig(**kwargs))
    return peft.get_peft_model(model, peft.LoraConfig(**kwargs))


BOTH = pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])


@BOTH
@pytest.mark.parametrize("kwargs", [{}, {"lora_dropout": 0.1}, {"bias": "all"}], ids=lambda k: "".join(k) or "plain")
def test_a_sound_run_is_quiet(tmp_path, ours, kwargs):
    model = adapted(ours, base(), **kwargs).eval()  # as from_pretrained leaves it: Trainer calls train()
    assert told(trainer(tmp_path, model, FusedPeftCallback(), gradient_accumulation_steps=2).train) == []


@BOTH
def test_adapters_without_a_gradient_are_named_once(tmp_path, ours):
    model = adapted(ours, with_a_layer_that_nothing_calls(), target_modules=["query", "unused"])
    run = trainer(tmp_path, model, FusedPeftCallback())
    (text,) = told(run.train)
    assert "unused.lora_A" in text
    assert "no gradient" in text
    (text,) = told(run.train)  # and again when training begins again
    assert "unused.lora_A" in text


@BOTH
def test_an_optimizer_built_before_adapting_is_named_once(tmp_path, ours):
    model = base()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = trainer(tmp_path, adapted(ours, model), FusedPeftCallback())
    run.optimizer = optimizer
    (text,) = told(run.train)
    assert "built before the model was adapted" in text


def test_vanished_layers_are_named_when_training_begins(tmp_path):
    model = adapted(True, base())
    attention = model.bert.encoder.layer[1].attention.self
    attention.value = nn.Linear(16, 16)
    begin = told(FusedPeftCallback().on_train_begin, None, None, None, model=model)
    assert len(begin) == 1
    assert "bert.encoder.layer.1.attention.self.value (now a Linear)" in begin[0]

    class Rebuilds(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                attention.query = nn.Linear(16, 16)

    run = trainer(tmp_path, model, Rebuilds(), FusedPeftCallback(), save_strategy="no")  # a checkpoint is refused
    texts = told(run.train)
    assert [text.count("2 of 4 adapted layers") for text in texts].count(1) == 1


@pytest.mark.parametrize("driven", [True, False])
@pytest.mark.parametrize("door", ["ours", "registered"])
def test_a_schedule_that_nobody_drives_is_noticed(tmp_path, driven, door):
    if door == "ours":
        model = fp.get_peft_model(base(), fp.AdaLoraConfig(**RANKS))
    else:
        model = peft.get_peft_model(base(), fp.LoraDashConfig(r=2, **WHERE, warmup=3, directions=2))
    texts = told(trainer(tmp_path, model, *[FusedPeftCallback()] * driven).train)
    assert len(texts) == (not driven)
    assert all("acts between steps" in text for text in texts)


def test_a_model_without_an_adapter_is_left_alone(tmp_path):
    assert told(trainer(tmp_path, base(), FusedPeftCallback()).train) == []


def test_layers_that_are_peft_s_again_are_accelerated_in_the_next_epoch():
    model, callback = adapted(False, base()), FusedPeftCallback()
    callback.on_train_begin(None, None, None, model=model)
    fp.restore(model)
    assert kinds(model) == (4, 0)
    callback.on_epoch_begin(None, None, None, model=model)
    assert kinds(model) == (0, 4)


def test_a_model_of_which_nothing_can_be_fused_is_named_when_training_begins_and_not_in_every_epoch():
    model, callback = adapted(False, base(), target_modules=["word_embeddings"], use_dora=True), FusedPeftCallback()
    (text,) = told(callback.on_train_begin, None, None, None, model=model)
    assert "fused 0 of 1" in text
    assert told(callback.on_epoch_begin, None, None, None, model=model) == []


# --- five methods, through either library, on a small Llama -----------------------------------------------------------

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
# the budget of PEFT's AdaLoRA, which does not resume after that, is not to fall
LATE = {"init_r": 4, "target_r": 2, "tinit": STEPS, "tfinal": STEPS, "total_step": 3 * STEPS}
FIVE = {
    "lora": fp.LoraConfig(r=4, **ATTENTION),
    "dora": fp.DoraConfig(r=4, **ATTENTION),
    "ssb": fp.SSBConfig(**ATTENTION),
    "adalora": fp.AdaLoraConfig(**LATE, **ATTENTION),
    "flora": fp.FloraConfig(r=4, **ATTENTION),
}
five = pytest.mark.parametrize("name", FIVE)
doors = pytest.mark.parametrize("door", [fp.get_peft_model, peft.get_peft_model], ids=["fp", "peft"])


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40))


def through(door, config):
    torch.manual_seed(1)
    return door(llama(), config)


ROWS = torch.randint(1, 40, (4 * STEPS, 7), generator=torch.Generator().manual_seed(1))


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


def language_model(folder, model, *callbacks, **kwargs):
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, report_to=[], seed=0,
        save_steps=STEPS // 2, logging_steps=1, use_cpu=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=[*callbacks])


def trained_tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@five
@doors
def test_trainer_stores_the_adapter_alone_and_resumes(tmp_path, name, door):
    config, losses = FIVE[name], Losses()
    whole = language_model(tmp_path / "whole", through(door, config), FusedPeftCallback(), losses)
    whole.train()
    assert losses.seen[-1] != losses.seen[0]
    assert not any(type(m) in FUSED for m in whole.model.modules())
    half = tmp_path / f"whole/checkpoint-{STEPS // 2}"
    again = language_model(tmp_path / "again", through(door, config), FusedPeftCallback())
    again.train(resume_from_checkpoint=str(half))
    resumed = trained_tensors(again.model)
    assert all(torch.equal(p, resumed[n]) for n, p in trained_tensors(whole.model).items())
    weights = {f.name: load_file(f) for f in half.glob("*.safetensors")}
    assert "adapter_model.safetensors" in weights
    assert not [key for stored in weights.values() for key in stored if re.search(r"embed_tokens|_proj\.weight", key)]
    assert (half / "adapter_config.json").is_file()
    assert not (half / "config.json").exists()
    loaded = fp.load_adapter(llama(), tmp_path / f"whole/checkpoint-{STEPS}").eval()
    want = whole.model.eval()(input_ids=ROWS[:2]).logits
    torch.testing.assert_close(loaded(input_ids=ROWS[:2]).logits, want, rtol=0, atol=1e-5)
    own = config.to_peft()
    if door is peft.get_peft_model and own is not config:  # PEFT as it is
        stock = Losses()
        language_model(tmp_path / "stock", through(door, own), stock).train()
        assert losses.seen == pytest.approx(stock.seen, rel=1e-5)


@doors
def test_trainer_loads_the_best_adapter(tmp_path, door):
    """The one of the highest loss, which is not the last."""
    run = language_model(
        tmp_path, through(door, FIVE["flora"]), FusedPeftCallback(), eval_strategy="steps", eval_steps=STEPS // 2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{STEPS // 2}")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


def accelerated_loop(model, folder, load=None):
    """Losses and trained tensors of six steps of Accelerate's plain loop, with its state stored after three of them."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if load is not None:
        accelerator.load_state(load)
    losses = []
    for step in range(0 if load is None else 3, 6):
        if step == 3 and load is None:
            accelerator.save_state(folder)
        loss = model(input_ids=ROWS[4 * step :][:4], labels=ROWS[4 * step :][:4]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained_tensors(accelerator.unwrap_model(model))


@five
@doors
def test_a_plain_loop_of_accelerate_resumes(tmp_path, name, door):
    config = FIVE[name]
    losses, want = accelerated_loop(through(door, config), tmp_path / "state")
    again, found = accelerated_loop(through(door, config), None, load=tmp_path / "state")
    assert again == losses[3:]
    assert all(torch.equal(t, found[n]) for n, t in want.items())
    own = config.to_peft()
    if door is peft.get_peft_model and own is not config:
        assert accelerated_loop(through(door, own), tmp_path / "stock")[0] == pytest.approx(losses, rel=1e-5)
