"""get_layer_status says where each layer stands, in PEFT's words; what notebooks show is escaped."""

from dataclasses import asdict, replace

import pytest
import torch
from cases import CASES
from torch import nn

import fused_peft as fp
from fused_peft.core import table
from fused_peft.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5, bias=False))


def ours(config, **settings):
    return fp.get_peft_model(net(), replace(config, target_modules=["0", "2"], **settings))


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    model = ours(METHODS[name].example(2))
    for status in fp.get_layer_status(model):
        assert status.method == {"default": name}
        assert status.gradient == {"default": False}
    model(torch.randn(3, 8)).square().sum().backward()
    found = fp.get_layer_status(model)
    assert [s.name for s in found] == ["0", "2"]
    assert [s.backend for s in found] == [e.backend for e in fp.explain(model)]
    for status, layer in zip(found, (model[0], model[2]), strict=True):
        grads = [t.grad for t in layer.adapter_tensors()]
        assert status.gradient["default"] == any(g is not None and g.abs().sum() > 0 for g in grads)
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert (status.requires_grad, status.available_adapters) == ({"default": True}, ["default"])
        assert (status.devices, status.dtype) == ({"default": ["cpu"]}, {"default": "float32"})


def test_states_of_a_model():
    model = ours(fp.LoraConfig(r=2))
    fp.add_adapter(model, "other", fp.SSBConfig(target_modules=["0"]))
    first, second = fp.get_layer_status(model)
    assert first.available_adapters == ["default", "other"]
    assert second.available_adapters == ["default"]
    assert first.requires_grad == {"default": True, "other": False}
    assert first.method == {"default": "lora", "other": "ssb"}
    fp.set_adapter(model, ["default", "other"])
    model[0].lora_A.requires_grad_(False)
    first, second = fp.get_layer_status(model)
    assert first.active_adapters == ["default", "other"]
    assert second.active_adapters == ["default"]
    assert first.requires_grad == {"default": "irregular", "other": True}
    fp.merge(model)
    first, second = fp.get_layer_status(model)
    assert first.merged_adapters == ["default", "other"]
    assert (first.backend, second.merged_adapters) == ("torch", ["default"])
    fp.unmerge(model)
    with fp.disable_adapter(model):
        assert not any(s.enabled for s in fp.get_layer_status(model))
    assert all(s.enabled for s in fp.get_layer_status(model))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_teaches_nothing_is_none(value):
    model = ours(fp.LoraConfig(r=2))
    model(torch.randn(3, 8)).sum().backward()
    assert fp.get_layer_status(model)[0].gradient == {"default": True}
    for p in model[0].parameters():
        if p.grad is not None:
            p.grad.fill_(value)
    first, second = fp.get_layer_status(model)
    assert first.gradient == {"default": False}
    assert second.gradient == {"default": True}


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="has no adapted layer; call get_peft_model first"):
        fp.get_layer_status(net())


def pefts():
    peft = pytest.importorskip("peft")
    from fused_peft.integrations import tuners

    own = {c.method: c.make(2) for c in reversed(CASES) if c.make(2).peft_type in tuners.REGISTERED}
    theirs = {
        "lora": peft.LoraConfig(r=2),
        "adalora": peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9),
        "ia3": peft.IA3Config(feedforward_modules=[]),
        "vera": peft.VeraConfig(r=2),
    }
    return peft, own | theirs


@pytest.mark.parametrize("accelerated", [False, True])
def test_models_of_peft_say_what_peft_says(accelerated):
    peft, configs = pefts()
    for name, config in configs.items():
        config.target_modules = ["0"]
        config.modules_to_save = ["2"]
        model = peft.get_peft_model(net(), config)
        if accelerated and name in ("lora", "adalora", "ia3"):
            fp.accelerate(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        model(torch.randn(3, 8)).square().sum().backward()
        (mine,) = fp.get_layer_status(model)
        theirs = asdict(next(s for s in peft.get_layer_status(model) if s.name == mine.name))
        common = asdict(mine).keys() & theirs.keys()
        assert {"name", "module_type", "enabled", "active_adapters", "requires_grad", "devices"} <= common
        assert {k: asdict(mine)[k] for k in common} == {k: theirs[k] for k in common}
        assert mine.method == {"default": name}
        assert mine.gradient == {"default": True}
        assert mine.dtype == {"default": "float32"}
        assert mine.backend == fp.explain(model)[0].backend
        if name not in ("houlsby", "pfeiffer", "parallel_adapter"):
            model.merge_adapter()
            assert fp.get_layer_status(model)[0].merged_adapters == ["default"]


def test_tables_show_themselves_and_escape():
    model = ours(fp.LoraConfig(r=2))
    explained, status = fp.explain(model), fp.get_layer_status(model)
    estimated = fp.estimate(net(), fp.LoraConfig(r=2, target_modules=["0"]), 64)
    for shown, head in ((explained, "backend"), (status, "gradient"), (estimated, "HF PEFT")):
        assert repr(shown) == str(shown)
        assert head in str(shown).splitlines()[0]
        html = shown._repr_html_()
        assert html.count("<tr>") == len(str(shown).splitlines())
        assert f">{head}</th>" in html
    assert isinstance(explained, list)
    explained[0] = replace(explained[0], why="<script>x & y</script>")
    assert "<script>x & y" in str(explained)
    assert "&lt;script&gt;x &amp; y&lt;/script&gt;" in explained._repr_html_()
    assert "<script" not in explained._repr_html_()


def test_a_table_of_nothing_and_columns_to_the_right():
    assert table.text(("a", "b"), []) == "a  b"
    assert table.text(("name", "n"), [("x", "10"), ("long one", "2")], right=(1,)) == (
        "name       n\nx         10\nlong one   2"
    )
    assert 'text-align: right">10<' in table.html(("name", "n"), [("x", 10)], right=(1,))
