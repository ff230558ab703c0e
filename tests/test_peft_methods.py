"""DoRA, AdaLoRA, PiSSA, OLoRA, VeRA, LieRA and DeLoRA: the same numbers as Hugging Face PEFT."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from test_peft_interop import (  # noqa: E402, F401
    Fixed,
    _one_thread,
    bases,
    load_in_ours,
    load_in_peft,
    logits,
    randomise,
    snapshot,
    tokens,
    trainable,
)

import fused_peft as fp  # noqa: E402
from fused_peft.core import dropout, ops  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

# our parameter names for PEFT's, beyond those that trainable() knows
RENAMED = {"lora_magnitude_vector.weight": "magnitude", "hira_": "lora_"}

DORA = {"r": 4, "lora_alpha": 8, "use_dora": True}
ADALORA = {"init_r": 6, "target_r": 2, "lora_alpha": 8, "total_step": 100}
VERA = {"r": 8, "projection_prng_key": 5, "d_initial": 0.5}
DELORA = {"r": 4, "delora_lambda": 2.0}
LOW_RANK = {"r": 4, "lora_alpha": 8}
UNEQUAL = ["query", "intermediate.dense", "output.dense"]  # 16 to 16, 16 to 24, 24 to 16
PATTERNS = {"rank_pattern": {"query": 2}, "alpha_pattern": {r".*\.1\..*value": 5}}

# (model, our config, PEFT's config, options of both, ours alone)
CASES = {
    "dora": ("bert", "Lora", "Lora", DORA, {}),
    "dora-own-config": ("bert", "Dora", "Lora", DORA, {}),
    "dora-rslora": ("bert", "Lora", "Lora", {**DORA, "use_rslora": True}, {}),
    "dora-its-biases": ("bert", "Lora", "Lora", {**DORA, "bias": "lora_only"}, {}),
    "dora-all-biases": ("bert", "Lora", "Lora", {**DORA, "bias": "all", "task_type": "SEQ_CLS"}, {}),
    "dora-patterns": ("bert", "Lora", "Lora", {**DORA, **PATTERNS}, {}),
    "dora-all-linear": ("llama", "Lora", "Lora", {**DORA, "target_modules": "all-linear"}, {}),
    "dora-conv1d": ("gpt2", "Lora", "Lora", DORA, {}),
    "dora-conv1d-its-biases": ("gpt2", "Lora", "Lora", {**DORA, "bias": "lora_only", "fan_in_fan_out": True}, {}),
    "adalora": ("bert", "AdaLora", "AdaLora", ADALORA, {}),
    "adalora-head": ("bert", "AdaLora", "AdaLora", {**ADALORA, "task_type": "SEQ_CLS", "bias": "all"}, {}),
    "adalora-all-linear": ("llama", "AdaLora", "AdaLora", {**ADALORA, "target_modules": "all-linear"}, {}),
    "adalora-conv1d": ("gpt2", "AdaLora", "AdaLora", ADALORA, {}),
    "pissa": ("bert", "Lora", "Lora", {**LOW_RANK, "init_lora_weights": "pissa"}, {}),
    "pissa-own-config": ("bert", "Pissa", "Lora", {**LOW_RANK, "init_lora_weights": "pissa"}, {}),
    "pissa-unequal": ("bert", "Lora", "Lora", {"r": 5, "init_lora_weights": "pissa", "target_modules": UNEQUAL}, {}),
    "pissa-conv1d": ("gpt2", "Lora", "Lora", {**LOW_RANK, "init_lora_weights": "pissa"}, {}),
    "olora": ("bert", "Lora", "Lora", {**LOW_RANK, "init_lora_weights": "olora"}, {}),
    "olora-own-config": ("bert", "Olora", "Lora", {**LOW_RANK, "init_lora_weights": "olora"}, {}),
    "olora-unequal": ("bert", "Lora", "Lora", {"r": 5, "init_lora_weights": "olora", "target_modules": UNEQUAL}, {}),
    "vera": ("bert", "Vera", "Vera", VERA, {}),
    "vera-unequal": ("bert", "Vera", "Vera", {**VERA, "target_modules": UNEQUAL}, {}),
    "vera-all-linear": ("llama", "Vera", "Vera", {**VERA, "target_modules": "all-linear"}, {}),
    "vera-conv1d": ("gpt2", "Vera", "Vera", VERA, {}),
    "liera": ("bert", "Liera", "Hira", {"r": 4, "target_modules": UNEQUAL}, {"lora_alpha": 4}),
    "liera-scaled": ("bert", "Liera", "Hira", {"r": 4, "target_modules": UNEQUAL}, {"lora_alpha": 8}),
    "liera-conv1d": ("gpt2", "Liera", "Hira", {"r": 4, "target_modules": ["c_attn"]}, {"lora_alpha": 8}),
    "delora": ("bert", "Delora", "Delora", DELORA, {}),
    "delora-patterns": (
        "bert", "Delora", "Delora",
        {**DELORA, "rank_pattern": {"query": 2}, "lambda_pattern": {r".*\.1\..*value": 3.0}}, {},
    ),
    "delora-all-linear": ("llama", "Delora", "Delora", {**DELORA, "target_modules": "all-linear"}, {}),
}  # fmt: skip
all_cases = pytest.mark.parametrize("case", CASES)
# PEFT has HiRA under another name and without a scaling, so there is no common checkpoint
stored_cases = pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] != "Liera"])


def cases(*names):
    return pytest.mark.parametrize("case", names)


def of(*methods):
    return cases(*(case for case in CASES if case.partition("-")[0] in methods))


@pytest.fixture
def base(bases, case):  # noqa: F811
    torch.manual_seed(1)
    return copy.deepcopy(bases[CASES[case][0]])


def fused(base, case, **options):
    """Our model, as it starts."""
    _, name, _, config, own = CASES[case]
    return fp.get_peft_model(copy.deepcopy(base), getattr(fp, f"{name}Config")(**{**config, **own, **options}))


def stock(base, case, **options):
    """PEFT's model, as it starts."""
    _, _, name, config, _ = CASES[case]
    config = copy.deepcopy({**config, **options})  # PEFT edits it
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{name}Config")(**config))
    for parameter_name, p in model.named_parameters():
        if "ranknum" in parameter_name:
            p.requires_grad_(False)  # the rank, which PEFT would train in fp64
    return model


