"""This library's methods under peft.get_peft_model: the numbers of fp.get_peft_model, and PEFT's own interface."""

import copy
import pickle

import pytest
import torch
from cases import CASES
from test_accelerate import Packed, warned
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_peft as fp  # noqa: E402
from fused_peft.integrations import tuners  # noqa: E402
from fused_peft.integrations.transformers import FusedPeftCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = [c for c in CASES if c.make(3).peft_type in tuners.REGISTERED]
NAMES = ["layers.0", "layers.2"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5, bias=False))

    def forward(self, x):
        return self.layers(x)


def configured(case, **changes):
    config = case.make(3)
    config.target_modules = NAMES
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def shaken(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def both(case, dtype=torch.float64):
    """The model under PEFT, and under this library."""
    torch.manual_seed(2)
    theirs = peft.get_peft_model(Net().to(dtype), configured(case))
    torch.manual_seed(2)
    return shaken(theirs), shaken(fp.get_peft_model(Net().to(dtype), configured(case)))


def results(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])


def test_all_methods_that_peft_lacks_are_there():
    assert {"SSL", "SSB", "FLORA", "TRILORA", "MOSLORA", "LIERA", "KASA"} <= tuners.REGISTERED
    assert {c.make(3).peft_type for c in OWN} == tuners.REGISTERED


@pytest.mark.parametrize("case", OWN, ids=lambda c: c.name)
def test_the_same_numbers_and_checkpoints(case, tmp_path):
    theirs, ours = both(case)
    x = torch.randn(3, 8, dtype=torch.float64)
    for got, want in zip(results(theirs, x), results(ours, x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    theirs.eval(), ours.eval()
    want = ours(x)
    theirs.save_pretrained(tmp_path / "theirs")
    fp.save_pretrained(ours, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        for base in (Net().double(), Net().double()):
            stock = peft.PeftModel.from_pretrained(base, tmp_path / folder).eval()
            torch.testing.assert_close(stock(x), want, rtol=1e-12, atol=1e-12)
        loaded = fp.load_adapter(Net().double(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(x), want, rtol=1e-12, atol=1e-12)
    low = peft.PeftModel.from_pretrained(Net().double(), tmp_path / "theirs", low_cpu_mem_usage=True).eval()
    for other in (low, copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        torch.testing.assert_close(other(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", OWN, ids=lambda c: c.name)
def test_a_state_dict_says_which_modules_are_adapted(case):
    one = shaken(peft.inject_adapter_in_model(configured(case, target_modules=NAMES[:1]), Net()))
    values = peft.get_peft_model_state_dict(one)
    again = peft.inject_adapter_in_model(configured(case), Net(), state_dict=values)
    assert not peft.set_peft_model_state_dict(again, values).unexpected_keys
    assert [type(layer) for layer in again.layers[::2]] == [tuners.FusedTunerLayer, nn.Linear]
    x = torch.randn(3, 8)
    assert torch.equal(again.eval()(x), one.eval()(x))


@pytest.mark.parametrize("case", OWN, ids=lambda c: c.name)
def test_switching_disabling_and_merging(case):
    model, _ = both(case)
    x, base = torch.randn(3, 8, dtype=torch.float64), Net().double()
    model.eval()
    first = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    model.add_adapter("other", configured(case))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "other" in n)
    model.set_adapter("other")
    shaken(model, 4)
    second = model(x)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first, rtol=0, atol=0)
    if model.base_model.model.layers[0].active()[0].method.output is None:
        try:
            model.merge_adapter(safe_merge=True)
        except fp.NotMergeableError:
            assert "+" in case.name or "parallel" in case.name
        else:
            torch.testing.assert_close(model(x), first, rtol=1e-9, atol=1e-9)
            assert "merged: one plain linear layer" in str(fp.explain(model))
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), first, rtol=0, atol=0)
            plain = copy.deepcopy(model).merge_and_unload()
            assert type(plain.layers[0]) is nn.Linear
            torch.testing.assert_close(plain(x), first, rtol=1e-9, atol=1e-9)
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), second, rtol=0, atol=0)


def test_dtypes_and_seals():
    case = next(c for c in OWN if c.name == "flora")
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = peft.get_peft_model(Net().bfloat16(), configured(case), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        y = model(torch.randn(3, 8, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
    model.add_adapter("other", configured(case))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert model(x).shape == (3, 5)  # one after the other
    with pytest.raises(ValueError, match="target_modules=None trains the biases of every module"):
        peft.get_peft_model(Net(), fp.BitFitConfig())
    with pytest.raises(TypeError, match="Tanh is not a linear layer"):
        peft.get_peft_model(Net(), fp.SSBConfig(target_modules=["layers.1"]))


def test_many_layers_are_saved(tmp_path):
    """PEFT makes a set of a long list of names."""
    build = lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))  # noqa: E731
    model = peft.get_peft_model(build(), fp.SSBConfig(target_modules=[str(i) for i in range(29)]))
    model.save_pretrained(tmp_path)
    assert len(fp.explain(peft.PeftModel.from_pretrained(build(), tmp_path))) == 29


def test_a_merge_that_fails_changes_nothing_and_unmerge_survives_a_cast():
    case = next(c for c in OWN if c.name == "flora")
    model, _ = both(case, torch.float32)
    model.add_adapter("bad", configured(case))
    layer = model.base_model.model.layers[0]
    with torch.no_grad():
        layer.flora_lora_M["bad"].fill_(float("nan"))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default", "bad"])
    assert torch.equal(layer.weight, before)
    assert not layer.merged
    layer.merge(adapter_names=["default"])
    model.double()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before.double(), rtol=0, atol=0)


def test_schedules_penalties_and_explanations_see_the_active_adapter():
    dash = next(c for c in OWN if c.name == "lora_dash")
    model, _ = both(dash)
    before = model.base_model.model.layers[0].lora_dash_dash_U["default"].clone()
    fp.on_step(model, 3)
    assert not torch.equal(model.base_model.model.layers[0].lora_dash_dash_U["default"], before)
    assert fp.mpc_penalty(model, "o") > 0
    rows = fp.explain(model)
    assert [(r.method, r.form) for r in rows] == [("lora_dash", "factors")] * 2


@pytest.mark.parametrize("name", ["ssb", "flora", "svdiff"])
def test_compiles_as_one_graph(name):
    model, _ = both(next(c for c in OWN if c.name == name))
    x = torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, x), results(model, x), strict=True):
        torch.testing.assert_close(got, want)


