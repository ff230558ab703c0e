"""Models with quantised layers: merging into plain ones, saving and loading, estimates, experts in 4 bits."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, SMALL
from test_estimate import kept
from test_packed import FEW, dense, equal, quantised_layer, stored
from torch import nn

import fused_peft as fp
from fused_peft.core import frozen
from fused_peft.methods import METHODS
from fused_peft.model import plain

N, K = SMALL.N, SMALL.K
HIDDEN = 24


def case_of(name):
    return next(c for c in CASES if c.name == name)


class Net(nn.Module):
    """An adapted layer, one without an adapter, and one whose base is dense."""

    def __init__(self, kind, dtype=torch.float32, compute_dtype=torch.float32):
        super().__init__()
        self.first = quantised_layer(kind, HIDDEN, K, dtype=dtype, compute_dtype=compute_dtype)
        self.middle = quantised_layer(kind, HIDDEN, HIDDEN, bias=False, dtype=dtype, compute_dtype=compute_dtype)
        self.last = nn.Linear(HIDDEN, N, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class PlainNet(Net):
    """The same on decoded weights, of which the forward of the stand-in is one."""

    def __init__(self, net, dtype=torch.float32):
        nn.Module.__init__(self)
        for name, layer in net.named_children():
            setattr(self, name, dense(layer, dtype) if isinstance(_kind(layer), frozen.Frozen) else layer)


def _kind(layer):
    kind = frozen.kind_of(layer)
    return kind if isinstance(kind, frozen.Frozen) and kind.packed else None


def _spec(layer):
    W = layer.kind.matrix(layer) if hasattr(layer, "kind") else stored(layer)
    return W.spec, W.parts


def disturb(model):
    with torch.no_grad():
        torch.manual_seed(4)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def config_for(case, *names):
    config = case.make(SMALL.r)
    config.target_modules = list(names)
    return config


THEIR_OWN = ["nf4+nested", "int8"]  # which compute on a CPU by themselves as well
MERGEABLE = [c for c in CASES if METHODS[c.method].output is None and "+n" not in c.name and "adapter" not in c.name]


# Merging


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("case", MERGEABLE, ids=lambda c: c.name)
def test_plain_layers_hold_the_decoded_weight_and_the_update(case, kind):
    """Every method, against merging it into a dense model on the decoded weights."""
    if case.method == "diff_pruning" and kind == "int8":
        return  # whose name for a buffer the layer has taken: test_packed
    net = Net(kind)
    want = fp.get_peft_model(PlainNet(net), config_for(case, "first", "last"))
    got = disturb(fp.get_peft_model(net, config_for(case, "first", "last")))
    for name in ("first", "last"):
        for key in (*(layer := getattr(got, name)).tensor_names, *layer.buffer_names):
            getattr(getattr(want, name), key).data.copy_(getattr(layer, key).data)
    if case.method == "bitfit":
        want.first.bias.data.copy_(got.first.bias.data)
    got, want = (fp.merge_and_unload(m, dequantize=True) for m in (got, want))
    assert [type(m) for m in got.children()] == [nn.Linear] * 3
    assert not any(p.requires_grad for n, p in got.named_parameters())
    equal(dict(got.state_dict()), dict(want.state_dict()), 1e-6)
    assert torch.equal(got.middle.weight, dense(Net(kind).middle, torch.float32).weight)


def test_a_mutant_without_the_update_is_seen(monkeypatch):
    own = plain._linear
    monkeypatch.setattr(plain, "_linear", lambda m, W, bias: own(m, frozen.decode(*_spec(m), W.dtype), bias))
    with pytest.raises(AssertionError):
        test_plain_layers_hold_the_decoded_weight_and_the_update(case_of("lora"), "nf4+nested")


@pytest.mark.parametrize("kind", FEW)
def test_the_output_stays_and_nothing_else_changes(kind):
    """Hooks, modes and the bias of a layer; the dtype is the one that it computes in."""
    dtype = torch.bfloat16
    net = Net(kind, dtype, compute_dtype=dtype)
    net.first.eval()
    seen, x = [], torch.randn(5, K, dtype=dtype)
    net.first.register_forward_hook(lambda m, args, y: seen.append(y))
    model = disturb(fp.get_peft_model(net, fp.LoraConfig(r=3, target_modules=["first"])))
    y = model.first(x).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one dtype everywhere: nothing to warn of
        assert fp.merge_and_unload(model, dequantize=True) is net
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert not net.first.training
    assert net.middle.training
    assert (net.first(x).float() - y).norm() <= 1e-2 * y.norm()
    assert len(seen) == 2
    assert set(net.state_dict()) == {"first.weight", "first.bias", "middle.weight", "last.weight", "last.bias"}
    net.to(torch.float32).load_state_dict({n: t.float() for n, t in net.state_dict().items()})


def test_other_dtypes_are_told_of():
    model = fp.get_peft_model(
        Net("stand-in", torch.float32, torch.bfloat16), fp.LoraConfig(r=2, target_modules=["first"])
    )
    with pytest.warns(
        UserWarning, match=r"layers are in torch.bfloat16, .* torch.float32; .* model.to\(torch.bfloat16\)"
    ):
        fp.merge_and_unload(model, dequantize=True)
    assert model.first.weight.dtype == torch.bfloat16
    model = fp.get_peft_model(Net("int8", torch.bfloat16), fp.LoraConfig(r=2, target_modules=["first"]))
    fp.merge_and_unload(model, dequantize=True)  # has no dtype of its own: the model's
    assert model.first.weight.dtype == torch.bfloat16


def test_a_dense_model_is_as_without():
    models = []
    for how in ({}, {"dequantize": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
        models.append(disturb(fp.get_peft_model(model, fp.DoraConfig(r=2, target_modules=["0"]))))
        weight = model[0].weight
        assert fp.merge_and_unload(model, **how)[0].weight is weight
    equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("kind", FEW)
def test_a_merge_into_its_own_format_names_what_it_loses_and_the_cure(kind):
    model = disturb(fp.get_peft_model(Net(kind), fp.LoraConfig(r=2, target_modules=["first"])))
    before = copy.deepcopy(model.state_dict())
    figure = {"int8": "an error of 25 to 94 %", "fp8 4 5": "loses much"}.get(kind, r"keeps 1 to 4 % \(nf4\)")
    for merge in (fp.merge, fp.merge_and_unload):
        with pytest.raises(fp.NotMergeableError, match=rf"first: .*{figure}.*dequantize=True\) makes plain layers"):
            merge(model)
    equal(dict(model.state_dict()), dict(before))


def surviving(kind, size):
    """(what of an update of that norm, W's being 1, is there along itself after quantising anew, its error)"""
    functional = pytest.importorskip("bitsandbytes").functional
    random = torch.Generator().manual_seed(0)

    def rounded(W):
        if kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(W.half())
            return codes * scales[:, None] / 127
        return functional.dequantize_4bit(*functional.quantize_4bit(W, quant_type=kind)).float()

    W = rounded(torch.randn(512, 512, generator=random))
    U = torch.randn(512, 16, generator=random) @ torch.randn(16, 512, generator=random)
    U *= size * W.norm() / U.norm()
    change = rounded(W + U) - W
    return (change * U).sum() / U.square().sum(), (change - U).norm() / U.norm()


def test_the_figures_in_that_message():
    for kind, least, most in (("nf4", 0.01, 0.04), ("fp4", 0.09, 0.14)):
        kept = [surviving(kind, size)[0] for size in (0.01, 0.03)]
        assert all(least - 0.005 < k < most + 0.005 for k in kept), (kind, kept)
    errors = [surviving("int8", size)[1] for size in (0.01, 0.03)]
    assert all(0.24 < e < 0.95 for e in errors), errors


@pytest.mark.parametrize("kind", FEW)
def test_a_broken_adapter_and_one_without_a_weight(kind):
    """safe_merge and methods without a merged weight: refused before anything changes."""
    model = fp.get_peft_model(Net(kind), fp.LoraConfig(r=2, target_modules=["first", "last"]))
    with torch.no_grad():
        model.first.lora_B.fill_(float("nan"))
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="merged weight has NaN"):
        fp.merge_and_unload(model, safe_merge=True, dequantize=True)
    assert [type(m) for m in model.modules()] == before
    assert not model.last.merged
    behind = fp.BottleneckConfig(r=2, target_modules=["first"])
    with pytest.raises(fp.NotMergeableError, match="non-linearity behind"):
        fp.merge_and_unload(fp.get_peft_model(Net(kind), behind), dequantize=True)


