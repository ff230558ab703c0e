"""Soft prompts against Hugging Face PEFT: outputs, gradients, checkpoints both ways; and their refusals."""

import copy
import warnings

import pytest
import torch
from test_model import same, snapshot
from torch.testing import assert_close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fused_peft as fp  # noqa: E402
from fused_peft.model import prompt  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPANS = {"start_positions": torch.tensor([0, 2, 6]), "end_positions": torch.tensor([1, 5, 6])}
MODELS = {
    "bert_qa": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )
    ),
}  # fmt: skip
TASK = {"bert_qa": "QUESTION_ANS", "bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
CONFIGS = {
    "prompt": ("PromptTuningConfig", {}),
    "p_tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p_tuning_lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_config = pytest.mark.parametrize("kind", CONFIGS)


def batch(name):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.tensor([0, 1, 1]) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, **(SPANS if name == "bert_qa" else {"labels": labels})}


def pair(name, kind):
    """(ours, PEFT's) with the same base and the same prompt."""
    torch.manual_seed(0)
    base = MODELS[name]()
    config, extra = CONFIGS[kind]
    options = {"task_type": TASK[name], "num_virtual_tokens": 4, **extra}
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, config)(**options))
    ours = fp.get_peft_model(base, getattr(fp, config)(**options))
    values = theirs.prompt_encoder["default"].parameters()
    for mine, value in zip(ours.soft_prompt.parameters(), values, strict=True):
        mine.data.copy_(value)
    return ours, theirs


def logits(out):
    return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def peers(theirs, inputs):
    """PEFT's output. On models without an argument for a cache its prefix tuning knows one name of the backbone's: its
    cache goes in by hand there, under the name that this Transformers has."""
    model = theirs.base_model
    if theirs.active_peft_config.peft_type != "PREFIX_TUNING" or prompt._argument(model, prompt._CACHE_NAMES):
        return theirs(**inputs)
    cache, mask = theirs.get_prompt(len(inputs["input_ids"])), inputs["attention_mask"]
    mask = torch.cat([mask.new_ones(len(mask), theirs.active_peft_config.num_virtual_tokens), mask], dim=1)
    name = prompt._argument(model.base_model, prompt._CACHE_NAMES)
    return model(**{**inputs, "attention_mask": mask, name: cache})


@every_model
@every_config
def test_outputs_and_gradients_are_pefts(name, kind):
    ours, theirs = pair(name, kind)
    mine, peer = ours(**batch(name)), peers(theirs, batch(name))
    assert_close(mine.loss, peer.loss, rtol=1e-5, atol=1e-6)
    assert_close(logits(mine), logits(peer), rtol=1e-5, atol=1e-6)
    mine.loss.backward(), peer.loss.backward()
    weights = ours.soft_prompt.embedding.weight, theirs.prompt_encoder["default"].embedding.weight
    assert weights[0].grad.abs().sum() > 0
    assert_close(weights[0].grad, weights[1].grad, rtol=1e-4, atol=1e-7)
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert all(n.startswith(("soft_prompt", "classifier", "qa_outputs")) for n in trainable)


@every_model
@every_config
def test_checkpoints_load_both_ways(name, kind, tmp_path):
    ours, theirs = (m.eval() for m in pair(name, kind))
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    inputs = batch(name)
    want = logits(ours(**inputs))
    fp.save_pretrained(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(logits(peers(loaded, inputs)), want, rtol=1e-5, atol=1e-6)
    again = fp.load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(logits(again(**inputs)), want, rtol=1e-5, atol=1e-6)
    back = fp.load_adapter(base, tmp_path / "theirs").eval()
    assert_close(logits(back(**inputs)), logits(peers(theirs, inputs)), rtol=1e-5, atol=1e-6)


@every_model
@every_config
def test_disable_deepcopy_and_freezing(name, kind):
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    want = logits(base(**batch(name)))
    ours = pair(name, kind)[0].eval()
    changed = logits(ours(**batch(name)))
    with fp.disable_adapter(ours):
        assert torch.equal(logits(ours(**batch(name))), want)
    assert changed.shape != want.shape or not torch.equal(changed, want)
    assert torch.equal(logits(copy.deepcopy(ours)(**batch(name))), changed)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_carries_the_prompt(kind):
    ours, theirs = (m.eval() for m in pair("llama", kind))
    ids = batch("llama")["input_ids"][:1]
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    # without a cache: from Transformers 5.24 on, PEFT 0.21 loses track of the one that generate renamed
    peer = theirs.generate(input_ids=ids, use_cache=False, **kwargs)
    for use_cache in (True, False):
        assert torch.equal(ours.generate(input_ids=ids, use_cache=use_cache, **kwargs), peer)


def test_there_is_nothing_to_merge():
    ours, _ = pair("bert", "prompt")
    for call in (fp.merge, fp.unmerge, fp.merge_and_unload, fp.explain):
        with pytest.raises(fp.NotMergeableError, match="no weight"):
            call(ours)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), fp.PromptTuningConfig(), "num_layers=None"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
            ),
            fp.PrefixTuningConfig(),
            "encoder-decoder",
        ),
    ],
)
def test_models_without_the_needed_inputs_are_refused_and_unchanged(make, config, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fp.get_peft_model(model, config)
    assert same(before, snapshot(model))


def test_config_errors():
    with pytest.raises(ValueError, match="num_virtual_tokens=0"):
        fp.PromptTuningConfig(num_virtual_tokens=0)
    with pytest.raises(ValueError, match="adapts no module"):
        fp.PrefixTuningConfig(target_modules=["q"])
    with pytest.raises(ValueError, match="prompt_tuning_init='TEXT'"):
        fp.PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ValueError, match="'MLP' or 'LSTM'"):
        fp.PromptEncoderConfig(encoder_reparameterization_type="CNN")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_labels_that_are_positions_are_said_to_count_the_soft_tokens(kind):
    config, extra = CONFIGS[kind]
    config = getattr(fp, config)(task_type="QUESTION_ANS", num_virtual_tokens=4, **extra)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = fp.get_peft_model(MODELS["bert_qa"](), config)
    said = [w for w in found if "start_positions" in str(w.message)]
    if kind == "prefix":
        assert not said
        return
    assert len(said) == 1
    assert said[0].filename == __file__
    assert "add 4 to both labels, and take 4 from" in str(said[0].message)
    assert model(**batch("bert_qa")).start_logits.shape == (3, 4 + 6)
