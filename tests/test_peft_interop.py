"""The same numbers as Hugging Face PEFT: checkpoints both ways, gradients, training, dropout, merging, counts."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fused_peft as fp  # noqa: E402
from fused_peft.core import dropout, ops  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BUILDERS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ENCODER)),
}  # fmt: skip
# our parameter names for PEFT's
RENAMED = {
    "base_model.model.": "",
    ".modules_to_save.default.": ".",
    ".base_layer.": ".",
    ".default": "",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_B_bias",
}

LORA = {"r": 4, "lora_alpha": 8}
PATTERNS = {"rank_pattern": {"query": 2, r".*\.1\..*value": 6}, "alpha_pattern": {"value": 5}}
CASES = {
    "lora": ("bert", "Lora", LORA),
    "lora-gaussian": ("bert", "Lora", {**LORA, "init_lora_weights": "gaussian"}),
    "rslora": ("bert", "Lora", {**LORA, "use_rslora": True}),
    "lora-bias": ("bert", "Lora", {**LORA, "lora_bias": True}),
    "lora-train-all-biases": ("bert", "Lora", {**LORA, "bias": "all"}),
    "lora-train-its-biases": ("bert", "Lora", {**LORA, "bias": "lora_only"}),
    "lora-both-biases": ("bert", "Lora", {**LORA, "lora_bias": True, "bias": "lora_only"}),
    "lora-patterns": ("bert", "Lora", {**LORA, **PATTERNS}),
    "rslora-patterns": ("bert", "Lora", {**LORA, **PATTERNS, "use_rslora": True}),
    "lora-head": ("bert", "Lora", {**LORA, "task_type": "SEQ_CLS"}),
    "lora-saved": ("bert", "Lora", {**LORA, "modules_to_save": ["pooler", "classifier"]}),
    "lora-head-all-biases": ("bert", "Lora", {**LORA, "task_type": "SEQ_CLS", "bias": "all"}),
    "lora-all-linear": ("bert", "Lora", {"r": 2, "target_modules": "all-linear"}),
    "lora-regex-layers": ("bert", "Lora", {**LORA, "target_modules": ["dense"], "layers_to_transform": [1]}),
    "lora-conv1d": ("gpt2", "Lora", LORA),
    "lora-conv1d-all-linear": ("gpt2", "Lora", {**LORA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "lora-conv1d-biases": ("gpt2", "Lora", {**LORA, "lora_bias": True, "bias": "lora_only", "fan_in_fan_out": True}),
    "lora-llama": ("llama", "Lora", LORA),
    "lora-llama-all-linear": ("llama", "Lora", {**LORA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "ia3": ("bert", "IA3", {}),
    "ia3-output-only": ("bert", "IA3", {"target_modules": ["key", "value"], "feedforward_modules": []}),
    "ia3-feedforward": ("bert", "IA3", {"target_modules": ["key", "dense"], "feedforward_modules": ["dense"]}),
    "ia3-default-feedforward": ("bert", "IA3", {"target_modules": ["key", "output.dense"]}),
    "ia3-all-linear": ("bert", "IA3", {"target_modules": "all-linear"}),
    "ia3-regex": ("bert", "IA3", {"target_modules": r".*(key|dense)", "feedforward_modules": r".*\d\.output\.dense"}),
    "ia3-head": ("bert", "IA3", {"task_type": "SEQ_CLS"}),
    "ia3-conv1d": ("gpt2", "IA3", {}),
    "ia3-llama": ("llama", "IA3", {}),
}
all_cases = pytest.mark.parametrize("case", CASES)


def cases(*names):
    return pytest.mark.parametrize("case", names)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose by sharing work between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases():
    """Models with no tensor at a value that hides an error, such as a zero bias."""
    torch.manual_seed(0)
    models = {name: build() for name, build in BUILDERS.items()}
    for model in models.values():
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return models


@pytest.fixture
def base(bases, case):
    torch.manual_seed(1)
    return copy.deepcopy(bases[CASES[case][0]])


def tokens(rows=2):
    return torch.randint(1, 32, (rows, 8), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens()).logits


@torch.no_grad()
def randomise(model):
    """Move everything trainable away from the identity."""
    for p in model.parameters():
        if p.requires_grad:
            p += 0.2 * torch.randn_like(p)
    return model


def ours(base, case):
    _, method, config = CASES[case]
    return randomise(fp.get_peft_model(copy.deepcopy(base), getattr(fp, f"{method}Config")(**config)))


def theirs(base, case):
    _, method, config = CASES[case]
    return randomise(peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{method}Config")(**config)))


def load_in_peft(base, path, is_trainable=False):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), path, is_trainable=is_trainable)


def load_in_ours(base, path):
    return fp.load_adapter(copy.deepcopy(base), path)


def pair(base, case, path):
    """The same adapter in both libraries, trainable."""
    fp.save_pretrained(ours(base, case), path)
    return load_in_ours(base, path), load_in_peft(base, path, is_trainable=True)


def same_logits(a, b, base):
    expected = logits(a)
    assert (expected - logits(base)).abs().max() > 1e-3
    assert_close(logits(b), expected, rtol=0, atol=1e-6)


@all_cases
def test_peft_loads_our_checkpoint(base, case, tmp_path):
    model = ours(base, case)
    fp.save_pretrained(model, tmp_path)
    same_logits(model, load_in_peft(base, tmp_path), base)


@all_cases
def test_peft_knows_every_setting_of_our_checkpoint(base, case, tmp_path):
    fp.save_pretrained(ours(base, case), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read = {key: getattr(config, key) for key in written}
    assert written.pop("peft_type") == read.pop("peft_type").value
    assert {k: set(v) if isinstance(read[k], (set, list)) else v for k, v in written.items()} == {
        k: set(v) if isinstance(v, list) else v for k, v in read.items()
    }


# PEFT cannot load its own checkpoint of all-linear: it expands target_modules, but not feedforward_modules
@cases(*(case for case in CASES if case != "ia3-all-linear"))
def test_we_load_a_peft_checkpoint(base, case, tmp_path):
    model = theirs(base, case)
    model.save_pretrained(tmp_path)
    same_logits(model, load_in_ours(base, tmp_path), base)


@cases("lora", "lora-head-all-biases", "lora-conv1d-biases", "ia3-head", "ia3-conv1d")
def test_a_checkpoint_survives_both_libraries(base, case, tmp_path):
    model = ours(base, case)
    fp.save_pretrained(model, tmp_path / "ours")
    load_in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_logits(model, load_in_ours(base, tmp_path / "theirs"), base)


def trainable(model):
    """{our name: trainable parameter} of either library's model."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            found[name] = p
    return found


