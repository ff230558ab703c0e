"""What a config asks for and does not get is named in a warning, whichever field asks, and nothing else is."""

import copy
import re
import warnings
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS
from fused_peft.model import prompt
from fused_peft.model.moe_names import renamed
from fused_peft.model.parameter import PeftParameter
from fused_peft.model.targets import find_targets, resolve
from fused_peft.model.unmet import unmatched


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.proj = nn.Linear(4, 4)
        self.model.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 4)


EXAMPLES = {type(c): c for m in METHODS.values() for c in [m.example(2)]}
NAMING = [(kind, f.name, f.metadata["names"]) for kind in EXAMPLES for f in fields(kind) if "names" in f.metadata]


def planted(config, field, rule):
    """The config with one entry in the field that matches nothing, beside entries that match."""
    config = replace(config, target_modules=["q", "v"])
    if rule == "index":
        return replace(config, **{field: [0, 99]})
    if rule == "container":
        return replace(config, layers_to_transform=[0], **{field: ["blocks", "nowhere"]})
    if rule == "pattern":
        return replace(config, **{field: {"q": 2, "nowhere": 3}})
    if rule == "whole":
        masks = {f"model.blocks.{i}.{n}": torch.eye(4) > 0 for i in (0, 1) for n in "qv"}
        return replace(config, **{field: {**masks, "nowhere": torch.eye(4) > 0}})
    if rule == "text" and field != "modules_to_save":  # entries must be targets too
        return replace(config, target_modules=["q", "v", "nowhere"], **{field: ["v", "nowhere"]})
    real = {"target_modules": ["q", "v"], "modules_to_save": ["head"], "target_parameters": []}.get(field, ["other"])
    return replace(config, **{field: [*real, "nowhere"]})


@pytest.mark.parametrize(("kind", "field", "rule"), NAMING, ids=lambda v: getattr(v, "__name__", v))
def test_every_field_reports_an_entry_that_matches_nothing(kind, field, rule):
    config, net = planted(EXAMPLES[kind], field, rule), Net()
    if field == "modules_to_save":
        with pytest.raises(ValueError, match=r"modules_to_save.*'nowhere' matches no module"):
            fp.get_peft_model(net, config)
        return
    with pytest.warns(UserWarning, match=rf"{kind.__name__} asks .*{field} has no .* for ('nowhere'|99)"):
        fp.get_peft_model(net, config)
    assert any(isinstance(m, fp.PeftLinear) for m in net.modules())


@pytest.mark.parametrize("kind", [*EXAMPLES, *prompt.CONFIGS.values()], ids=lambda k: k.__name__)
def test_every_field_that_names_modules_declares_how(kind):
    stored = {("AdaLoraConfig", "rank_pattern")}  # ranks kept by a checkpoint, not the user's words
    refused = {"trainable_token_indices"}  # an entry that means no embedding is an error
    for f in fields(kind):
        names = re.match(r"(modules|layers)_|.*(_modules|pattern)$", f.name) or "dict[str" in f.type
        assert not names or "names" in f.metadata or (kind.__name__, f.name) in stored or f.name in refused


@pytest.mark.parametrize("kind", prompt.CONFIGS.values(), ids=lambda k: k.__name__)
def test_a_soft_prompt_takes_no_layers(kind):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.warns(UserWarning, match=r"layers_to_transform has no adapted layer for 0"):
        fp.get_peft_model(model, kind(num_virtual_tokens=2, layers_to_transform=[0]))


