"""fp.estimate: every byte it names, held against what training holds."""

import csv
import sys
import warnings
import weakref
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

TOKENS, K, N, R = 24, 256, 192, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = {
    **{name: method.example for name, method in METHODS.items()},
    "lora+dropout": lambda r: fp.LoraConfig(r=r, lora_dropout=0.1),
    "lora+n": lambda r: fp.LoraConfig(r=r, nonlinearity="gelu", lora_bias=True),
    "dora+dropout": lambda r: fp.DoraConfig(r=r, lora_dropout=0.1),
    "ia3 (input)": lambda r: fp.IA3Config(feedforward_modules=".*"),
    "ia3 (bias apart)": lambda r: fp.IA3Config(scale_bias=False),
    "vera+dropout": lambda r: fp.VeraConfig(r=r, vera_dropout=0.1),
    "adapter": lambda r: fp.bottleneck("scaled_par_bn", r=r, lora_dropout=0.1),
}
THEIRS = {
    "lora": {},
    "lora+dropout": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora+dropout": {"use_dora": True, "lora_dropout": 0.1},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "adalora": {"init_r": R, "target_r": R, "total_step": 10},
    "adalora+dropout": {"init_r": R, "target_r": R, "total_step": 10, "lora_dropout": 0.1},
    "ia3": {"feedforward_modules": []},
    "ia3 (input)": {"feedforward_modules": ".*"},
}
both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def pair(name, **options):
    """The config that PEFT and we give the same name."""
    peft = pytest.importorskip("peft")
    kind = {"a": "AdaLoraConfig", "i": "IA3Config"}.get(name[0], "LoraConfig")
    rank = {"r": R, "lora_alpha": 2 * R} if kind == "LoraConfig" else {}
    options = {**rank, **THEIRS[name], **options}
    return getattr(fp, kind)(**options), getattr(peft, kind)(**options)


def net(dtype, layers=1, width=N):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(K if i == 0 else width, width, dtype=dtype) for i in range(layers)))


def targets(layers):
    return {"target_modules": [str(i) for i in range(layers)]}