def _repacked(net):
    net.middle.quant_state.packing_format_for_cpu = True


def _embedding(net):
    net.more = nn.Module()
    net.more.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def _of_another_library(net):
    net.more = nn.Linear(4, 4)
    net.more.forward = lambda x: x
    net.more.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_repacked, r"middle \(bitsandbytes repacked its weight"),
        (_embedding, r"more \(Module holds torch.int8, which is not decoded\)"),
        (_of_another_library, r"more \(Linear holds torch.int32"),
    ],
)
def test_what_would_stay_quantised_is_named(spoil, reason):
    model = fp.get_peft_model(Net("stand-in"), fp.LoraConfig(r=2, target_modules=["first"]))
    spoil(model)
    before = [type(m) for m in model.modules()]
    with pytest.raises(fp.NotMergeableError, match=f"would leave parts of the model quantised: {reason}"):
        fp.merge_and_unload(model, dequantize=True)
    assert [type(m) for m in model.modules()] == before


def test_a_layer_repacked_since_is_named():
    model = fp.get_peft_model(Net("stand-in"), fp.LoraConfig(r=2, target_modules=["first"]))
    model.first.quant_state.packing_format_for_cpu = True
    with pytest.raises(fp.NotMergeableError, match=r"first: .*bitsandbytes repacked its weight"):
        fp.merge_and_unload(model, dequantize=True)