def said(config, net=None):
    """What is said of a config's entries, as one line."""
    net = net or Net()
    resolved = resolve(net, config)
    return "; ".join(unmatched(net, config, resolved, list(find_targets(net, resolved, config))))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q", "oter"]}, "target_modules has no module for 'oter' (nearest: other"),
        ({"target_modules": ["q", "proj"], "layers_to_transform": 1}, "'proj' (there are some outside layers_to"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform has no adapted layer for 2 (the model has 0 to 1)"),
        ({"exclude_modules": ["blocks.0"]}, "for 'blocks.0' (what it names holds adapted layers; a regular expression"),
        ({"exclude_modules": r"blocks\.7\..*"}, r"exclude_modules has no module for 'blocks\\.7\\..*'"),
        ({"rank_pattern": {"other": 4}}, "'other' (there are modules of that name, but they are not adapted)"),
        ({"rank_pattern": {r".*\.7\.q": 4}, "alpha_pattern": {"k": 4}}, "alpha_pattern has no adapted layer for 'k'"),
        ({"target_modules": ["q", *"abcdef"]}, "and 2 more"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, None),  # then nothing at all matches
    ],
    ids=str,
)
def test_the_report_says_what_is_there_instead(config, expected):
    config = fp.LoraConfig(**{"target_modules": ["q", "v"], **config})
    if expected is None:
        with pytest.raises(ValueError, match="matches no module"):
            said(config)
    else:
        assert expected in said(config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v|nothing)"},
        {"target_modules": ["q", "head"], "exclude_modules": ["head"]},
        {"exclude_modules": ["head"]},  # a module that was no target anyway
        {"exclude_modules": r".*\.0\..*"},
        {"rank_pattern": {"blocks.0.q": 4, r".*\.1\..*": 3}, "alpha_pattern": {"q|v": 4}},
        {"layers_to_transform": [1], "layers_pattern": ["blocks"]},
        {"task_type": "SEQ_CLS"},  # its heads are looked for, not asked for
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},  # as a stored config lists them
    ],
    ids=str,
)
def test_what_matches_is_not_reported(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.get_peft_model(Net(), fp.LoraConfig(**{"r": 2, "target_modules": ["q", "v"], **config}))


def test_one_warning_names_every_field_and_comes_from_the_caller():
    config = fp.LoraConfig(target_modules=["q", "nowhere"], exclude_modules=["nothing"], rank_pattern={"none": 2})
    fields_in_order = "target_modules.*'nowhere'.*exclude_modules.*'nothing'.*rank_pattern.*'none'"
    with pytest.warns(UserWarning, match=fields_in_order) as caught:
        fp.get_peft_model(Net(), config)
    assert [w.filename for w in caught] == [__file__]


def test_the_warning_comes_before_the_model_changes():
    net = Net()
    before = [(n, type(m)) for n, m in net.named_modules()], [p.requires_grad for p in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="nowhere"):
            fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["q", "nowhere"]))
    assert before == ([(n, type(m)) for n, m in net.named_modules()], [p.requires_grad for p in net.parameters()])


def test_layers_to_transform_holds_where_every_module_is_a_target():
    net = fp.get_peft_model(Net(), fp.BitFitConfig(layers_to_transform=[1]))
    assert {n.rpartition(".")[0] for n, p in net.named_parameters() if p.requires_grad} == {
        f"model.blocks.1.{n}" for n in ("q", "v", "other")
    }


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
MOE = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
VISION = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 16}
WHISPER = {"vocab_size": 32, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
WHISPER |= {f"{side}_{n}": 2 for side in ("encoder", "decoder") for n in ("layers", "attention_heads", "ffn_dim")}
MODELS = {
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**MOE, "num_experts": 4, "moe_intermediate_size": 8}),
    "MixtralForCausalLM": ("MixtralConfig", {**MOE, "num_local_experts": 4}),
    "GptOssForCausalLM": ("GptOssConfig", {**MOE, "num_local_experts": 4}),
    "BertForSequenceClassification": ("BertConfig", SMALL),
    "LlamaForCausalLM": ("LlamaConfig", SMALL),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "CLIPModel": ("CLIPConfig", {"text_config": SMALL, "vision_config": VISION, "projection_dim": 16}),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", SMALL),
}
FUSED = [name for name in MODELS if "num_experts_per_tok" in MODELS[name][1]]


def build(name, **changes):
    transformers = pytest.importorskip("transformers")
    config, values = MODELS[name]
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**{**values, **changes}))


def warned(model, **config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp.get_peft_model(model, fp.LoraConfig(r=2, **config))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_counts_fused_experts_and_routers(name):
    model = build(name)
    kinds = {type(m).__name__ for m in model.modules()}
    if renamed(model):  # there it means experts and routers, as in PEFT
        assert not warned(model, target_modules="all-linear")
        assert len([m for m in model.modules() if isinstance(m, PeftParameter)]) == 2 * 3
        return
    (message,) = warned(model, target_modules="all-linear")
    for kind in (next(k for k in kinds if k.endswith("Experts")), next(k for k in kinds if k.endswith("Router"))):
        assert f"2 {kind}" in message
    assert "first: model.layers.0.mlp.experts" in message
    assert "target_parameters" in message


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("part", ["gate_proj", "w2", "gate_up_proj", "experts.gate_up_proj"])
def test_naming_an_experts_layer_says_that_experts_stay_frozen(name, part):
    model = build(name)
    if part in renamed(model):
        if part == "gate_proj":
            with pytest.raises(ValueError, match="without up_proj"):
                warned(model, target_modules=["q_proj", part])
        else:
            assert not warned(model, target_modules=["q_proj", part])
        return
    (message,) = warned(model, target_modules=["q_proj", part])
    assert re.search(r"does not reach 2 \w+Experts", message)
    assert "Router" not in message


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["experts"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.experts\..*"},
    ],
    ids=str,
)
def test_experts_that_were_not_asked_for_are_not_reported(name, config):
    assert not [m for m in warned(build(name), **config) if "does not reach" in m]