def adapters(model):
    """{our name: trainable parameter} of either library's model."""
    found = {}
    for name, p in trainable(model).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        found[name] = p
    return found


def units(case, name):
    """hira_B = s · lora_B; every other parameter is the same in both libraries."""
    _, ours, _, config, own = CASES[case]
    return own["lora_alpha"] / config["r"] if ours == "Liera" and name.endswith("lora_B") else 1.0


@torch.no_grad()
def pair(base, case, **options):
    """(ours, PEFT's) in training mode, with the same random adapter."""
    mine, theirs = fused(base, case, **options).train(), randomise(stock(base, case, **options)).train()
    values = adapters(theirs)
    assert adapters(mine).keys() == values.keys()
    for name, p in adapters(mine).items():
        p.copy_(values[name].reshape_as(p) / units(case, name))
    return mine, theirs


def gradients(model, case, ours):
    """{our name: gradient}, flat, in PEFT's units."""
    return {name: p.grad.flatten() / (units(case, name) if ours else 1) for name, p in adapters(model).items()}


def assert_near(found, expected, rtol, cancelling=()):
    """Every tensor within rtol of its own norm; sums that cancel, by the ends of their names, of the largest norm."""
    assert found.keys() == expected.keys()
    largest = max(e.norm() for e in expected.values())
    for name, e in expected.items():
        assert found[name].dtype == e.dtype, name
        scale = largest if name.endswith(cancelling) else e.norm()
        assert (found[name] - e).norm() <= rtol * scale > 0, name


def same_logits(model, other, base):
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-3
    # fp32 in another order through the whole model: 2e-6 between processors with other instructions
    assert_close(logits(other), expected, rtol=0, atol=4e-6 * max(1, expected.abs().max().item()))


LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear-no-bias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: transformers.pytorch_utils.Conv1D(10, 12),
}
# PEFT's DeLoRA takes no Conv1D, its OLoRA factorises the transpose of one; its PiSSA and OLoRA refuse fp64
FEW_LAYERS = {"olora": ("linear", "linear-no-bias"), "delora": ("linear", "linear-no-bias")}
FEW_DTYPES = {"pissa": (torch.float32,), "olora": (torch.float32,)}
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}
# the option, and the name of the module in PEFT's layer
DROPOUT = {
    "dora": ("lora_dropout", "lora_dropout"),
    "adalora": ("lora_dropout", "lora_dropout"),
    "pissa": ("lora_dropout", "lora_dropout"),
    "olora": ("lora_dropout", "lora_dropout"),
    "vera": ("vera_dropout", "vera_dropout"),
    "delora": ("module_dropout", "delora_dropout"),
}


def layer_cases(names, kinds=LAYERS):
    return pytest.mark.parametrize(
        ("case", "kind", "dtype"),
        [
            pytest.param(case, kind, dtype, id=f"{case}-{kind}-{str(dtype)[6:]}")
            for case in names
            for kind in kinds
            if kind in FEW_LAYERS.get(case.partition("-")[0], LAYERS)
            for dtype in FEW_DTYPES.get(case.partition("-")[0], RTOL)
        ],
    )


def one_layer(kind, dtype):
    torch.manual_seed(3)
    layer = LAYERS[kind]().to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)  # the bias of a Conv1D starts at zero
    return nn.Sequential(layer)


def layer_pair(case, kind, dtype, **options):
    fan_in_fan_out = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    return pair(one_layer(kind, dtype), case, target_modules=["0"], **fan_in_fan_out, **options)


def assert_layers_agree(mine, theirs, case, dtype):
    """Outputs, and the gradients of x and of every adapter parameter."""
    x, dy = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 10, dtype=dtype)
    results = []
    for model in (mine, theirs):
        z = x.clone().requires_grad_()
        y = model(z)
        y.backward(dy)
        results.append({"y": y.detach(), "x": z.grad, **gradients(model, case, model is mine)})
    assert_near(*results, RTOL[dtype])


@layer_cases(["dora", "dora-rslora", "adalora", "pissa", "olora", "vera", "liera", "liera-scaled", "delora"])
def test_outputs_and_gradients_are_equal(case, kind, dtype):
    assert_layers_agree(*layer_pair(case, kind, dtype), case, dtype)


@layer_cases(["dora"], ["linear", "conv1d"])
def test_dora_with_a_trained_bias(case, kind, dtype):
    mine, theirs = layer_pair(case, kind, dtype, bias="lora_only")
    assert "0.bias" in adapters(mine)
    assert_layers_agree(mine, theirs, case, dtype)


@layer_cases(DROPOUT)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_equal_under_the_same_mask(monkeypatch, case, kind, dtype, p):
    option, attribute = DROPOUT[case]
    mine, theirs = layer_pair(case, kind, dtype, **{option: p})
    seed = torch.tensor([123456789, -987654321], dtype=torch.int32)
    monkeypatch.setattr(ops, "new_seed", lambda device: seed)
    mask = dropout.keep_mask(seed, (2, 5, 12), p)
    assert 0 < mask.count_nonzero() < mask.numel()
    getattr(theirs.base_model.model[0], attribute)["default"] = Fixed(mask.to(dtype) / (1 - p))
    assert_layers_agree(mine, theirs, case, dtype)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@all_cases
def test_models_and_their_gradients_are_equal(base, case, double):
    if double and case.startswith(tuple(FEW_DTYPES)):
        pytest.skip("PEFT starts PiSSA and OLoRA in fp32")
    mine, theirs = pair(base.double() if double else base, case)
    found, expected = (model(input_ids=tokens()).logits for model in (mine, theirs))
    rtol = 1e-10 if double else 1e-5
    assert_near({"logits": found}, {"logits": expected}, rtol)
    dy = torch.randn_like(found)
    found.backward(dy)
    expected.backward(dy)
    # a bias added to every key leaves the softmax as it is; λ is one number, its gradient a sum over all tokens
    cancelling = ("key.bias", "delora_lambda")
    assert_near(gradients(mine, case, True), gradients(theirs, case, False), rtol, cancelling)