def train(model, case, optimizer, steps):
    """(losses, gradients of the last step)."""
    model.train()
    parameters = trainable(model)
    optimizer = optimizer(parameters.values(), lr=3e-3)
    ids = tokens(rows=4)
    labels = torch.tensor([0, 1, 2, 1]) if CASES[case][0] == "bert" else ids
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients = {name: p.grad.flatten().clone() for name, p in parameters.items()}
        optimizer.step()
    return losses, gradients


TRAINED = (
    "lora", "rslora-patterns", "lora-both-biases", "lora-train-all-biases", "lora-train-its-biases", "lora-head",
    "lora-head-all-biases", "lora-conv1d", "lora-conv1d-biases", "lora-llama-all-linear", "ia3", "ia3-head",
    "ia3-conv1d", "ia3-llama",
)  # fmt: skip


@cases(*TRAINED)
def test_training_losses_are_equal(base, case, tmp_path):
    (losses, _), (expected, _) = (train(m, case, torch.optim.AdamW, 32) for m in pair(base, case, tmp_path))
    assert expected[-1] < 0.996 * expected[0]
    assert_close(losses, expected, rtol=1e-5, atol=0)


@cases(*TRAINED)
def test_gradients_are_equal_after_one_step(base, case, tmp_path):
    (_, found), (_, expected) = (train(m, case, torch.optim.SGD, 2) for m in pair(base, case, tmp_path))
    assert found.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        # a bias added to every key leaves the softmax as it is: its exact gradient is zero, what is left is rounding
        scale = largest if name.endswith("key.bias") else gradient.norm()
        assert (found[name] - gradient).norm() <= 1e-5 * scale, name


