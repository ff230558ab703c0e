"""The model API: get_peft_model, merge, unmerge, disable_adapter, heads and biases, and their refusals."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import fused_peft as fp


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.q(x)) * self.v(x))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 20)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)
CONFIGS = [
    fp.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False),
    fp.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False, bias="all", modules_to_save=["head"]),
    fp.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, bias="lora_only"),
    fp.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"]),
    fp.SSLConfig(target_modules=["q", "v"]),
    fp.SSBConfig(target_modules=["q", "v"], modules_to_save=["head"]),
    fp.BitFitConfig(),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type}-{c.bias}-{c.modules_to_save}")


@pytest.fixture
def net():
    return Net().eval()


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]


@every_config
def test_life_of_an_adapter(net, config):
    base = net(IDS)
    assert fp.get_peft_model(net, config) is net
    perturb(net)
    adapted = net(IDS)
    assert not torch.allclose(adapted, base)
    with fp.disable_adapter(net) as off:
        assert off is net
        assert torch.equal(net(IDS), base)
    assert torch.equal(net(IDS), adapted)

    before = snapshot(net)
    fp.merge(net)
    torch.testing.assert_close(net(IDS), adapted, rtol=1e-5, atol=1e-5)
    with fp.disable_adapter(net):
        assert torch.equal(net(IDS), base)
    fp.unmerge(net)
    assert same(before, snapshot(net))
    assert torch.equal(net(IDS), adapted)

    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(IDS), adapted)
        with fp.disable_adapter(twin):
            assert torch.equal(twin(IDS), base)

    plain = fp.merge_and_unload(net)
    torch.testing.assert_close(plain(IDS), adapted, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in plain.modules()] == [type(m) for m in Net().modules()]
    fp.get_peft_model(plain, config)  # can be adapted again


@every_config
def test_only_what_should_train_trains(net, config):
    kept = {n: p.clone() for n, p in net.named_parameters()}
    fp.get_peft_model(net, config)
    trainable = {n for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(IDS).square().mean().backward()
    optimizer.step()
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, kept[n]) for n, p in net.named_parameters() if n in frozen)
    for n, p in net.named_parameters():
        assert (p.grad is not None) == (n in trainable)
    extra = {"head.weight", "head.bias"} if config.modules_to_save else set()
    biases = {n for n in kept if n.endswith("bias")}
    in_place = trainable & set(kept)
    if isinstance(config, fp.BitFitConfig):
        assert in_place == {n for n in biases if "norm" in n}
        assert {n for n in trainable if "bitfit" in n} == {f"blocks.{i}.q.bitfit_bias" for i in range(3)} | {
            "head.bitfit_bias"
        }
    else:
        wanted = {"none": set(), "all": biases, "lora_only": {f"blocks.{i}.q.bias" for i in range(3)}}[config.bias]
        assert in_place == wanted | extra


def test_training_a_head_leaves_a_tied_weight_alone():
    net = Net()
    net.head.weight = net.embed.weight
    fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    assert net.head.weight is not net.embed.weight
    assert net.head.weight.requires_grad
    assert not net.embed.weight.requires_grad


def test_a_shared_module_is_replaced_everywhere():
    net = Net()
    net.blocks[1] = net.blocks[0]
    fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["blocks.0.q"]))
    assert isinstance(net.blocks[1].q, fp.PeftLinear)


def test_tied_target_warns(net):
    net.head.weight = net.embed.weight
    with pytest.warns(UserWarning, match=r"head.weight is shared with embed"):
        fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["head"]))


def test_half_precision_models_keep_fp32_adapters():
    for dtype, keep, want in (
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
    ):
        net = fp.get_peft_model(Net().to(dtype), fp.SSBConfig(target_modules=["q"]), autocast_adapter_dtype=keep)
        assert net.blocks[0].q.d_in.dtype == want
        net(IDS).sum().backward()


def test_patterns_and_layer_choice():
    config = fp.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q", "v"],
        rank_pattern={"blocks.1.q": 3, r".*\.2\..*": 4},
        alpha_pattern={"v": 16},
        layers_to_transform=[1, 2],
        layers_pattern="blocks",
    )
    net = fp.get_peft_model(Net(), config)
    assert type(net.blocks[0].q) is nn.Linear
    ranks = {n: (m.config.r, m.config.scaling) for n, m in net.named_modules() if isinstance(m, fp.PeftLinear)}
    assert ranks == {
        "blocks.1.q": (3, 4 / 3),
        "blocks.1.v": (2, 8.0),
        "blocks.2.q": (4, 1.0),
        "blocks.2.v": (4, 4.0),
    }


def test_bitfit_leaves_excluded_biases_alone(net):
    fp.get_peft_model(net, fp.BitFitConfig(exclude_modules=["head", "norm"]))
    trainable = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"blocks.{i}.q.bitfit_bias" for i in range(3)}


def test_the_callers_config_is_not_edited(net):
    config = fp.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["head"])
    fp.get_peft_model(net, config)
    assert config == fp.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["head"])


def test_print_trainable_parameters(net, capsys):
    fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["q"]))
    total = sum(p.numel() for p in net.parameters())
    assert fp.print_trainable_parameters(net) == (3 * 2 * 16, total)
    percent = 100 * 96 / total
    want = f"trainable params: 96 || all params: {total:,d} || trainable%: {percent:.4f}\n"
    assert capsys.readouterr().out == want


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            fp.LoraConfig(target_modules=["qq", "heads"], r=2),
            ValueError,
            r"matches no module; the nearest names are .*head",
        ),
        (fp.LoraConfig(target_modules=["zzzzzz"], r=2), ValueError, "linear layers end in head, q, v"),
        (fp.LoraConfig(target_modules=["q"], layers_to_transform=[9], r=2), ValueError, "layers_to_transform"),
        (fp.PissaConfig(target_modules=["embed"], r=2), TypeError, "embed: pissa cannot adapt an nn.Embedding"),
        (fp.LoraConfig(target_modules=["q", "norm"], r=2), TypeError, "LayerNorm is not a linear layer"),
        (fp.PissaConfig(target_modules=["q"], r=9), ValueError, r"blocks.0.q: r=9 must not exceed"),
        (fp.PissaConfig(target_modules=["q"], r=2, rank_pattern={"2.q": 99}), ValueError, r"blocks.2.q: r=99"),
        (fp.LoraConfig(r=2), ValueError, "target_modules=None"),
        (
            fp.LoraConfig(target_modules=["q"], r=2, modules_to_save=["haed"]),
            ValueError,
            "'haed' matches no module.*head",
        ),
        ("lora", TypeError, "LoraConfig"),
    ],
    ids=str,
)
def test_bad_requests_change_nothing(net, config, error, message):
    before = snapshot(net)
    with pytest.raises(error, match=message):
        fp.get_peft_model(net, config)
    assert same(before, snapshot(net))
    assert not hasattr(net, "_fused_peft")


def test_adapting_twice_is_refused(net):
    config = fp.LoraConfig(r=2, target_modules=["q"])
    fp.get_peft_model(net, config)
    before = snapshot(net)
    with pytest.raises(ValueError, match="already has adapters"):
        fp.get_peft_model(net, config)
    assert same(before, snapshot(net))


def test_a_model_adapted_by_peft_is_refused(net):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="Hugging Face PEFT"):
        fp.get_peft_model(adapted, fp.LoraConfig(r=2, target_modules=["v"]))


def test_merge_is_all_or_nothing(net):
    fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["q"]))
    net.blocks[2].q.lora_B.data.fill_(float("nan"))
    before = net.blocks[0].q.weight.clone()
    with pytest.raises(ValueError, match=r"blocks.2.q: the merged weight has NaN"):
        fp.merge(net, safe_merge=True)
    assert not net.blocks[0].q.merged
    assert torch.equal(net.blocks[0].q.weight, before)


def test_merge_twice_and_without_adapter_are_refused(net):
    for call in (fp.merge, fp.unmerge, fp.merge_and_unload, fp.explain):
        with pytest.raises(ValueError, match="no adapted layer"):
            call(net)
    fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(RuntimeError, match="not merged"):
        fp.unmerge(net)
    fp.merge(net)
    with pytest.raises(RuntimeError, match=r"blocks.0.q is already merged"):
        fp.merge(net)
    fp.merge_and_unload(net)


def test_disable_adapter_restores_after_an_error(net):
    fp.get_peft_model(net, CONFIGS[1])
    perturb(net)
    adapted = net(IDS)

    def fail():
        with fp.disable_adapter(net):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(net(IDS), adapted)


def test_a_lone_linear_points_to_from_linear():
    with pytest.raises(ValueError, match="from_linear"):
        fp.get_peft_model(nn.Linear(4, 4), fp.LoraConfig(r=2, target_modules=["x"]))


@pytest.mark.parametrize("merged", [False, True])
def test_state_changes_inside_disable_adapter_are_refused(net, merged, tmp_path):
    fp.get_peft_model(net, CONFIGS[1])
    perturb(net)
    fp.save_pretrained(net, tmp_path)
    if merged:
        fp.merge(net)
    want = net(IDS)
    with fp.disable_adapter(net), fp.disable_adapter(net):
        for call in (fp.merge, fp.unmerge, fp.merge_and_unload):
            with pytest.raises(RuntimeError, match="inside disable_adapter"):
                call(net)
        for call in (fp.save_pretrained, fp.load_adapter):
            with pytest.raises(RuntimeError, match="inside disable_adapter"):
                call(net, tmp_path)
    assert torch.equal(net(IDS), want)


def test_two_targets_on_one_weight_do_not_merge(net):
    net.blocks[0].v.weight = net.blocks[0].q.weight
    with pytest.warns(UserWarning, match="shared"):
        fp.get_peft_model(net, CONFIGS[0])
    before = net.blocks[0].q.weight.clone()
    with pytest.raises(fp.NotMergeableError, match=r"blocks\.0\.q\.weight is shared with blocks\.0\.v, .*untie"):
        fp.merge(net)
    assert torch.equal(net.blocks[0].q.weight, before)


def test_merge_rolls_back_on_any_error(net, monkeypatch):
    fp.get_peft_model(net, CONFIGS[0])
    before, calls, right = snapshot(net), [], fp.PeftLinear.merge

    def fails_third(layer, safe_merge=False):
        calls.append(layer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        right(layer, safe_merge)

    monkeypatch.setattr(fp.PeftLinear, "merge", fails_third)
    with pytest.raises(torch.OutOfMemoryError):
        fp.merge(net)
    assert same(before, snapshot(net))
    assert not any(m.merged for m in net.modules() if isinstance(m, fp.PeftLinear))


def test_compiled_and_wrapped_models(net, tmp_path):
    fp.get_peft_model(net, CONFIGS[1])
    perturb(net)
    want = net(IDS)
    compiled = torch.compile(net, backend="eager")
    fp.save_pretrained(compiled, tmp_path / "compiled")
    fp.save_pretrained(nn.DataParallel(net), tmp_path / "parallel")
    torch.manual_seed(0)
    for folder in ("compiled", "parallel"):
        fresh = Net().eval()
        fresh.load_state_dict({k: v for k, v in net.state_dict().items() if k in fresh.state_dict()})
        torch.testing.assert_close(fp.load_adapter(fresh, tmp_path / folder)(IDS), want)
    fp.merge(compiled)
    torch.testing.assert_close(net(IDS), want)


def test_encoder_layers_with_a_fast_path_are_refused():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    wrapped = nn.Sequential(model)
    with pytest.raises(TypeError, match="past any adapter"):
        fp.get_peft_model(wrapped, fp.LoraConfig(r=2, target_modules=["linear1"]))


def test_all_layers_are_replaced_in_one_walk_over_the_model(net, monkeypatch):
    from fused_peft.model import convert

    walks, right = [], convert.put
    monkeypatch.setattr(convert, "put", lambda model, new: (walks.append(len(new)), right(model, new)))
    fp.get_peft_model(net, CONFIGS[0])
    fp.merge_and_unload(net)
    assert walks == [6, 6]


def test_a_rank_cannot_change_under_the_optimizer():
    net, config = torch.nn.Sequential(torch.nn.Linear(8, 6)), fp.LoraConfig(r=2, target_modules=["0"])
    fp.get_peft_model(net, config)
    layer, before = net[0], {n: p.detach().clone() for n, p in net.named_parameters()}
    config.r = 4  # the caller's own object: the layer keeps its copy
    assert layer.config.r == 2
    for held in (layer.config, fp.model.state.state_of(net).config):
        with pytest.raises(AttributeError, match=r"r=4: .*already built.*build the optimizer after"):
            held.r = 4
    for wrong in (torch.nn.Parameter(torch.zeros(4, 8)), None):
        with pytest.raises(ValueError, match=r"lora_A: shape .* does not fit .*\(2, 8\).*build the optimizer after"):
            layer.lora_A = wrong
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    layer.lora_A = torch.nn.Parameter(torch.zeros(2, 8))  # the same shape is the caller's business
    again = copy.deepcopy(net)
    with pytest.raises(AttributeError):
        again[0].config.r = 4
    assert fp.merge_and_unload(net)[0].weight.shape == (6, 8)


@pytest.mark.parametrize("config", [CONFIGS[0], fp.PissaConfig(r=2)], ids=["lora", "pissa"])
def test_adapting_under_inference_mode_gives_what_trains(config, tmp_path):
    config = replace(config, target_modules=["0"], modules_to_save=["2"], bias="all")
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).half()
    with torch.inference_mode():
        fp.get_peft_model(net, config)
    net(torch.randn(2, 4).half()).float().square().sum().backward()
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(trainable) > 4
    assert all(p.grad is not None for p in trainable)
    fp.save_pretrained(net, tmp_path)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.inference_mode():
        fp.load_adapter(plain, tmp_path)
    plain(torch.randn(2, 4)).square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters() if p.requires_grad)


def test_weights_made_under_inference_mode_are_refused_unless_nothing_trains():
    config = fp.LoraConfig(r=2, target_modules=["0"])
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 4))
    for adapt in (lambda: fp.get_peft_model(net, config), lambda: fp.PeftLinear.from_linear(net[0], config)):
        with pytest.raises(ValueError, match=r"made under torch.inference_mode\(\).*torch.no_grad\(\) will do"):
            adapt()
    assert type(net[0]) is nn.Linear
    x = torch.randn(2, 4)
    want = net(x)
    assert torch.equal(fp.get_peft_model(net, replace(config, inference_mode=True))(x), want)