@pytest.mark.parametrize("kind", THEIR_OWN)
@pytest.mark.parametrize("names", [["first"], ["last"]])
def test_layers_behind_accelerates_hooks(kind, names):
    """As device_map puts them: the adapter acts beside the layer's own product."""
    hooks = pytest.importorskip("accelerate.hooks")
    net = Net(kind)
    for layer in (net.first, net.middle):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    model = disturb(fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=names)))
    x = torch.randn(5, K)
    y = model(x)
    fp.merge_and_unload(model, dequantize=True)
    assert [type(m) for m in net.children()] == [nn.Linear] * 3
    assert isinstance(net.first._hf_hook, hooks.AlignDevicesHook)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk, unquantised."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def llama(folder, kind="nf4"):
    import transformers

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    how = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_transformers_model_is_unquantised_afterwards(kind, folder, tmp_path):
    model, ids = llama(folder, kind), torch.arange(10)[None]
    fp.get_peft_model(model, fp.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    y = model.train()(ids).logits.float()
    fp.merge_and_unload(model, dequantize=True)
    assert not [m for m in model.modules() if "bitsandbytes" in type(m).__module__]
    assert (model(ids).logits.float() - y).norm() <= 1e-2 * y.norm()
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
    assert not any(hasattr(model, mark) for mark in marks)
    assert not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()
    model.to(torch.float32).half()  # each refused of a quantised model
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    equal(dict(back.state_dict()), dict(model.state_dict()))
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"]))  # an ordinary model again
    fp.merge(model)


# Saving and loading


def trained(case, kind, dtype=torch.float64):
    torch.manual_seed(1)
    model = disturb(fp.get_peft_model(Net(kind, dtype, dtype), config_for(case, "first", "middle")))
    fp.on_step(model, 100)
    return model.eval()


def outputs(model, dtype=torch.float64):
    return model(torch.randn(5, K, dtype=dtype, generator=torch.Generator().manual_seed(6)))


def taken(case, kind):
    """Whether the quantiser's layer has the name of a buffer of the method's, which test_packed shows to be refused."""
    return case.method == "diff_pruning" and kind == "int8"


ALL = pytest.mark.parametrize(("kind", "case"), [
    pytest.param(kind, case, id=f"{case.name}-{kind}") for kind in FEW for case in CASES if not taken(case, kind)
])  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of what another reader of the file would make of it
@ALL
def test_an_adapter_comes_back_on_a_freshly_quantised_base(case, kind, tmp_path):
    model = trained(case, kind)
    want = outputs(model)
    fp.save_pretrained(model, tmp_path)
    torch.manual_seed(99)
    again = fp.load_adapter(Net(kind, torch.float64, torch.float64), tmp_path).eval()
    assert again.first.method is METHODS[case.method]
    assert torch.equal(outputs(again), want)


@ALL
def test_a_state_dict_holds_the_quantisers_own_tensors(case, kind):
    """Key for key and bit for bit, the adapters' beside them; and gives the model back where the quantiser's does."""
    base, model = Net(kind, torch.float64, torch.float64), trained(case, kind)
    own, held = base.state_dict(), model.state_dict()
    layers = ("first", "middle")
    beside = {f"{n}.{t}" for n in layers for t in (*getattr(model, n).tensor_names, *getattr(model, n).buffer_names)}
    assert held.keys() == own.keys() | beside
    for name, t in own.items():
        assert torch.equal(held[name], t) or (case.method == "bitfit" and name.endswith("bias")), name
    torch.manual_seed(99)
    fresh = fp.get_peft_model(Net(kind, torch.float64, torch.float64), config_for(case, *layers)).eval()
    unknown = base.load_state_dict(own, strict=False).unexpected_keys  # bitsandbytes reads no scales of 4-bit layers
    found = fresh.load_state_dict(held, strict=False)
    assert not found.missing_keys
    assert set(found.unexpected_keys) == set(unknown)
    fp.on_step(fresh, 100)
    assert torch.equal(outputs(fresh), outputs(model))


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", ["pissa", "milora", "spectral_adapter", "lora_xs", "dora", "svdiff"])
def test_what_starts_from_the_weight_is_no_change_at_first(name, kind):
    """Made from the decoded values, for which W - start + start is W again."""
    base = Net(kind, torch.float64, torch.float64).eval()
    want = outputs(PlainNet(base, torch.float64))
    model = fp.get_peft_model(base, config_for(case_of(name), "first", "middle"))
    torch.testing.assert_close(outputs(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FEW[:2])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_singular_values_are_factored_by_the_dtype_that_is_computed_in(kind, compute):
    """Not by that of the codes: in half precision the weight is formed, which rounds once."""
    layer = fp.get_peft_model(Net(kind, compute, compute), fp.SVDiffConfig(target_modules=["first"])).first
    assert layer.forms_weight(1) == (compute == torch.bfloat16)


# Bytes


def parts_of(model):
    """The tensors that the quantised layers are stored in."""
    kinds = ((m, _kind(m) if not hasattr(m, "kind") else m.kind) for m in model.modules())
    return [t for m, kind in kinds if kind is not None and kind.packed for t in kind.matrix(m).parts]


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", ["lora", "dora+dropout", "svdiff", "houlsby"])
def test_estimated_bytes_in_half_precision(name, kind):
    check_estimate(case_of(name), kind, torch.bfloat16)


@ALL
def test_estimated_bytes(case, kind):
    check_estimate(case, kind, torch.float32)


def check_estimate(case, kind, dtype):
    """Bytes are those counted, of the model and the backward; x in a dtype of its own, 4-bit layers in bf16."""
    net, config = Net(kind, dtype, torch.bfloat16), config_for(case, "first")
    found = fp.estimate(net, config, 24)
    assert found.base == storages([*net.parameters(), *parts_of(net)])
    assert found.decoded == HIDDEN * K * (dtype.itemsize if kind in ("int8", "fp8 4 5") else 2)
    model = fp.get_peft_model(net, config)
    assert found.adapter == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found.buffers == sum(getattr(model.first, name).nbytes for name in model.first.buffer_names)
    x = torch.randn(24, K, dtype=dtype, requires_grad=True)
    assert found.x + found.beyond_x == kept(model.first, x, parts=parts_of(model))
    assert found.x in (0, x.nbytes)


def test_the_decoded_weight_is_in_the_table_and_no_part_of_the_total():
    found = [
        fp.estimate(net, fp.LoraConfig(r=2, target_modules=["first"]), 24)
        for net in (Net("stand-in"), PlainNet(Net("stand-in")))
    ]
    assert "for a moment: a decoded weight" in str(found[0])
    assert "a decoded weight" not in str(found[1])
    assert found[1].decoded == 0
    assert found[0].total - found[0].base == found[1].total - found[1].base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", THEIR_OWN)
@pytest.mark.parametrize("name", ["lora", "lora+dropout"])
def test_what_pefts_layers_keep(name, kind, dtype):
    peft = pytest.importorskip("peft")
    net, config = Net(kind, dtype, dtype), config_for(case_of(name), "first")
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "int8", kind != "int8"
    found = fp.estimate(net, config, 24, device="cpu")
    theirs = peft.LoraConfig(r=config.r, lora_dropout=config.lora_dropout, target_modules=["first"])
    model = peft.get_peft_model(net, theirs).train()
    x = torch.randn(24, K, dtype=dtype, requires_grad=True)
    layer = model.base_model.model.first
    own = [t for m in (layer.base_layer,) for t in stored(m).parts]
    assert found.peft_x + found.peft_beyond_x == kept(layer, x, parts=own)
    assert fp.estimate(Net(kind), fp.DoraConfig(r=2, target_modules=["first"]), 24).peft_x is None


def test_a_model_that_is_quantised_in_a_way_of_its_own_is_still_refused():
    from test_packed import Linear4bit

    class Other(Linear4bit):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"whose weight is stored as torch.uint8, and estimate does not know"):
        fp.estimate(nn.Sequential(Other(4, 4)), fp.LoraConfig(r=2, target_modules=["0"]), 8)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_that_were_cast_are_refused(storage):
    """As .to(dtype) does of codes that are stored as floating numbers, and mixed precision; bitsandbytes reads on."""
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage).to("cpu"))
    model = fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(2, 64))
    for dtype in (torch.float16, torch.float64):
        cast = copy.deepcopy(model).to(dtype)
        with pytest.raises(RuntimeError, match=rf"its codes were cast to {dtype}, which loses them"):
            cast(torch.randn(2, 64))