class Fixed(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_is_equal_under_the_same_mask(monkeypatch, kind, lora_bias, p):
    torch.manual_seed(3)
    layer = nn.Linear(12, 10) if kind == "linear" else transformers.pytorch_utils.Conv1D(10, 12)
    config = {"r": 4, "lora_alpha": 6, "lora_dropout": p, "lora_bias": lora_bias, "target_modules": ["0"]}
    model = nn.Sequential(layer)
    fused = fp.get_peft_model(copy.deepcopy(model), fp.LoraConfig(**config))
    reference = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**config, fan_in_fan_out=kind == "conv1d")
    ).train()
    for name, parameter in trainable(reference).items():
        nn.init.normal_(parameter)
        fused.get_parameter(name).data.copy_(parameter)

    x = torch.randn(2, 5, 12)
    seed = torch.tensor([123456789, -987654321], dtype=torch.int32)
    monkeypatch.setattr(ops, "new_seed", lambda device: seed)
    mask = dropout.keep_mask(seed, x.shape, p) / (1 - p)
    assert 0 < mask.count_nonzero() < mask.numel()
    reference.base_model.model[0].lora_dropout["default"] = Fixed(mask)

    dy = torch.randn(2, 5, 10)
    results = []
    for m in (fused, reference):
        z = x.clone().requires_grad_()
        y = m(z)
        y.backward(dy)
        results.append({"y": y.detach(), "x": z.grad} | {name: q.grad for name, q in trainable(m).items()})
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@cases(
    "lora", "rslora-patterns", "lora-bias", "lora-both-biases", "lora-train-all-biases", "lora-head", "lora-saved",
    "lora-conv1d-biases", "lora-llama-all-linear", "ia3", "ia3-feedforward", "ia3-head", "ia3-conv1d", "ia3-llama",
)  # fmt: skip
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_weights_are_equal(base, case, safe_merge, tmp_path):
    fused, reference = pair(base, case, tmp_path)
    expected = logits(fused)
    merged = fp.merge_and_unload(fused, safe_merge=safe_merge).state_dict()
    assert_close(dict(merged), dict(reference.merge_and_unload(safe_merge=safe_merge).state_dict()), rtol=0, atol=1e-6)
    assert any(not torch.equal(tensor, merged[name]) for name, tensor in base.state_dict().items())
    assert_close(logits(fused), expected, rtol=0, atol=1e-5)


@cases(
    "lora", "lora-patterns", "lora-both-biases", "lora-train-all-biases", "lora-train-its-biases", "lora-head",
    "lora-saved", "lora-head-all-biases", "lora-conv1d-all-linear", "lora-llama", "ia3", "ia3-head", "ia3-conv1d",
)  # fmt: skip
def test_printed_counts_are_equal(base, case, capsys):
    fp.print_trainable_parameters(ours(base, case))
    found = capsys.readouterr().out
    theirs(base, case).print_trainable_parameters()
    assert found == capsys.readouterr().out


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        sorted(model.__dict__),
    )


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "token_adapter.trainable_tokens_delta"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"some_setting_of_tomorrow": 3}, "some_setting_of_tomorrow"),
        ({"peft_type": "NO_SUCH_METHOD"}, "NO_SUCH_METHOD"),
        ({"peft_type": None}, "peft_type"),
        # known settings, but not those of the weights or of the model
        ({"r": 3}, r"lora_A\.weight has shape"),
        ({"target_modules": ["query"]}, r"value\.lora_A\.weight.*which the model does not"),
        ({"target_modules": ["query", "key", "value"]}, r"key\.lora_A\.weight"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"modules_to_save": ["classifier"]}, r"classifier\.weight"),
    ],
    ids=str,
)
@cases("lora")
def test_a_checkpoint_that_does_not_fit_is_refused(base, case, edit, named, tmp_path):
    theirs(base, case).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    before = snapshot(base)
    with pytest.raises(fp.AdapterFormatError, match=named):
        fp.load_adapter(base, tmp_path)
    after = snapshot(base)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