def test_trainer_saves_and_resumes(tmp_path):
    """A registered method through Trainer: its checkpoints are PEFT's, and a resumed run ends bit for bit the same."""
    from test_trainer import STEPS, WHERE, base, trainer

    def adapted(folder):
        config = fp.LoraDashConfig(r=4, lora_dropout=0.1, directions=2, warmup=2, **WHERE)
        return trainer(tmp_path / folder, peft.get_peft_model(base(), config), FusedPeftCallback())

    whole = adapted("whole")
    whole.train()
    half = tmp_path / f"whole/checkpoint-{STEPS // 2}"
    again = adapted("again")
    again.train(resume_from_checkpoint=str(half))
    state, resumed = whole.model.state_dict(), again.model.state_dict()
    assert any("dash_U" in name and value.any() for name, value in state.items())
    for name, value in state.items():
        assert torch.equal(value, resumed[name]), name
    final = tmp_path / f"whole/checkpoint-{STEPS}"
    loaded = peft.PeftModel.from_pretrained(base(), final).eval()
    ids = torch.randint(0, 40, (3, 7))
    torch.testing.assert_close(loaded(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)


class Tied(nn.Module):
    """An embedding whose weight the head reads too, as tie_word_embeddings makes it."""

    def __init__(self, tie=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.body, self.lm_head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.body(self.embed_tokens(ids)))


def adapted(model, *names):
    return shaken(peft.get_peft_model(model, fp.FloraConfig(r=2, target_modules=list(names))))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_others_read_is_not_merged(call):
    """Merging would move the outputs of the other modules; nothing changes, the layers before it included."""
    model, ids = adapted(Tied(), "body", "lm_head"), torch.arange(9)
    want, before = model(ids), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(fp.NotMergeableError, match="lm_head shares its weight with embed_tokens") as error:
        getattr(model, call)()
    assert "model.config.tie_word_embeddings = False" in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(ids), want)
    assert not any(getattr(m, "merged", False) for m in model.modules())
    for other in (adapted(Tied(), "body"), adapted(Tied(tie=False), "body", "lm_head")):  # harmless: merged
        want = other(ids)
        merged = getattr(other, call)() or other
        torch.testing.assert_close(merged(ids), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged(ids), Tied()(ids))


def test_two_adapted_layers_that_share_a_weight_are_not_merged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(fp.NotMergeableError, match="0 shares its weight with 1"):
        adapted(model, "0", "1").merge_adapter()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_weight_in_another_format_is_not_merged(call):
    """A tensor subclass that came after adapting, as a quantiser brings it."""
    model = adapted(Net(), "layers.0", "layers.2")
    base = model.base_model.model.layers[2].base_layer
    base.weight = nn.Parameter(Packed(base.weight.detach()), requires_grad=False)
    before = model.base_model.model.layers[0].weight.clone()
    with pytest.raises(fp.NotMergeableError, match=r"the weight of layers\.2 is a Packed"):
        getattr(model, call)()
    assert torch.equal(model.base_model.model.layers[0].weight, before)


def test_nothing_is_said_of_layers_that_run_fused_already():
    """accelerate, as the Trainer's callback calls it, on a model of registered methods alone."""
    model = adapted(Net(), "layers.0")
    assert not warned(fp.accelerate, model)
    assert not warned(model.add_adapter, "second", fp.FloraConfig(r=2, target_modules=["layers.2"]))


def test_peft_s_own_check_of_a_merge_is_still_made():
    model = Tied(tie=False)
    model.config = {"model_type": "custom", "tie_word_embeddings": True}
    said = warned(adapted(model, "lm_head").merge_adapter)
    assert any("You can opt to merge the adapter after cloning the weights" in text for text in said)