# Experts in 4 bits


def experts_model():
    """Experts by Transformers' contract behind a fixed choice of two of four."""
    pytest.importorskip("transformers")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
            self.experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, experts_implementation="eager"))
            for p in self.experts.parameters():
                nn.init.normal_(p, std=0.3)

        def forward(self, x):
            chosen = torch.stack([x[:, :2].sum(1) > 0, x[:, 2:].sum(1) > 0], 1).long() + torch.tensor([0, 2])
            return self.experts(x, chosen, x[:, :2].detach().sigmoid())

    return Routed()


def in_4_bits(model, *names):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    for name in names:
        parametrize.replace_parameter_4bit(model.experts, name, quant_type="nf4")
    return model


STACKS = ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("more", [[], ["q_proj"]], ids=["alone", "beside a layer"])
def test_parametrized_experts_are_refused_with_the_reason(more):
    model = nn.ModuleDict({"moe": in_4_bits(experts_model(), *STACKS), "q_proj": nn.Linear(32, 32)})
    keys = set(model.state_dict())
    config = fp.LoraConfig(r=2, target_modules=more, target_parameters=STACKS)
    reason = r"matches 'moe.experts.*_proj', but it is parametrized \(Bnb4bitParametrization\).*keep it out of the"
    with pytest.raises(TypeError, match=reason):
        fp.get_peft_model(model, config)
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=reason):
        fp.add_adapter(model, "other", config)
    fp.merge_and_unload(model)
    assert set(model.state_dict()) == keys
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(fp.NotMergeableError, match=r"gate_up_proj \(ParametrizationList holds torch.uint8"):
        fp.merge_and_unload(model, dequantize=True)


