"""Rows of an embedding that train (trainable_token_indices): against a table with the rows written into it, in fp64,
and against Hugging Face PEFT."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_peft as fp
from fused_peft.model import checks, trainable_tokens
from fused_peft.model.adapter_config import AdapterFormatError

V, K, PAD, ROWS = 12, 8, 4, [7, 2, 4]
IDS = torch.tensor([[2, 7, 7, 0, 4], [11, 2, 5, 4, 9]])
CONFIG = fp.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, trainable_token_indices={"embed": ROWS})
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


class Scaled(nn.Embedding):
    """As Transformers' scaled word embeddings."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Net(nn.Module):
    """tied: the head and a second embedding hold the table too."""

    def __init__(self, tied=True, kind=nn.Embedding, dtype=torch.float64, rows=V, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.q, self.again = kind(rows, K, **options), nn.Linear(K, K), kind(rows, K, **options)
        self.head = nn.Linear(K, rows, bias=True)
        if tied:
            self.head.weight = self.again.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.q(self.embed(ids))) + self.again(ids.flip(0)))


def adapted(net=None, config=CONFIG, **options):
    model = fp.get_peft_model(net or Net(), config, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def rows_of(model):
    return model.embed.token_adapter.trainable_tokens_delta


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "alone"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.Embedding, {}), (nn.Embedding, {"padding_idx": PAD}), (nn.Embedding, {"scale_grad_by_freq": True}),
     (Scaled, {}), (Scaled, {"padding_idx": PAD, "scale_grad_by_freq": True})],
    ids=["plain", "padding", "by frequency", "scaled", "all"],
)  # fmt: skip
def test_equals_a_table_with_the_rows_written_into_it(tied, kind, options):
    """Outputs and every gradient."""
    model = adapted(Net(tied, kind, **options))
    got = model(IDS)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3
    dy = torch.randn_like(got)
    grads = torch.autograd.grad(got, trained, dy)

    rows = rows_of(model).detach().clone().requires_grad_()
    table = model.embed.weight.detach().index_copy(0, torch.tensor(ROWS), rows)
    second = table if tied else model.again.weight
    by, padding = kind.embed_scale if kind is Scaled else 1.0, options.get("padding_idx")

    def look(ids, W):
        return F.embedding(ids, W, padding, scale_grad_by_freq="scale_grad_by_freq" in options) * by

    h = torch.tanh(model.q(look(IDS, table))) + look(IDS.flip(0), second)
    want = F.linear(h, table if tied else model.head.weight, model.head.bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    others = [p for p in trained if p is not rows_of(model)]
    wants = dict(zip([id(rows), *map(id, others)], torch.autograd.grad(want, [rows, *others], dy), strict=True))
    for p, grad in zip(trained, grads, strict=True):
        torch.testing.assert_close(grad, wants[id(rows) if p is rows_of(model) else id(p)], rtol=0, atol=1e-12)


def test_a_tied_head_follows():
    """The comparison above sees it: without the head's hook the outputs differ."""
    model = adapted()
    with_head = model(IDS)
    model.head._forward_hooks.clear()
    assert not torch.allclose(model(IDS), with_head, atol=1e-3)


@every_case
def test_beside_every_method(case, tmp_path):
    """They train, are saved and read, and go into the merged model where there is one."""
    config = replace(case.make(2), target_modules=["q"], trainable_token_indices={"embed": ROWS})
    torch.manual_seed(5)
    model = adapted(Net(dtype=torch.float32), config).eval()
    y = model(IDS)
    y.square().sum().backward()
    assert rows_of(model).grad[0].abs().min() > 0
    fp.save_pretrained(model, tmp_path)
    again = fp.load_adapter(Net(dtype=torch.float32), tmp_path).eval()
    torch.testing.assert_close(again(IDS), y, rtol=0, atol=1e-6)
    assert fp.load_config(tmp_path).trainable_token_indices == {"embed": ROWS}
    try:
        plain = fp.merge_and_unload(again)
    except fp.NotMergeableError:
        return
    torch.testing.assert_close(plain(IDS), y, rtol=1e-4, atol=1e-4)


class Sizes(TorchDispatchMode):
    """The most elements that any operation has made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        self.most = max([self.most, *(t.numel() for t in made if t.untyped_storage().data_ptr() not in known)])
        return out


def test_nothing_of_the_tables_size_is_made():
    net = Net(dtype=torch.float32, rows=5000)
    model = adapted(net)
    with Sizes() as sizes:
        model(IDS[:1, :2])[..., :3].sum().backward()
    assert 0 < sizes.most <= 2 * 5000  # the logits; the table has 8 * 5000


def test_life(tmp_path):
    """Off, merged elsewhere, copied, pickled, in a state dict; unloaded without a trace."""
    base, model = Net(), adapted()
    y = model(IDS)
    with fp.disable_adapter(model):
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)
    assert torch.equal(model(IDS), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), y)
        with torch.no_grad():
            rows_of(other).zero_()
        assert not torch.equal(other(IDS), y)
        assert torch.equal(model(IDS), y)
    third = adapted(Net(), replace(CONFIG, init_lora_weights=True))
    third.load_state_dict(model.state_dict())
    assert torch.equal(third(IDS), y)
    state = fp.merged_state_dict(model)
    assert state.keys() == base.state_dict().keys()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr() == state["again.weight"].data_ptr()
    net = Net()
    net.load_state_dict(state)
    torch.testing.assert_close(net(IDS), y, rtol=0, atol=1e-12)
    fp.merge(model)  # the adapter's layers: rows, as heads that train, are where they were
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e-12)
    fp.unmerge(model)
    plain = fp.merge_and_unload(model)
    torch.testing.assert_close(plain(IDS), y, rtol=0, atol=1e-12)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in plain.modules())


def test_rows_that_are_not_finite_are_not_merged():
    model = adapted()
    with torch.no_grad():
        rows_of(model)[1, 0] = torch.inf
    for call in (fp.merge_and_unload, fp.merged_state_dict):
        with pytest.raises(ValueError, match=r"embed.token_adapter has NaN or infinite"):
            call(model, safe_merge=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    model = adapted(Net(dtype=dtype))
    assert rows_of(model).dtype == torch.float32
    y = model(IDS)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert rows_of(model).grad.dtype == torch.float32
    wide = adapted(Net(dtype=torch.float32))
    with torch.autocast("cpu", dtype):
        cast = wide(IDS)
    assert cast.dtype == dtype
    torch.testing.assert_close(cast.float(), wide(IDS), rtol=0.1, atol=0.1)
    assert rows_of(adapted(Net(dtype=dtype), autocast_adapter_dtype=False)).dtype == dtype


def test_compiled():
    model = adapted()
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(IDS), model(IDS), rtol=0, atol=1e-12
    )


def test_a_file_for_other_rows_is_refused(tmp_path):
    fp.save_pretrained(adapted(), tmp_path)
    for other in ({"embed": [7, 2, 5]}, {"embed": [2, 7, 4]}, None):
        model = adapted(Net(), replace(CONFIG, trainable_token_indices=other))
        before = {k: t.clone() for k, t in model.state_dict().items()}
        with pytest.raises(AdapterFormatError, match=r"trainable_tokens_delta|trainable_token_indices"):
            fp.load_adapter(model, tmp_path)
        assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_an_embedding_that_was_replaced_is_noticed(tmp_path):
    model = adapted()
    assert checks.vanished(model) == []
    model.embed = nn.Embedding(V, K, dtype=torch.float64)
    assert checks.vanished(model) == ["embed"]
    with pytest.raises(RuntimeError, match=r"embed \(now another Embedding\)"):
        fp.save_pretrained(model, tmp_path)


def rows(ids, **more):
    return replace(CONFIG, trainable_token_indices=ids, **more)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.q = nn.Embedding(V, K), nn.Linear(K, K)
        self.conv = nn.Conv1d(1, 1, 1)
        self.conv.weight = self.embed.weight


def limited():
    net = Net()
    net.embed.max_norm = 1.0
    return net


REFUSED = {
    "outside": (Net, lambda: rows({"embed": [1, V]}), ValueError, "12 is outside the 12 rows of embed"),
    "no such embedding": (Net, lambda: rows({"embd": [1]}), ValueError, "'embd' matches no embedding .*embed"),
    "a linear layer": (Net, lambda: rows({"q": [1]}), ValueError, "'q' matches no embedding"),
    "no input embeddings": (Net, lambda: rows([1]), ValueError, "name it"),
    "twice": (lambda: Net(False), lambda: rows({"embed": [1], "again": [2]}), None, None),
    "one table": (Net, lambda: rows({"embed": [1], "again": [2]}), ValueError, "embed and again hold one table"),
    "two entries": (lambda: nn.ModuleDict({"a": Net()}), lambda: rows({"embed": [1], "a.embed": [2]}), ValueError,
                    "meant by two entries"),
    "repeated": (Net, lambda: rows({"embed": [1, 1]}), ValueError, "different token ids"),
    "negative": (Net, lambda: rows([-1]), ValueError, "0 or more"),
    "no ids": (Net, lambda: rows({"embed": []}), ValueError, "different token ids"),
    "no list": (Net, lambda: rows({"embed": "12"}), ValueError, "must be a list"),
    "flags": (Net, lambda: rows([True]), ValueError, "must be a list"),
    "head adapted": (Net, lambda: rows({"embed": [1]}, target_modules=["q", "head"]), ValueError,
                     "also held by head, which is adapted"),
    "table adapted": (lambda: Net(False), lambda: rows({"embed": [1]}, target_modules=["q", "embed"]), ValueError,
                      "held by embed, which is adapted"),
    "saved whole": (lambda: Net(False), lambda: rows({"embed": [1]}, modules_to_save=["embed"]), ValueError,
                    "adapted or trained whole"),
    "max_norm": (limited, lambda: rows({"embed": [1]}), ValueError, "max_norm"),
    "other module": (Convolved, lambda: rows({"embed": [1]}), ValueError, "held by conv, a Conv1d"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_changes(name):
    make, config, error, match = REFUSED[name]
    net = make()
    before, hooks = {k: t.clone() for k, t in net.state_dict().items()}, [p.requires_grad for p in net.parameters()]
    if error is None:
        assert len(trainable_tokens.planned(net, config(), (), None)) == 2
        return
    with pytest.raises(error, match=match):
        fp.get_peft_model(net, config())
    assert net.state_dict().keys() == before.keys()
    assert hooks == [p.requires_grad for p in net.parameters()]


def test_a_further_adapter_has_none():
    with pytest.raises(ValueError, match=r"trainable_token_indices=.* only the first adapter"):
        fp.add_adapter(adapted(), "more", CONFIG)


# beside PEFT


def language_model(tie, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=3, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "alone"])
@pytest.mark.parametrize("ids", [[5, 3, 9], {"embed_tokens": [5, 3, 9]}], ids=["list", "by name"])
@pytest.mark.filterwarnings("ignore")
def test_as_in_peft(tie, ids, tmp_path):
    """Logits and gradients of a file of PEFT's, the same file written by us, what is exported, and resizing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=ids, init_lora_weights=False)
    theirs = peft.get_peft_model(language_model(tie), config)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fp.load_adapter(language_model(tie), tmp_path / "theirs")
    x, found = torch.tensor([[3, 5, 9, 2, 31, 5]]), []
    for model in (theirs, ours):
        out = model(input_ids=x, labels=x)
        trained = {re.sub(r"base_model\.model\.|\.default(\.weight)?|\.base_layer", "", n): p
                   for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
        found.append((out.logits, dict(zip(trained, torch.autograd.grad(out.loss, [*trained.values()]), strict=True))))
    (a, grads), (b, own) = found
    torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert grads.keys() == own.keys()
    for name in grads:
        torch.testing.assert_close(own[name], grads[name], rtol=1e-4, atol=1e-7)
    fp.save_pretrained(ours, tmp_path / "ours")
    assert (
        fp.export_lora(ours, tmp_path / "exported").keys()
        == fp.export_lora(fp.accelerate(theirs), tmp_path / "of theirs").keys()
    )
    for folder in ("ours", "exported", "of theirs"):
        back = peft.PeftModel.from_pretrained(language_model(tie), tmp_path / folder)
        torch.testing.assert_close(back(x).logits, a, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"resize_token_embeddings to 40 .*model.embed_tokens"):
        ours.resize_token_embeddings(40)