@stored_cases
def test_peft_loads_our_checkpoint(base, case, tmp_path):
    model = randomise(fused(base, case))
    fp.save_pretrained(model, tmp_path)
    same_logits(model, load_in_peft(base, tmp_path), base)


@stored_cases
def test_peft_knows_every_setting_of_our_checkpoint(base, case, tmp_path):
    fp.save_pretrained(fused(base, case), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Specified to not save vera_A")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.pop("peft_type") == config.peft_type.value
    for key, value in written.items():
        read = getattr(config, key)
        assert (set(value) == set(read)) if isinstance(value, list) else value == read, key


@stored_cases
def test_we_load_a_peft_checkpoint(base, case, tmp_path):
    model = randomise(stock(base, case))
    model.save_pretrained(tmp_path)
    same_logits(model, load_in_ours(base, tmp_path), base)


@stored_cases
def test_a_checkpoint_survives_both_libraries(base, case, tmp_path):
    model = randomise(fused(base, case))
    fp.save_pretrained(model, tmp_path / "ours")
    load_in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_logits(model, load_in_ours(base, tmp_path / "theirs"), base)


@pytest.mark.parametrize("safe_merge", [False, True])
@all_cases
def test_merged_weights_are_equal(base, case, safe_merge):
    mine, theirs = pair(base, case)
    expected = logits(mine)
    merged = fp.merge_and_unload(mine, safe_merge=safe_merge).state_dict()
    assert_close(dict(merged), dict(theirs.merge_and_unload(safe_merge=safe_merge).state_dict()), rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(tensor, merged[name]) for name, tensor in base.state_dict().items())
    assert_close(logits(mine), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda settings: {"init_r" if "init_r" in settings else "r": 3}, "has shape"),
        (lambda settings: {"target_modules": ["key"]}, "key"),
        (lambda settings: {"some_setting_of_tomorrow": 3}, "some_setting_of_tomorrow"),
    ],
    ids=["rank", "targets", "unknown"],
)
@cases("dora", "adalora", "pissa", "olora", "vera", "delora")
def test_a_checkpoint_that_does_not_fit_changes_nothing(base, case, edit, named, tmp_path):
    randomise(stock(base, case)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | edit(settings)))
    before = snapshot(base)
    with pytest.raises(fp.AdapterFormatError, match=named):
        fp.load_adapter(base, tmp_path)
    after = snapshot(base)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]


def losses(model, steps=1, after_step=lambda model, step: None, penalty=None):
    """Losses of AdamW steps on fixed data."""
    ids = tokens(rows=4)
    labels = torch.tensor([0, 1, 2, 1]) if hasattr(model, "classifier") else ids
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        # a PeftModel without a task_type passes by AdaLoraModel, which adds the penalty
        loss = (model.base_model if isinstance(model, peft.PeftModel) else model)(input_ids=ids, labels=labels).loss
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        yield loss.item()
        optimizer.step()
        after_step(model, step)


def penalty_of(case):
    """PEFT adds AdaLoRA's orthogonality term to the loss by itself."""
    return fp.orthogonality_penalty if CASES[case][1] == "AdaLora" else None


# AdamW moves hira_B = s · lora_B by its own learning rate, whatever s
@cases(*(case for case in CASES if case not in ("liera-scaled", "liera-conv1d")))
def test_training_losses_are_equal(base, case):
    mine, theirs = pair(base, case)
    found, expected = list(losses(mine, 32, penalty=penalty_of(case))), list(losses(theirs, 32))
    assert expected[-1] < 0.996 * expected[0]
    assert_close(found, expected, rtol=1e-5, atol=0)


