"""The merged model as tensors and as a folder, the adapted one untouched; and the command that writes either."""

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

transformers = pytest.importorskip("transformers")

from test_experts import STACKS  # noqa: E402
from test_experts import model as moe  # noqa: E402
from test_export import Net, X, moved, trained  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.__main__ import main  # noqa: E402
from fused_peft.model import merged  # noqa: E402
from fused_peft.tools import export as command  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 11).view(2, 5)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def llama(tie=False, dtype=torch.float32, folder=None):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tie)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    if folder is None:
        return model
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def adapted(model=None, config=None, **settings):
    config = config or fp.TriLoraConfig(r=2, target_modules=["q_proj", "down_proj"], **settings)
    return moved(fp.get_peft_model(llama() if model is None else model, config), 0.1).eval()


def unchanged(model, call):
    """What the call on the model gives; the model's tensors are the same objects with the same values after it."""
    before = {n: (t, t.detach().clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    found = call(model)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == before.keys()
    assert all(after[n] is t and torch.equal(t, was) for n, (t, was) in before.items())
    return found


def mergeable(case):
    try:
        fp.merge(trained(case.make(3)))
    except fp.NotMergeableError:
        return False
    return True


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_state_of_every_method(case):
    model = trained(case.make(3))
    if not mergeable(case):
        with pytest.raises(fp.NotMergeableError, match="q: "):
            unchanged(model, fp.merged_state_dict)
        return
    state, want = unchanged(model, fp.merged_state_dict), model(X)
    plain = Net()
    added = state.keys() - plain.state_dict().keys()
    assert added <= {"v.bias"}
    assert list(state) == [*plain.state_dict(), *added] or added
    if added:
        plain.v.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(fp.merge_and_unload(model).state_dict()), state, rtol=0, atol=0)


def test_only_merged_weights_are_new():
    model = trained(fp.LoraConfig(r=2))
    state = fp.merged_state_dict(model)
    shared = {n for n, t in model.state_dict().items() if n in state and t.data_ptr() == state[n].data_ptr()}
    assert shared == {"head.weight", "head.bias"}


def test_merged_added_and_inactive_adapters():
    model = trained(fp.LoraConfig(r=2))
    fp.add_adapter(model, "other", fp.SSBConfig(target_modules=["q"]))
    fp.set_adapter(model, ["default", "other"])
    moved(model)
    both = fp.merged_state_dict(model)
    torch.testing.assert_close(loaded(both)(X), model(X), rtol=0, atol=1e-12)
    fp.merge(model)
    assert_equal(fp.merged_state_dict(model), both)
    fp.unmerge(model)
    fp.set_adapter(model, "other")
    state = fp.merged_state_dict(model)
    torch.testing.assert_close(loaded(state)(X), model(X), rtol=0, atol=1e-12)
    assert torch.equal(state["v.weight"], Net().v.weight)


def loaded(state):
    net = Net()
    net.load_state_dict(state)
    return net


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_names_behind_activation_checkpointing():
    model = trained(fp.LoraConfig(r=2))
    want = fp.merged_state_dict(model)
    model.q = checkpoint_wrapper(model.q)
    assert_equal(fp.merged_state_dict(model), want)


def test_what_is_refused():
    model = trained(fp.LoraConfig(r=2, modules_to_save=["head"]))
    with fp.disable_adapter(model), pytest.raises(RuntimeError, match="leave the context first"):
        fp.merged_state_dict(model)
    model.q.lora_A.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="q: the merged weight has NaN"):
        fp.merged_state_dict(model, safe_merge=True)
    shares = fp.get_peft_model(llama(tie=True), fp.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(fp.NotMergeableError, match=r"lm_head.weight is shared with model.embed_tokens"):
        fp.merged_state_dict(shares)
    with pytest.raises(ValueError, match="call get_peft_model first"):
        fp.merged_state_dict(Net())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_from_pretrained_loads(tie, dtype, tmp_path):
    plain = llama(tie, dtype)
    keys, head = list(plain.state_dict()), None if tie else ["lm_head"]
    model = adapted(plain, modules_to_save=head)
    want = model(IDS).logits
    state = unchanged(model, fp.merged_state_dict)
    assert list(state) == keys
    assert {t.dtype for t in state.values()} == {dtype}
    assert (state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()) is tie
    unchanged(model, lambda m: fp.save_merged(m, tmp_path, max_shard_size="4KB"))
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    assert (tmp_path / "generation_config.json").is_file()
    assert not (tmp_path / "adapter_config.json").exists()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert back.config.tie_word_embeddings is tie
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=limit)
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=0)