def test_a_stack_beside_a_parametrized_one_is_formed():
    """On the decoded values, as the module's own forward reads them."""
    model = in_4_bits(experts_model(), "down_proj")
    other = experts_model()
    other.experts.down_proj.data.copy_(model.experts.down_proj)
    config = fp.LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"], init_lora_weights=False)
    results = []
    for m in (model, other):
        torch.manual_seed(5)
        disturb(fp.get_peft_model(m, config))
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (y := m(x)).square().sum().backward()
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **grads})
    equal(*results, 1e-5)
    (row,) = fp.explain(model)
    assert row.form == "weight"
    assert "the weights of its experts are parametrized" in row.why


def test_accelerate_leaves_parametrized_experts_to_peft():
    """PEFT finds no such parameter; it may have wrapped them before they were quantised."""
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": [], "init_lora_weights": False}
    with pytest.raises(ValueError, match=r"no `target_parameters` found"):
        peft.get_peft_model(in_4_bits(experts_model(), *STACKS), peft.LoraConfig(**config, target_parameters=STACKS))
    model = peft.get_peft_model(experts_model(), peft.LoraConfig(**config, target_parameters=["gate_up_proj"]))
    wrapped = model.base_model.model.experts
    in_4_bits(SimpleNamespace(experts=wrapped.base_layer), "down_proj")
    x = torch.randn(6, 32)
    want = model(x)
    with pytest.warns(UserWarning, match=r"keep PEFT's forward.*the weights of its experts are parametrized"):
        fp.accelerate(model)
    assert torch.equal(model(x), want)


