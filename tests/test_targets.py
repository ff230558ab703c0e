"""A config adapts exactly the modules that Hugging Face PEFT adapts, with the same rank, scaling and side."""

import copy
import cProfile
import pstats
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists  # noqa: E402
from peft.utils import constants  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.methods import METHODS, defaults  # noqa: E402
from fused_peft.methods.base import TASKS  # noqa: E402
from fused_peft.model import prompt  # noqa: E402
from fused_peft.model.targets import find_targets, is_target, resolve  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
BUILDERS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER, num_labels=3)),
    "bert_mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**ENCODER, "num_hidden_layers": 3})),
    "deberta": lambda: transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**ENCODER)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
}


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return {name: build() for name, build in BUILDERS.items()}


def theirs(model, method, config):
    adapted = peft.get_peft_model(copy.deepcopy(model), getattr(peft, f"{method}Config")(**config))
    modules = adapted.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def ours(model, method, config):
    config = getattr(fp, f"{method}Config")(**config)
    adapted = fp.get_peft_model(copy.deepcopy(model), config)
    found = {name: module for name, module in adapted.named_modules() if isinstance(module, fp.PeftLinear)}
    assert set(found) == set(find_targets(model, resolve(model, config)))
    return found


QUERY = {"target_modules": ["query"]}
QUERY_VALUE = {"target_modules": ["query", "value"]}
LAYER_1 = r".*\.1\..*(query|dense)"
# model, config; each adapts at least one module
CASES = [
    ("bert", {}),
    ("bert_mlm", {}),
    ("gpt2", {}),
    ("llama", {}),
    ("deberta", {}),
    ("t5", {}),
    # names
    ("bert", QUERY_VALUE),
    ("bert", {"target_modules": {"query", "intermediate.dense"}}),
    ("bert", {"target_modules": ["output.dense"]}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": ["dense", "classifier"]}),
    ("bert", {"target_modules": ["uery", "self.value"]}),
    ("bert", {"target_modules": ["bert.encoder.layer.0.attention.self.query", "bert.pooler.dense", "classifier"]}),
    ("bert", {"target_modules": ["encoder.layer.0.attention.self.query"]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("gpt2", {"target_modules": ["mlp.c_proj", "c_attn", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "mlp.down_proj"]}),
    ("deberta", {"target_modules": ["query_proj", "pooler.dense"]}),
    ("t5", {"target_modules": ["q", "o", "DenseReluDense.wi"]}),
    # regular expressions
    ("bert", {"target_modules": LAYER_1}),
    ("bert", {"target_modules": "query|.*value"}),
    ("bert", {"target_modules": r"bert\.encoder\.layer\.\d+\.output\.dense"}),
    ("gpt2", {"target_modules": r".*attn\.c_(attn|proj)"}),
    ("llama", {"target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"}),
    ("t5", {"target_modules": r"decoder.*(SelfAttention|EncDecAttention)\.(q|v)"}),
    # every linear layer
    *((name, {"target_modules": "all-linear"}) for name in BUILDERS),
    ("bert", {"target_modules": "ALL-LINEAR", "task_type": "SEQ_CLS"}),
    ("deberta", {"target_modules": "All-Linear", "task_type": "SEQ_CLS"}),
    ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]}),
    ("t5", {"target_modules": "all-linear", "exclude_modules": r"encoder\..*"}),
    # exclusions
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": {"bert.pooler.dense", "intermediate"}}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": r".*layer\.0\..*"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": r"layer\.0"}),
    ("bert", {"target_modules": LAYER_1, "exclude_modules": ["dense"]}),
    ("bert", {"exclude_modules": ["value"]}),
    ("bert", {**QUERY_VALUE, "exclude_modules": []}),
    # layers
    ("bert", {**QUERY, "layers_to_transform": 0}),
    ("bert", {**QUERY, "layers_to_transform": 1}),
    ("bert", {**QUERY, "layers_to_transform": [1]}),
    ("bert", {**QUERY, "layers_to_transform": [0, 1, 7]}),
    ("bert", {**QUERY, "layers_to_transform": []}),
    ("bert", {"target_modules": ["query", "pooler.dense"], "layers_to_transform": [0]}),
    ("bert", {"target_modules": ["query", "bert.pooler.dense"], "layers_to_transform": [0]}),
    ("bert", {"layers_to_transform": [1]}),
    ("bert", {**QUERY, "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("bert", {**QUERY, "layers_to_transform": 1, "layers_pattern": ["h", "layer"]}),
    ("bert", {**QUERY, "layers_to_transform": [1], "layers_pattern": []}),
    ("bert", {**QUERY, "layers_to_transform": [1], "layers_pattern": ""}),
    ("gpt2", {"layers_to_transform": 1, "layers_pattern": "h"}),
    ("llama", {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
    ("t5", {"layers_to_transform": [0]}),
    ("t5", {"layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"layers_to_transform": [1], "layers_pattern": ["layer", "block"]}),
    ("t5", {"layers_to_transform": [1], "layers_pattern": ["block", "layer"]}),
    ("bert", {**QUERY, "layers_to_transform": [0, 1], "exclude_modules": r".*\.0\..*"}),
    # modules trained whole are not adapted
    ("bert", {"target_modules": ["dense", "classifier"], "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
    ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier", "bert.pooler"]}),
    ("bert", {"target_modules": r".*dense|classifier", "modules_to_save": ["pooler", "classifier"]}),
    ("bert", {"target_modules": ["dense", "classifier"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["dense"], "task_type": "TOKEN_CLS"}),
    ("bert", {"target_modules": ["dense", "classifier"], "task_type": "QUESTION_ANS"}),
    ("deberta", {"target_modules": ["dense", "classifier"], "task_type": peft.TaskType.SEQ_CLS}),
    ("gpt2", {"target_modules": ["c_attn", "lm_head"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_lora_targets(models, name, config):
    expected = theirs(models[name], "Lora", {"r": 2, **config})
    assert expected
    assert ours(models[name], "Lora", {"r": 2, **config}).keys() == expected.keys()


DENSE = ["key", "value", "output.dense"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in BUILDERS),
        # feedforward_modules=None takes the architecture's, whatever target_modules is
        ("bert", {"target_modules": DENSE}),
        ("bert", {"target_modules": LAYER_1}),
        ("bert", {"target_modules": ["query"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        # given
        ("bert", {"target_modules": DENSE, "feedforward_modules": []}),
        ("bert", {"target_modules": DENSE, "feedforward_modules": ["output.dense"]}),
        ("bert", {"target_modules": ["key", "dense"], "feedforward_modules": {"dense"}}),
        ("bert", {"target_modules": ["key", "y"], "feedforward_modules": ["y"]}),
        ("bert", {"target_modules": DENSE, "feedforward_modules": r".*\d\.output\.dense"}),
        ("bert", {"target_modules": DENSE, "feedforward_modules": r"output\.dense"}),
        ("bert", {"target_modules": LAYER_1, "feedforward_modules": ["dense"]}),
        ("bert", {"target_modules": "all-linear", "feedforward_modules": ["output.dense"]}),
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "feedforward_modules": r".*\.dense"}),
        ("bert", {"feedforward_modules": []}),
        ("bert", {"feedforward_modules": ["attention.output.dense"]}),
        ("bert", {"target_modules": DENSE, "feedforward_modules": [], "exclude_modules": ["attention.output.dense"]}),
        ("bert", {"exclude_modules": r".*\.0\..*", "modules_to_save": ["classifier"]}),
    ],
    ids=str,
)
def test_ia3_targets_and_sides(models, name, config):
    expected = {n: layer.is_feedforward for n, layer in theirs(models[name], "IA3", config).items()}
    assert expected
    found = ours(models[name], "IA3", config)
    assert {n: bool(layer.config.feedforward_modules) for n, layer in found.items()} == expected


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"query": 4}},
        {"rank_pattern": {"uery": 4}, "alpha_pattern": {"layer.0": 32}},
        {"rank_pattern": {"self.query": 4, "query": 6}, "alpha_pattern": {"value": 32, "dense": 3}},
        {"rank_pattern": {"query": 6, "self.query": 4}},
        {"rank_pattern": {r"layer\.0\..*": 4, r".*\.1\..*dense": 6}, "alpha_pattern": {r".*layer\.1\..*": 5}},
        {"rank_pattern": {"^bert.encoder.layer.0.attention.self.query": 4}},
        {"rank_pattern": {"bert.encoder.layer.0.attention.self.query": 4, "query|value": 6}},
        {"alpha_pattern": {"(query|value)": 1, "output.dense": 7, "classifier": 9}},
    ],
)
def test_rank_and_scaling_of_each_layer(models, patterns, use_rslora):
    config = {"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": use_rslora, **patterns}
    expected = theirs(models["bert"], "Lora", config)
    found = ours(models["bert"], "Lora", config)
    assert {n: (layer.config.r, layer.config.scaling) for n, layer in found.items()} == {
        n: (layer.r["default"], layer.scaling["default"]) for n, layer in expected.items()
    }
    assert all(layer.lora_A.shape[0] == layer.lora_B.shape[1] == layer.config.r for layer in found.values())


@pytest.mark.parametrize(
    ("table", "constant"),
    [
        ("LORA_TARGETS", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"),
        ("IA3_TARGETS", "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"),
        ("IA3_FEEDFORWARD", "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"),
    ],
)
def test_default_tables(table, constant):
    def as_sets(mapping):
        return {k: v if isinstance(v, str) else set(v) for k, v in mapping.items()}

    assert as_sets(getattr(defaults, table)) == as_sets(getattr(constants, constant))


def random_config(rng, names):
    """A valid LoRA config put together from the pieces of the names."""
    split = [name.split(".") for name in names]
    pieces = sorted({".".join(s[i:j]) for s in split for i in range(len(s)) for j in range(i + 1, i + 4)})
    ends = sorted({".".join(s[-i:]) for s in split for i in (1, 2, 3)})

    def some():
        return rng.sample(ends, rng.randint(1, 4)) + rng.sample(pieces, 1) + rng.sample(names, rng.randint(0, 2))

    def regex():
        parts = [rng.choice([e, e.replace(".", r"\.")]) for e in rng.sample(ends, rng.randint(1, 3))]
        return rng.choice([r".*\.", ".*", ""]) + "(" + "|".join(parts) + ")" + rng.choice(["", ".*"])

    config = {"target_modules": rng.choice([some, regex])()}
    if rng.random() < 0.5:
        config["exclude_modules"] = rng.choice([some, regex])()
    if rng.random() < 0.3:
        config["modules_to_save"] = rng.sample([p for p in pieces if not p.isdigit()], rng.randint(1, 2))
    if isinstance(config["target_modules"], list) and rng.random() < 0.6:
        config["layers_to_transform"] = rng.choice([0, 1, [], [1], [0, 2]])
        patterns = ["layer", "layers", "encoder.layer", r"l\w+", "", [], ["h", "layer"], ["layers", "self"], None]
        config["layers_pattern"] = rng.choice(patterns)
    return config


def assert_same_names(names):
    rng = random.Random(0)
    matched = 0
    for _ in range(100):
        config = random_config(rng, names)
        expected = [n for n in names if check_target_module_exists(peft.LoraConfig(**config), n)]
        assert [n for n in names if is_target(fp.LoraConfig(**config), n)] == expected, config
        matched += 0 < len(expected) < len(names)
    assert matched > 60


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_random_configs_match_the_same_names(models, name):
    assert_same_names([n for n, _ in models[name].named_modules() if n])


def test_random_configs_match_the_same_names_in_nested_lists():
    ends = ["q_proj", "experts.1.q_proj", "layers.0.down.q_proj", "layer.2.encoder.layer.1.q_proj", "l.1.self.value"]
    assert_same_names(
        [f"{s}.{i}.{e}" for s in ("layers", "model.sublayers", "encoder.layer") for i in (0, 1) for e in ends]
    )


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.head.weight.requires_grad_(False)


def snapshot(model):
    return (
        {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"target_modules": ["prj"]}, ValueError, "'prj'.*nearest names are proj"),
        ({"target_modules": ["blocks.0.prj"]}, ValueError, r"nearest names are .*blocks\.0\.proj"),
        ({"target_modules": "prj"}, ValueError, "nearest names are proj"),
        ({"target_modules": "proj"}, ValueError, r"regular expression for the full name.*target_modules=\['proj'\]"),
        ({"target_modules": "1.proj, 0.proj"}, ValueError, r"target_modules=\['1.proj', '0.proj'\]"),
        ({"target_modules": "all_linear"}, ValueError, "nearest names are all-linear"),
        ({"target_modules": []}, ValueError, "matches no module"),
        ({"target_modules": ["proj"], "exclude_modules": ["proj"]}, ValueError, "narrowed by.*exclude_modules.*proj"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, ValueError, "narrowed by.*modules_to_save.*head"),
        ({"target_modules": ["proj"], "layers_to_transform": [5]}, ValueError, r"narrowed by.*layers_to_transform.*5"),
        ({"target_modules": ["proj"], "modules_to_save": ["haed"]}, ValueError, "'haed'.*nearest names are head"),
        ({"target_modules": ["proj", "norm"]}, TypeError, r"'blocks\.0\.norm'.*LayerNorm"),
        ({"target_modules": r".*\.1\.norm"}, TypeError, r"'blocks\.1\.norm'.*LayerNorm"),
        ({"target_modules": ["head", "blocks"]}, TypeError, "'blocks'.*ModuleList"),
        ({}, ValueError, "target_modules=None.*no default for model_type 'custom'"),
    ],
)
def test_errors_leave_the_model_unchanged(config, error, message):
    model = Tiny()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fp.get_peft_model(model, fp.LoraConfig(**config))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["prj"]},
        {"target_modules": ["proj"], "exclude_modules": ["proj"]},
        {"target_modules": ["proj"], "layers_to_transform": [5]},
        {"target_modules": ["norm"]},
        {},
    ],
)
def test_peft_refuses_the_same_configs(config):
    with pytest.raises((ValueError, TypeError)):
        peft.get_peft_model(Tiny(), peft.LoraConfig(**config))


class Attends(nn.Module):
    """Many linear layers, and one that must not be adapted."""

    def __init__(self, n=300):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))
        self.attention = nn.MultiheadAttention(2, 1)


@pytest.mark.parametrize(
    "targets", ["all-linear", [f"layers.{i}" for i in range(300)] + ["attention.out_proj"]], ids=["all-linear", "list"]
)
def test_a_refusal_shows_what_was_asked_and_the_reason(targets):
    with pytest.raises(
        TypeError, match=r"'attention\.out_proj', but nn\.MultiheadAttention reads its weight"
    ) as refused:
        fp.get_peft_model(Attends(), fp.LoraConfig(target_modules=targets))
    asked = "'all-linear'" if targets == "all-linear" else "['layers.0', 'layers.1', "
    assert str(refused.value).startswith(f"target_modules={asked}")
    assert len(str(refused.value)) < 400


def test_nothing_left_to_adapt_is_said_briefly():
    everything = [name for name, _ in Attends().named_modules() if name]
    with pytest.raises(ValueError, match="'all-linear' matches no module once narrowed by exclude_modules") as refused:
        fp.get_peft_model(Attends(), fp.LoraConfig(target_modules="all-linear", exclude_modules=everything))
    assert len(str(refused.value)) < 400


def test_task_types_are_pefts():
    assert set(TASKS) == {task.value for task in peft.TaskType}
    for task in peft.TaskType:
        assert fp.LoraConfig(task_type=task).task_type == task.value == fp.LoraConfig(task_type=task.value).task_type


@pytest.mark.parametrize("kind", [*(m.config for m in METHODS.values()), *prompt.CONFIGS.values()])
def test_an_unknown_task_type_is_refused(kind):
    example = next((m.example(2) for m in METHODS.values() if m.config is kind), None) or kind()
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLASS'.*SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"):
        replace(example, task_type="SEQ_CLASS")


class Name(str):
    """A name whose comparisons are calls, so that a profile counts them."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return str.__eq__(self, other)


def calls(layers, make):
    """How many calls get_peft_model makes on a flat model of that many layers, all of them listed."""
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(layers))
    config = make([Name(i) for i in range(layers)])
    profile = cProfile.Profile()
    profile.runcall(fp.get_peft_model, model, config)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize(
    "make",
    [
        lambda names: fp.LoraConfig(r=1, target_modules=names),
        lambda names: fp.AdaLoraConfig(init_r=1, target_r=1, total_step=9, target_modules=names),
        lambda names: fp.DeloraConfig(r=1, target_modules=names),
        lambda names: fp.SSBConfig(target_modules=names),
    ],
    ids=["lora", "adalora", "delora", "ssb"],
)
def test_a_long_list_of_names_costs_each_layer_the_same(make):
    calls(9, make)  # what is imported once
    assert calls(400, make) < 4.5 * calls(100, make)
