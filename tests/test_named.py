"""Several adapters on a model, by name: added, active together, saved, loaded, removed."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fused_peft as fp

LORA = fp.LoraConfig(r=2, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=False)
SSB = fp.SSBConfig(target_modules=["b", "c"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.double()

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shaken(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "added." in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def two(order=("default", "second")):
    model = fp.get_peft_model(Net(), LORA)
    fp.add_adapter(model, "second", SSB)
    shaken(model)
    fp.set_adapter(model, list(order))
    return model


def test_an_added_adapter_does_nothing_until_it_is_set():
    model = fp.get_peft_model(Net(), LORA)
    before = model(X)
    fp.add_adapter(model, "second", SSB)
    shaken(model)
    assert torch.equal(model(X), before)
    assert isinstance(model.c, fp.PeftLinear)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "added" in n)
    fp.set_adapter(model, "second")
    only = shaken(fp.get_peft_model(Net(), SSB))
    with torch.no_grad():
        for layer in ("b", "c"):
            for name, p in getattr(model, layer).added["second"].named_parameters():
                getattr(getattr(only, layer), name).copy_(p)
    torch.testing.assert_close(model(X), only(X), rtol=0, atol=1e-12)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.added.second.{name}" for layer in "bc" for name in ("d_in", "d_out")
    }


def test_active_ones_act_in_their_order_as_merging_them_does():
    results = {}
    for order in (("default", "second"), ("second", "default")):
        model = two(order)
        results[order] = y = model(X)
        gradients = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        assert all(g.abs().sum() > 0 for g in gradients)
        model.eval()
        base = copy.deepcopy(dict(model.named_parameters()))
        fp.merge(model)
        torch.testing.assert_close(model(X), y, rtol=0, atol=1e-12)
        fp.unmerge(model)
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
        plain = fp.merge_and_unload(model)
        assert {type(m) for m in plain.children()} == {nn.Linear}
        torch.testing.assert_close(plain(X), y, rtol=0, atol=1e-12)
    assert (results["default", "second"] - results["second", "default"]).abs().max() > 1e-3


def test_each_is_saved_and_loaded_by_its_name(tmp_path):
    model = two()
    want = model(X)
    fp.save_pretrained(model, tmp_path / "first")
    fp.save_pretrained(model, tmp_path / "second", adapter_name="second")
    alone = fp.get_peft_model(Net(), LORA)
    fp.save_pretrained(alone, tmp_path / "alone")
    keys = set(load_file(tmp_path / "alone/adapter_model.safetensors"))
    assert set(load_file(tmp_path / "first/adapter_model.safetensors")) == keys  # of a single adapter, as ever
    fresh = fp.load_adapter(Net(), tmp_path / "first")
    fp.load_adapter(fresh, tmp_path / "second", adapter_name="second")
    torch.testing.assert_close(
        fresh(X), fp.load_adapter(Net(), tmp_path / "first")(X), rtol=0, atol=0
    )  # not active yet
    fp.set_adapter(fresh, ["default", "second"])
    torch.testing.assert_close(fresh(X), want, rtol=0, atol=1e-12)
    with torch.no_grad():
        fresh.c.added["second"].d_in.zero_()
    fp.load_adapter(fresh, tmp_path / "second", adapter_name="second")  # in place of the values
    torch.testing.assert_close(fresh(X), want, rtol=0, atol=1e-12)
    again = two()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), want, rtol=0, atol=0)


def test_removed_it_leaves_the_model_as_it_was():
    model = fp.get_peft_model(Net(), LORA)
    before, keys = model(X), set(model.state_dict())
    fp.add_adapter(model, "second", SSB)
    shaken(model)
    fp.set_adapter(model, ["default", "second"])
    fp.delete_adapter(model, "second")
    assert torch.equal(model(X), before)
    assert set(model.state_dict()) == keys
    assert type(model.c) is nn.Linear


def test_disabled_the_base_is_left():
    model = two()
    with fp.disable_adapter(model):
        torch.testing.assert_close(model(X), Net()(X), rtol=0, atol=0)


def test_schedules_and_penalties_see_every_active_adapter():
    model = fp.get_peft_model(Net(), LORA)
    fp.add_adapter(model, "more", fp.LoraConfig(r=3, target_modules=["c"], init_lora_weights=False))
    one = fp.mpc_penalty(model, "o")
    fp.set_adapter(model, ["default", "more"])
    both = fp.mpc_penalty(model, "o")
    fp.set_adapter(model, "more")
    torch.testing.assert_close(both, one + fp.mpc_penalty(model, "o"))


def heads(model):
    fp.add_adapter(model, "second", fp.LoraConfig(r=2, target_modules=["a"], modules_to_save=["c"]))


def biases(model):
    fp.add_adapter(model, "second", fp.LoraConfig(r=2, target_modules=["a"], bias="all"))


def behind(model):
    fp.add_adapter(model, "dora", fp.DoraConfig(r=2, target_modules=["a"]))
    fp.set_adapter(model, ["default", "dora"])


def while_merged(model):
    fp.merge(model)
    fp.set_adapter(model, "default")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: fp.add_adapter(m, "default", SSB), ValueError, "adapter_name='default' is taken"),
        (lambda m: fp.add_adapter(m, "a.b", SSB), ValueError, "adapter_name='a.b'.*holds a dot"),
        (lambda m: fp.add_adapter(m, "second", {"r": 2}), TypeError, "is a dict"),
        (lambda m: fp.add_adapter(m, "second", fp.SSLConfig(target_modules=["d"])), ValueError, "matches no module"),
        (heads, ValueError, "modules_to_save=.*only the first adapter"),
        (biases, ValueError, "bias='all'.*only the first adapter"),
        (lambda m: fp.set_adapter(m, "third"), ValueError, "adapter_name='third' is none of the model's: default"),
        (lambda m: fp.set_adapter(m, ["default", "default"]), ValueError, "names an adapter twice"),
        (behind, ValueError, "dora reads the frozen weight itself.*number 2, in a"),
        (lambda m: fp.delete_adapter(m, "default"), ValueError, "is the one that the model was adapted with"),
        (lambda m: fp.delete_adapter(m, "third"), ValueError, "is none of the model's"),
        (while_merged, RuntimeError, "a is merged; call unmerge before set_adapter"),
        (lambda m: fp.save_pretrained(m, "unused", adapter_name="third"), ValueError, "adapter_name='third'"),
    ],
)
def test_what_cannot_be_is_refused(call, kind, message):
    model = fp.get_peft_model(Net(), LORA)
    with pytest.raises(kind, match=message):
        call(model)
    assert isinstance(model.a, fp.PeftLinear)
    assert type(model.c) is nn.Linear
    assert model.a.active is None


def test_a_plain_model_takes_no_further_adapter():
    with pytest.raises(ValueError, match="has no adapter; call get_peft_model"):
        fp.add_adapter(Net(), "second", SSB)