def test_only_experts_named_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts holds its experts in 3-D parameters"):
        warned(build("GptOssForCausalLM"), target_modules=["gate_proj", "up_proj"])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FUSED])
def test_all_linear_of_an_ordinary_model_warns_of_nothing(name):
    classifies = {"task_type": "SEQ_CLS"} if "SequenceClass" in name else {}
    assert warned(build(name), target_modules="all-linear", **classifies) == []


class Own(nn.Module):
    """A matrix or a stack of its own, under a name."""

    def __init__(self, name, *shape):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class EmbeddingTable(Own):
    pass


class Strided(nn.Conv1d):
    pass


class Recurrent(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: Own("weight", 4, 4), "does not reach 1 Own (first: odd)"),
        (lambda: Own("stack", 2, 4, 4), "does not reach 1 Own (first: odd)"),
        (lambda: Own("table", 4, 4), None),
        (lambda: Own("positions", 1, 4, 4), None),
        (lambda: Own("weight", 4), None),
        (lambda: EmbeddingTable("weight", 4, 4), None),
        (lambda: nn.Embedding(4, 4), None),
        (lambda: nn.Conv1d(4, 4, 2), None),
        (lambda: Strided(4, 4, 2), None),
        (lambda: Recurrent(4, 4), None),
        (lambda: nn.Bilinear(4, 4, 4), None),
    ],
)
def test_which_weights_all_linear_says_it_does_not_reach(module, said):
    net = Net()
    net.odd = module()
    messages = warned(net, target_modules="all-linear")
    assert len(messages) == (said is not None)
    assert all(said in message for message in messages)


def test_a_router_that_is_left_out_or_trained_whole_is_not_reported():
    for config in ({"exclude_modules": ["odd"]}, {"modules_to_save": ["odd"]}):
        net = Net()
        net.odd = Own("weight", 4, 4)
        assert warned(net, target_modules="all-linear", **config) == []


def test_a_default_is_not_reported_even_when_a_stored_config_lists_it():
    # a gated T5 has wi_0 and wi_1, but AdaLoRA's default for T5 names wi
    model = build("T5ForConditionalGeneration", feed_forward_proj="gated-gelu")
    config = fp.AdaLoraConfig(total_step=10)
    stored = replace(config, target_modules=resolve(model, config).target_modules)
    assert "wi" in stored.target_modules
    for c in (config, stored):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fp.get_peft_model(copy.deepcopy(model), c)
    named = replace(config, target_modules=["q", "wi"])
    with pytest.warns(UserWarning, match=r"target_modules has no module for 'wi' \(nearest: wi_"):
        fp.get_peft_model(model, named)


def test_a_target_that_is_trained_whole_is_named():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    config = fp.LoraConfig(r=2, target_modules=["q", "head"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match=r"no module for 'head' \(modules_to_save trains it whole\)"):
        fp.get_peft_model(model, config)


class Twice(nn.Module):
    """a and b are one layer, and so are left.fc and right.fc, whose parents are one."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b = self.a
        self.left = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        self.right = self.left


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["a", "b"]}, ""),
        ({"target_modules": ["left.fc", "right.fc"]}, ""),
        ({"target_modules": ["a"], "exclude_modules": ["right"]}, ""),
        ({"target_modules": ["b", "c"]}, "target_modules has no module for 'b' (another name of 'a'"),
        ({"target_modules": ["a"], "exclude_modules": ["b"]}, "exclude_modules has no module for 'b' (another name"),
        (
            {"target_modules": ["a", "c"], "rank_pattern": {"b": 3}},
            "rank_pattern has no adapted layer for 'b' (another",
        ),
    ],
    ids=str,
)
def test_a_second_name_of_an_adapted_module_counts(fields, expected):
    found = said(fp.LoraConfig(r=2, **fields), Twice())
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_a_second_name_alone_is_refused_with_the_first():
    with pytest.raises(ValueError, match=r"matches no module; 'b' is another name of 'a'"):
        fp.get_peft_model(Twice(), fp.LoraConfig(r=2, target_modules=["b"]))


@pytest.mark.parametrize("entries", [["b"], ["a", "b"], ["right.fc"], ["left.fc", "right.fc"], ["fc"]], ids=str)
def test_what_is_trained_whole_under_a_second_name_is_pefts(entries):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Twice(), peft.LoraConfig(r=2, target_modules=["c"], modules_to_save=entries))
    ours = fp.get_peft_model(Twice(), fp.LoraConfig(r=2, target_modules=["c"], modules_to_save=entries))
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)  # noqa: E731
    assert count(ours) == count(theirs) > 16
    assert bool(ours.a.weight.requires_grad) == ("a" in entries)
    assert bool(ours.b.weight.requires_grad) == ("b" in entries)