def kept(model, x, alive=True, parts=()):
    """Bytes of the storages that the graph of model(x) holds, the model's own, and ``parts``, left out; with ``alive``
    False also of those that it has let go of when the forward ends."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *parts)}
    refs, all_of_them = [], []

    def pack(t):
        refs.append(weakref.ref(alias := t.detach()))
        if not alive:
            all_of_them.append(alias)
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in refs if (t := r()) is not None}
    del y
    return sum(n for address, n in sizes.items() if address not in own)


def rows_of_x(dtype, width=K, tokens=TOKENS):
    return torch.randn(2, tokens // 2, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("layers", [1, 3])
@both
@pytest.mark.parametrize("name", OURS)
def test_what_our_layers_keep(name, dtype, layers):
    config = OURS[name](R)
    config.target_modules = targets(layers)["target_modules"]
    model, x = net(dtype, layers), rows_of_x(dtype)
    found = fp.estimate(model, config, TOKENS)
    fp.get_peft_model(model, config)
    assert kept(model, x) == found.x + found.beyond_x
    own = sum(getattr(layer, name).nbytes for layer in model for name in layer.buffer_names)
    assert own == found.buffers
    assert found.x in (0, x.nbytes + (layers - 1) * x.nbytes * N // K)
    assert [row.name for row in found.layers] == targets(layers)["target_modules"]


@pytest.mark.parametrize("layers", [1, 3])
@both
@pytest.mark.parametrize("name", THEIRS)
def test_what_pefts_layers_keep(name, dtype, layers):
    peft = pytest.importorskip("peft")
    config, theirs = pair(name, **targets(layers))
    found = fp.estimate(net(dtype, layers), config, TOKENS, device="cpu")
    model = peft.get_peft_model(net(dtype, layers), theirs).train()
    assert kept(model, rows_of_x(dtype)) == found.peft_x + found.peft_beyond_x
    assert found.x + found.beyond_x <= found.peft_x + found.peft_beyond_x


@both
@pytest.mark.parametrize("name", [n for n in THEIRS if "dropout" in n])
def test_pefts_dropout_on_a_gpu_keeps_a_byte_an_element(name, dtype, monkeypatch):
    """native_dropout is what F.dropout calls on CUDA; on the CPU it keeps the same boolean mask."""
    peft = pytest.importorskip("peft")
    config, theirs = pair(name, **targets(1))
    found = fp.estimate(net(dtype), config, TOKENS)
    model = peft.get_peft_model(net(dtype), theirs).train()
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, train, _: torch.native_dropout(x, p, train)[0])
    assert kept(model, rows_of_x(dtype)) == found.peft_x + found.peft_beyond_x


@both
@pytest.mark.parametrize("name", ["lora", "dora", "dora+dropout"])
def test_conv1d(name, dtype):
    peft = pytest.importorskip("peft")
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    config, theirs = pair(name, **targets(1), fan_in_fan_out=True)
    build = lambda: nn.Sequential(Conv1D(N, K)).to(dtype)  # noqa: E731
    found = fp.estimate(build(), config, TOKENS, device="cpu")
    assert kept(fp.get_peft_model(build(), config), rows_of_x(dtype)) == found.x + found.beyond_x
    model = peft.get_peft_model(build(), theirs).train()
    assert kept(model, rows_of_x(dtype)) == found.peft_x + found.peft_beyond_x


@both
@pytest.mark.parametrize("name", [*OURS, "heads and biases"])
def test_parameters_gradients_and_moments(name, dtype):
    config = OURS[name](R) if name in OURS else fp.LoraConfig(r=R, bias="all", modules_to_save=["1"])
    config.target_modules = ["0"]
    model, x = net(dtype, 2), rows_of_x(dtype)
    found = fp.estimate(model, config, TOKENS)
    assert found.base == sum(p.nbytes for p in model.parameters())
    fp.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(x).float().sum().backward()
    optimizer.step()
    assert found.adapter == sum(p.nbytes for p in trained)
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    moments = [s[n] for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == sum(m.nbytes for m in moments)


@both
@pytest.mark.parametrize("name", THEIRS)
def test_pefts_trainable_parameters_are_as_large(name, dtype):
    peft = pytest.importorskip("peft")
    config, theirs = pair(name, **targets(2))
    found = fp.estimate(net(dtype, 2), config, TOKENS)
    model = peft.get_peft_model(net(dtype, 2), theirs)
    named = {n: p.nbytes for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}
    assert found.adapter == sum(named.values())


BLOCK = {"lora": 6.1, "lora+dropout": 12.1, "dora": 27.3, "dora+dropout": 48.3}


@pytest.mark.parametrize("name", BLOCK)
def test_a_block_of_three_layers(name):
    """1024 x 1024, 512 tokens, bf16, fp32 adapters, no activation between: every storage packed for backward less the
    parameters, as multiples of one bf16 activation. PEFT's total is the one it is known for, with DoRA's identity and
    B A, which are free again after the forward and not estimated. Each of our layers keeps its x once, DoRA its z: at
    most 1.1, and 2.1, a layer."""
    peft = pytest.importorskip("peft")
    dtype, x = torch.bfloat16, rows_of_x(torch.bfloat16, 1024, 512)
    options = {"r": 16, "lora_alpha": 32, **THEIRS[name], **targets(3)}
    build = lambda: nn.Sequential(*(nn.Linear(1024, 1024, dtype=dtype) for _ in range(3)))  # noqa: E731
    stock = peft.get_peft_model(build(), peft.LoraConfig(**options)).train()
    total = kept(stock, x, alive=False) / x.nbytes
    assert total == pytest.approx(BLOCK[name], abs=0.05)
    found = fp.estimate(build(), fp.LoraConfig(**options), 512, device="cpu")
    assert kept(stock, x) == found.peft_x + found.peft_beyond_x
    limit = 2.1 if "dora" in name else 1.1
    assert kept(fp.accelerate(stock), x, alive=False) / x.nbytes <= 3 * limit < total
    assert kept(fp.get_peft_model(build(), fp.LoraConfig(**options)), x, alive=False) == found.x + found.beyond_x
    assert found.x == 3 * x.nbytes
    for row in found.layers:
        assert (row.x + row.beyond_x) / x.nbytes <= limit


class Branches(nn.Sequential):
    """Layers that read one x, as q, k and v do."""

    def forward(self, x):
        return [layer(x) for layer in self]


@pytest.mark.parametrize("name", BLOCK)
def test_three_layers_that_read_one_x(name):
    """The same three layers side by side: PEFT keeps what it kept, since every copy of x is its layer's own. Ours keep
    x once: at most 1.1 of it in all, and a z for each layer of DoRA."""
    peft = pytest.importorskip("peft")
    x = rows_of_x(torch.bfloat16, 1024, 512)
    options = {"r": 16, "lora_alpha": 32, **THEIRS[name], **targets(3)}
    build = lambda: Branches(*(nn.Linear(1024, 1024, dtype=torch.bfloat16) for _ in range(3)))  # noqa: E731
    stock = peft.get_peft_model(build(), peft.LoraConfig(**options)).train()
    assert kept(stock, x, alive=False) / x.nbytes == pytest.approx(BLOCK[name], abs=0.05)
    limit = 1.1 + 3 * ("dora" in name)
    for ours in (fp.accelerate(stock), fp.get_peft_model(build(), fp.LoraConfig(**options))):
        assert kept(ours, x, alive=False) / x.nbytes <= limit


def test_the_committed_table_of_one_layer():
    """bench/bench_memory.py measures; here the same figures come out of the estimate."""
    pytest.importorskip("peft")
    import bench_memory
    import tables

    committed = {r["method"]: r for r in tables.read(BENCH / "results/cpu/memory.csv") if r["contender"] == "ours"}
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(bench_memory.WIDTH, bench_memory.WIDTH, dtype=torch.bfloat16))
    for name, config in bench_memory.our_configs(bench_memory.R).items():
        config.target_modules = ["0"]
        found = fp.estimate(model, config, bench_memory.TOKENS, device="cpu")
        assert found.beyond_x == int(committed[name]["kept_bytes"]), name


def test_the_committed_table_of_llamas():
    pytest.importorskip("transformers")
    import estimate

    committed = list(csv.DictReader((BENCH / "results/estimate.csv").open()))
    assert committed == estimate.rows()


def snapshot(model):
    return {
        "tensors": {n: (id(t), t._version, t.device) for n, t in model.state_dict(keep_vars=True).items()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
    }


def llama(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        *(lambda name=name: OURS[name](4) for name in OURS),
        lambda: fp.LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["lm_head"]),
        fp.PromptTuningConfig,
        fp.PrefixTuningConfig,
    ],
    ids=[*OURS, "lm_head", "prompt", "prefix"],
)
def test_the_model_stays_as_it_is(config, monkeypatch):
    """No tensor touched, no random number drawn, no factorisation computed; the same figures on the meta device."""
    model, config = llama("cpu"), config()
    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, None)
    if config.target_modules is None and not isinstance(config, (fp.PromptTuningConfig, fp.PrefixTuningConfig)):
        config.target_modules = "all-linear"
    before, random, of_config = snapshot(model), torch.get_rng_state(), repr(config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fp.estimate(model, config, TOKENS)
        assert fp.estimate(llama("meta"), config, TOKENS) == found
        with torch.enable_grad():
            assert fp.estimate(llama("meta").train(), config, TOKENS) == found
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert repr(config) == of_config
    assert found.base == sum(p.nbytes for p in model.parameters())


def test_x_and_the_rest_grow_with_tokens_and_rank():
    model = net(torch.bfloat16)
    small, large = (fp.estimate(model, fp.LoraConfig(r=r, **targets(1)), n) for r, n in ((4, 10), (8, 30)))
    assert (small.x, small.beyond_x) == (10 * K * 2, 10 * 4 * 2)
    assert (large.x, large.beyond_x) == (30 * K * 2, 30 * 8 * 2)
    wide = fp.estimate(model, fp.LoraConfig(r=4, **targets(1)), 10, adapter_dtype=torch.bfloat16)
    assert wide.adapter * 2 == small.adapter
    assert wide.peft_x == small.x


def test_methods_that_peft_lacks():
    for name in ("ssb", "milora", "lora+n", "ia3 (bias apart)", "parallel_adapter"):
        config = OURS[name](R)
        config.target_modules = ["0"]
        found = fp.estimate(net(torch.float32), config, TOKENS)
        assert found.peft_x is None
        assert found.peft_beyond_x is None
        assert found.peft_total is None
        assert all(line.endswith(" -") for line in str(found).splitlines()[1:])


def test_prints_a_table():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 8192, dtype=torch.bfloat16))
    found = fp.estimate(model, fp.LoraConfig(r=16, lora_alpha=32, **targets(1)), 65536)
    assert str(found).splitlines() == [
        "lora, 65536 tokens, 1 layers    fused_peft       HF PEFT",
        "frozen parameters               128.02 MiB    128.02 MiB",
        "trainable parameters              1.00 MiB      1.00 MiB",
        "gradients                         1.00 MiB      1.00 MiB",
        "AdamW moments                     2.00 MiB      2.00 MiB",
        "buffers of the method             0.00 MiB      0.00 MiB",
        "kept for backward: x              1.00 GiB      0.00 MiB",
        "kept for backward: beyond x       2.00 MiB      2.00 GiB",
        "total                             1.13 GiB      2.13 GiB",
    ]
    assert found.total == sum(n for n in astuple(found)[2:9])


def test_bad_calls():
    model, config = net(torch.float32), fp.LoraConfig(r=4, **targets(1))
    for tokens in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=rf"tokens={tokens} must be a positive integer; give batch size times"):
            fp.estimate(model, config, tokens)
    bad = [
        (3, config),
        (model, object()),
        (model, fp.LoraConfig(r=4, target_modules=["9"])),
        (model, fp.PissaConfig(r=N + 1, **targets(1))),
        (model, fp.LoraConfig(r=4)),
        (nn.Sequential(nn.LazyLinear(3)), config),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), config),
        (fp.get_peft_model(net(torch.float32), config), config),
    ]
    for m, c in bad:
        with pytest.raises((ValueError, TypeError)) as want:
            fp.get_peft_model(m, c)
        with pytest.raises(type(want.value)) as got:
            fp.estimate(m, c, TOKENS)
        assert str(got.value) == str(want.value)