@of("pissa", "olora")
def test_the_start_takes_the_same_part_from_the_weight(base, case):
    mine, theirs = fused(base, case), stock(base, case)
    a, b = adapters(mine), adapters(theirs)
    assert a.keys() == b.keys()
    for name in (n.removesuffix(".lora_A") for n in a if n.endswith("lora_A")):
        A, B, A1, B1 = (some[f"{name}.lora_{factor}"].detach() for some in (a, b) for factor in "AB")
        sign = (A * A1).sum(1).sign()
        assert_close(A * sign[:, None], A1, rtol=1e-5, atol=1e-5)
        assert_close(B * sign, B1, rtol=1e-5, atol=1e-5)
        layer, weight = mine.get_submodule(name), base.get_submodule(name).weight
        assert torch.equal(layer.weight, weight)
        residual = layer.kind.placed(layer.method.residual(layer).merged(layer.matrix))
        assert (weight - residual).abs().max() > 1e-2
        assert_close(residual, theirs.base_model.model.get_submodule(name).base_layer.weight, rtol=0, atol=1e-6)
    assert_close(logits(mine), logits(base), rtol=0, atol=1e-5)


@of("dora")
def test_the_start_is_the_norm_of_the_weight(base, case):
    a, b = adapters(fused(base, case)), adapters(stock(base, case))
    names = [name for name in a if name.endswith("magnitude")]
    assert names
    for name in names:
        assert_close(a[name], b[name], rtol=1e-6, atol=0)


@of("delora")
def test_kept_norms_are_equal(base, case):
    mine, theirs = fused(base, case), stock(base, case)
    for name, layer in fp.model.adapted.layers(mine):
        norm = theirs.base_model.model.get_submodule(name).delora_w_norm["default"]
        assert_close(layer.delora_w_norm, norm, rtol=1e-6, atol=0)


def assert_same_projection(mine, theirs):
    for _, layer in fp.model.adapted.layers(mine):
        assert torch.equal(layer.vera_A, theirs.base_model.vera_A["default"][:, : layer.in_features])
        assert torch.equal(layer.vera_B, theirs.base_model.vera_B["default"][: layer.out_features])


@of("vera")
def test_projections_are_equal(base, case):
    assert_same_projection(fused(base, case), stock(base, case))


@pytest.mark.parametrize("save_projection", [False, True])
@of("vera")
def test_vera_checkpoint_with_and_without_its_projection(base, case, save_projection, tmp_path):
    model = randomise(stock(base, case, save_projection=save_projection))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert ("base_model.vera_A" in stored) == ("base_model.vera_B" in stored) == save_projection
    same_logits(model, load_in_ours(base, tmp_path), base)


def foreign(base, case, path):
    """A PEFT model with the projection of another machine's generator, and its checkpoint in ours."""
    model = randomise(stock(base, case, save_projection=True, projection_prng_key=6))
    for projection in (model.base_model.vera_A, model.base_model.vera_B):
        projection["default"].normal_()
    model.save_pretrained(path)
    return model, load_in_ours(base, path)


@of("vera")
def test_vera_takes_the_stored_projection(base, case, tmp_path):
    same_logits(*foreign(base, case, tmp_path), base)


@of("vera")
def test_vera_keeps_a_stored_projection_when_it_saves(base, case, tmp_path):
    model, loaded = foreign(base, case, tmp_path / "theirs")
    fp.save_pretrained(loaded, tmp_path / "ours")
    same_logits(model, load_in_peft(base, tmp_path / "ours"), base)
    same_logits(model, load_in_ours(base, tmp_path / "ours"), base)


@of("vera")
def test_vera_projection_of_one_model_is_not_that_of_the_next(base, case, tmp_path):
    foreign(base, case, tmp_path)
    assert_same_projection(fused(base, case, projection_prng_key=6), stock(base, case, projection_prng_key=6))


SCHEDULES = (
    {"tinit": 2, "tfinal": 2, "deltaT": 1},
    {"tinit": 0, "tfinal": 0, "deltaT": 1},
    {"tinit": 1, "tfinal": 3, "deltaT": 2},
    {"tinit": 2, "tfinal": 2, "deltaT": 3, "beta1": 0.5, "beta2": 0.7},
)


def kept(mine):
    return {f"{name}.lora_E.default": layer.kept.tolist() for name, layer in fp.model.adapted.layers(mine)}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@of("adalora")