class Mxfp4GptOssExperts(nn.Module):
    """A stand-in of Transformers': two values a byte, or, once loaded on a GPU, its kernels' own tensors."""

    def __init__(self, loaded):
        super().__init__()
        self.num_experts = 4
        for name, N, K in (("gate_up_proj", 64, 16), ("down_proj", 32, 16)):
            codes = nn.Parameter(torch.zeros(4, N, K, dtype=torch.uint8), requires_grad=False)
            setattr(self, name, object() if loaded else codes)
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(4, N)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


@pytest.mark.parametrize("loaded", [False, True])
def test_mxfp4_experts_are_refused_with_the_reason(loaded):
    model = nn.ModuleDict({"experts": Mxfp4GptOssExperts(loaded), "q_proj": nn.Linear(32, 32)})
    what = (
        "it is a object and no parameter" if loaded else "it is a Parameter of torch.uint8, and values in a quantised"
    )
    with pytest.raises(TypeError, match=f"matches 'experts.*_proj', but {what}"):
        fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKS))
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"]))
    fp.merge(model)


def test_explain_shows_the_format_and_its_size_whatever_the_form():
    """Codes of 4 bits, an fp32 scale a block of 64; nested, a byte; 16 values in the table."""
    shown = {}
    for kind, config in (("nf4", fp.LoraConfig(r=2)), ("nf4+nested", fp.SVDiffConfig()), ("int8", fp.DoraConfig(r=2))):
        model = nn.Sequential(quantised_layer(kind, 256, 256, dtype=torch.bfloat16, compute_dtype=torch.bfloat16))
        config.target_modules = ["0"]
        (shown[kind],) = fp.explain(fp.get_peft_model(model, config))
    assert shown["nf4"].why.startswith("nf4 with a scale for 64 values (4.51 bits a value in all), decoded once each")
    assert shown["nf4+nested"].form == "weight"
    nested = (8 * (256 * 128 + 1024 + 4 * (16 + 256 + 4 + 1))) / 256**2
    assert f"nf4 with a scale for 64 values ({nested:.3g} bits a value in all)" in shown["nf4+nested"].why
    assert "int8 with a scale a row (8.12 bits a value in all), decoded once each way" in shown["int8"].why
    fp.add_adapter(model, "other", fp.LoraConfig(r=2, target_modules=["0"]))
    fp.set_adapter(model, ["default", "other"])
    assert "int8 with a scale a row (8.12 bits" in fp.explain(model)[0].why