def test_a_lost_update_shows(tmp_path, monkeypatch):
    model = adapted()
    monkeypatch.setattr(fp.PeftLinear, "merged_tensors", lambda layer: (layer.weight, layer.bias))
    fp.save_merged(model, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (back(IDS).logits - model(IDS).logits).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts(kind, tmp_path):
    moe(kind, torch.float32).save_pretrained(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    keys = list(plain.state_dict())
    config = fp.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[f"experts.{s}" for s in STACKS])
    model = adapted(plain, config)
    want = model(IDS).logits
    assert list(unchanged(model, fp.merged_state_dict)) == keys
    fp.save_merged(model, tmp_path / "merged")
    assert (
        load_file(tmp_path / "merged/model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    )
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=1e-5)


def test_a_model_that_is_adapted_in_part(tmp_path):
    model = llama()
    adapted(model.model)
    want = model(IDS).logits
    fp.save_merged(model, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=1e-6)


def test_folders_that_from_pretrained_would_read_otherwise_are_refused(tmp_path):
    path = tmp_path / "no"
    with pytest.raises(TypeError, match=r"model=Net is no Transformers model.*torch.save\(merged_state_dict"):
        fp.save_merged(trained(fp.LoraConfig(r=2)), path)
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"is Hugging Face PEFT's, .* call merge_and_unload\(\).save_pretrained\(path\)"
    ):
        fp.save_merged(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), path)
    with pytest.raises(fp.NotMergeableError, match=r"q_proj.bias.*: a bias that the architecture lacks"):
        fp.save_merged(adapted(config=fp.BitFitConfig(target_modules=["q_proj"])), path)
    with pytest.raises(
        fp.NotMergeableError,
        match=r"lm_head.weight and .* tied in model.config and .*tie_word_embeddings = False before",
    ):
        fp.save_merged(adapted(llama(tie=True), modules_to_save=["lm_head"]), path)
    quantised = adapted()
    quantised.hf_quantizer = object()
    with pytest.raises(fp.NotMergeableError, match=r"merge_and_unload\(model, dequantize=True\)"):
        fp.save_merged(quantised, path)
    assert not path.exists()
    path.touch()
    with pytest.raises(FileExistsError, match="give a folder"):
        fp.save_merged(adapted(), path)


def test_a_quantised_layer_is_refused_and_its_plain_one_named():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"))
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(fp.NotMergeableError, match=r"0: its weight is stored in .*dequantize=True"):
        fp.merged_state_dict(model)


def test_an_offloaded_weight_is_refused():
    model = trained(fp.LoraConfig(r=2))
    model.head.to("meta")
    with pytest.raises(fp.NotMergeableError, match=r"head.weight, head.bias: on the meta device \(offloaded\?\)"):
        fp.merged_state_dict(model)


def test_every_kind_of_sharding_is_refused(monkeypatch):
    monkeypatch.setattr(merged, "is_spread", lambda t: True)
    with pytest.raises(RuntimeError, match="sharded over several processes; call save_pretrained"):
        fp.merged_state_dict(trained(fp.LoraConfig(r=2)))


@pytest.fixture
def folders(tmp_path):
    """A base and an adapter on disk, and what they compute."""
    model = adapted(llama(folder=tmp_path / "base"), task_type="CAUSAL_LM")
    fp.save_pretrained(model, tmp_path / "adapter")
    return tmp_path, model(IDS).logits.detach()


def run(folder, *more, out="out", adapter="adapter"):
    return main(["export", "--adapter", str(folder / adapter), "--out", str(folder / out), *map(str, more)])


@pytest.mark.parametrize("base", [False, True])
def test_the_command(base, folders, capsys):
    peft = pytest.importorskip("peft")
    folder, want = folders
    (folder / "out").mkdir()  # an empty one will do
    assert run(folder, *(("--base", folder / "base") if base else ())) == 0
    assert "4 of 4 layers exact" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(llama(folder=folder / "base"), folder / "out").eval()
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=0, atol=1e-6)
    transformers.logging.enable_progress_bar()
    assert run(folder, "--merged", out="merged") == 0
    assert "it/s" not in capsys.readouterr().err  # no bars where stderr is no terminal
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=1e-6)
    assert run(folder, "--rank", 1, out="less") == 0
    assert capsys.readouterr().out.count("relative error 0.") == 4


def test_the_command_takes_a_head_and_its_task(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForSequenceClassification
    model = adapted(
        auto.from_pretrained(tmp_path / "base", num_labels=5).eval(),
        fp.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    )
    fp.save_pretrained(model, tmp_path / "adapter")
    assert run(tmp_path, "--merged") == 0
    back = auto.from_pretrained(tmp_path / "out").eval()
    assert back.config.num_labels == 5
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_what_the_command_refuses(folders, capsys):
    folder, _ = folders
    other = transformers.BertModel(transformers.BertConfig(**SMALL))
    other.save_pretrained(folder / "bert")
    llama().model.save_pretrained(folder / "headless")
    unnamed = adapted()
    fp.save_pretrained(unnamed, folder / "unnamed")
    fp.save_pretrained(adapted(llama(folder=folder / "base"), fp.SSLConfig(target_modules=["q_proj"])), folder / "ssl")
    for said, more, kept in (
        ("is no folder here", (), {"adapter": "nowhere"}),
        ("holds no adapter_config.json", (), {"adapter": "base"}),
        ("--base='nowhere' is no folder with a config.json", ("--base", "nowhere"), {}),
        ("does not fit model=Bert", ("--base", folder / "bert"), {}),
        ("has no lm_head.weight, and the adapter neither", ("--base", folder / "headless"), {}),
        ("names no base model; give --base", (), {"adapter": "unnamed"}),
        ("is there and not an empty folder", (), {"out": "base"}),
        ("rank=0 must be a positive integer", ("--rank", 0), {}),
        ("more than a low-rank product beside the weight: a scale of the layer's input", (), {"adapter": "ssl"}),
    ):
        assert run(folder, *more, **kept) == 2, said
        assert said in capsys.readouterr().err
        assert not (folder / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        run(folder, "--rank", 2, "--merged")


def test_every_task_has_its_class():
    from fused_peft.methods.base import TASKS

    assert command.AUTO.keys() == set(TASKS)
    assert all(hasattr(transformers, name) for name in command.AUTO.values())