def test_allocator_keeps_the_same_ranks_at_every_step(base, case, schedule):
    mine, theirs = pair(base, case, **{**schedule, "total_step": 12})
    a, b = adapters(mine), adapters(theirs)
    counts = []
    for step in range(15):
        for name, p in a.items():
            # what an optimizer step would leave behind, the same in both
            p.grad = torch.randn_like(p)
            b[name].grad = p.grad.reshape_as(b[name]).clone()
            for q in (p, b[name]):
                q.data.sub_(q.grad, alpha=0.05)
        fp.on_step(mine, step)
        theirs.base_model.update_and_allocate(step)
        for name, p in a.items():
            assert torch.equal(p.flatten(), b[name].flatten()), (step, name)
        pattern = theirs.peft_config["default"].rank_pattern
        assert pattern is None or kept(mine) == pattern, step
        counts.append(sum(map(sum, kept(mine).values())))
    layers = len(kept(mine))
    assert counts[schedule["tinit"]] == ADALORA["init_r"] * layers
    assert counts == sorted(counts, reverse=True)
    if schedule["tfinal"]:
        assert counts[-1] == ADALORA["target_r"] * layers


@of("adalora")
def test_training_with_the_allocator_is_equal_and_its_checkpoint_loads(base, case, tmp_path):
    mine, theirs = pair(base, case, tinit=2, tfinal=2, total_step=12)
    found = list(losses(mine, 12, fp.on_step, fp.orthogonality_penalty))
    expected = list(losses(theirs, 12, lambda model, step: model.base_model.update_and_allocate(step)))
    assert_close(found, expected, rtol=1e-5, atol=0)
    assert kept(mine) == theirs.peft_config["default"].rank_pattern
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_in_ours(base, tmp_path / "theirs")
    ranks = {f"{name}.lora_E": len(layer.lora_E) for name, layer in fp.model.adapted.layers(loaded)}
    stored = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks == {name: sum(pattern) for name, pattern in stored.items()}
    same_logits(theirs, loaded, base)
    fp.save_pretrained(loaded, tmp_path / "again")
    same_logits(theirs, load_in_ours(base, tmp_path / "again"), base)
    fp.save_pretrained(mine, tmp_path / "ours")
    same_logits(mine, load_in_peft(base, tmp_path / "ours"), base)


PRUNED = {"some": [1, 0, 1, 1, 0, 0], "one": [0, 0, 0, 0, 1, 0], "none": [0] * 6, "all": [1] * 6}


@of("adalora")
@pytest.mark.parametrize("first", PRUNED)
def test_pruned_peft_checkpoint(base, case, first, tmp_path):
    """The first layer keeps as many ranks as the parameter says, the others some."""
    model = randomise(stock(base, case))
    pattern = {}
    for name, p in model.base_model.model.named_parameters():
        if "lora_E" in name:
            pattern[name] = [bool(k) for k in PRUNED["some" if pattern else first]]
            p.data[~torch.tensor(pattern[name])] = 0
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    loaded = load_in_ours(base, tmp_path)
    same_logits(model, loaded, base)
    fp.save_pretrained(loaded, tmp_path / "again")
    same_logits(model, load_in_ours(base, tmp_path / "again"), base)
    same_logits(model, load_in_peft(base, tmp_path / "again"), base)


FACTORS = ("lora_A", "lora_B")


@pytest.mark.parametrize("orth_reg_weight", [0.5, 0.1])
@of("adalora")
def test_orthogonality_penalty_is_the_term_of_peft(base, case, orth_reg_weight, monkeypatch):
    mine, theirs = pair(base.double(), case, orth_reg_weight=orth_reg_weight)
    loss = torch.zeros((), dtype=torch.float64)
    monkeypatch.setattr(theirs.base_model.model, "forward", lambda: SimpleNamespace(loss=loss))
    expected, found = theirs.base_model().loss, fp.orthogonality_penalty(mine)
    assert_close(found, expected, rtol=1e-12, atol=0)
    expected.backward()
    found.backward()
    found, expected = ({n: p.grad for n, p in adapters(m).items() if n[-6:] in FACTORS} for m in (mine, theirs))
    assert_near(found, expected, 1e-12)
