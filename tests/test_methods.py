"""Every method against its paper formula in fp64, and what a trainable layer must keep."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from cases import CASES, SHAPES, SMALL
from oracle import build, disagreements, inputs
from paper import FORMULAS
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS, dora, method_of

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
NOT_MERGEABLE = {"lora+n", "adalora+n", "flora+dropout+n", "houlsby", "pfeiffer+gelu"} | {
    c.name for c in CASES if c.method == "parallel_adapter" and c.name != "parallel_adapter+identity"
}
every_mergeable_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in NOT_MERGEABLE], ids=lambda c: c.name
)


def test_every_method_has_a_formula_and_a_case():
    assert set(FORMULAS) == set(METHODS) == {c.method for c in CASES}


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_paper_formula(case, shape, bias, poison):
    assert not disagreements(case, build(case, shape, bias), *inputs(shape))


@every_case
def test_non_contiguous_input_and_gradient(case):
    layer = build(case, SMALL)
    x, dy = inputs(SMALL)
    strided_x = torch.randn(SMALL.K, 2 * SMALL.lead[0], dtype=x.dtype)[:, ::2].T
    strided_dy = torch.randn(SMALL.N, SMALL.lead[0], dtype=x.dtype).T
    expanded = x[:1].expand_as(x)
    assert not strided_x.is_contiguous()
    for a, b in ((strided_x, strided_dy), (expanded, dy[:1].expand_as(dy)), (x, strided_dy)):
        assert not disagreements(case, layer, a, b)


@every_case
def test_gradcheck(case, monkeypatch):
    layer = build(case, SMALL)
    if case.method == "dora":  # the norm is a constant to the gradient, so a numerical one must hold it still
        norm = dora.row_norm(layer.matrix, layer.base_norm2, layer.lora_A, layer.lora_B, layer.config.scaling).detach()
        monkeypatch.setattr(dora, "row_norm", lambda *args: norm)
    x, _ = inputs(SMALL)
    names = layer.tensor_names

    def run(x, *params):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    params = [getattr(layer, n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *params))


@every_case
def test_identity_at_init(case):
    layer = build(case, SMALL, randomise=False).eval()
    x, _ = inputs(SMALL)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NOT_MERGEABLE], ids=lambda c: c.name)
def test_what_cannot_merge_says_why_and_stays(case):
    layer = build(case, SMALL)
    before = layer.weight.clone()
    with pytest.raises(fp.NotMergeableError, match="keep the layer unmerged"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


@every_mergeable_case
@pytest.mark.parametrize("bias", [True, False])
def test_merged_forward_equals_unmerged(case, bias):
    layer = build(case, SMALL, bias).eval()
    x, _ = inputs(SMALL)
    weight, bias_before, unmerged = layer.weight.clone(), copy.deepcopy(layer.bias), layer(x)
    layer.merge()
    assert not torch.equal(layer.weight, weight) or case.method == "bitfit"
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=1e-9)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert layer.bias is None if bias_before is None else torch.equal(layer.bias, bias_before)
    assert torch.equal(layer(x), unmerged)


@every_mergeable_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_bitwise_in_low_precision(case, dtype):
    torch.manual_seed(0)
    layer = fp.PeftLinear(64, 48, config=case.make(4), dtype=dtype)
    nn.init.normal_(getattr(layer, layer.tensor_names[-1]))
    before = layer.weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@every_case
def test_training_keeps_parameter_objects_and_moves_them(case):
    model = nn.Sequential(nn.Linear(SMALL.K, SMALL.K), nn.Tanh(), nn.Linear(SMALL.K, SMALL.N)).double()
    config = case.make(SMALL.r)
    config.target_modules = ["0", "2"]
    fp.get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    start = [p.detach().clone() for p in trainable]
    x, dy = inputs(SMALL)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        loss = (model(x) - dy).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
        fp.on_step(model, step)
        losses.append(loss.item())
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(after, trainable, strict=True))
    assert len(after) == len(optimizer.param_groups[0]["params"])
    assert all(not torch.equal(a, b) for a, b in zip(start, after, strict=True))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if "svd" in n or "residual" in n)
    assert losses[-1] < losses[0]


@every_case
def test_deepcopy_and_pickle(case):
    layer = build(case, SMALL).eval()
    x, _ = inputs(SMALL)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.method is layer.method
        assert twin.weight is not layer.weight


_FRESH = """
import sys, torch, fused_peft as fp
for folder in sys.argv[1:]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Tanh(), torch.nn.Linear(7, 11)).double()
    model.load_state_dict(torch.load(folder + "/base.pt"))
    fp.load_adapter(model, folder)
    model.eval()
    torch.save(model(torch.load(folder + "/x.pt")), folder + "/y.pt")
"""
FIRST = {m: next(c for c in CASES if c.method == m) for m in METHODS}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """{method: (what the saved model computed, what the model loaded in another process did)}; one process for all."""
    folder, want = tmp_path_factory.mktemp("fresh"), {}
    x, _ = inputs(SMALL)
    for method, case in FIRST.items():
        torch.manual_seed(0)
        model, out = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 11)).double(), folder / method
        config = case.make(3)
        config.target_modules = ["0", "2"]
        base = copy.deepcopy(model.state_dict())
        fp.get_peft_model(model, config).eval()
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        fp.save_pretrained(model, out)
        torch.save(base, out / "base.pt")
        torch.save(x, out / "x.pt")
        want[method] = model(x)
    subprocess.run([sys.executable, "-c", _FRESH, *(str(folder / method) for method in FIRST)], check=True)
    return {method: (y, torch.load(folder / method / "y.pt")) for method, y in want.items()}


@pytest.mark.parametrize("method", FIRST)
def test_save_and_reload_in_a_fresh_process(method, reloaded):
    saved, loaded = reloaded[method]
    assert torch.equal(saved, loaded)


def test_configs_know_their_method():
    for case in CASES:
        assert method_of(case.make(2)).name == case.method
