"""The kernel that decodes frozen weights: each bit, against bitsandbytes and value by value; who uses it, and when."""

import subprocess
import sys

import pytest
import torch
from cases import SMALL
from oracle import inputs, layer_results
from test_kernel_mutations import mutated
from test_packed import adapted, quantised_layer, stored
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_peft as fp
from fused_peft.backends import decode as backend
from fused_peft.core import frozen
from fused_peft.core.frozen import Coded
from fused_peft.tools import compile_triton
from fused_peft.tools import stored as judge

pytest.importorskip("triton", reason="Triton runs on Linux")
from fused_peft.backends.kernel_modules import decode, launch, triton_internals

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; a GPU tests itself")
E4M3 = torch.float8_e4m3fn


WEIGHTS = judge.WEIGHTS


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    """No form was tested yet, and the test of one is short."""
    monkeypatch.setattr(backend, "off", {})
    monkeypatch.setattr(judge, "WEIGHTS", WEIGHTS[1:])


def same(got, want):
    """Bit for bit; in bf16 a normal number within one in the last place: the interpreter cuts off what a GPU rounds."""
    right = (got == want) | (got.isnan() & want.isnan())
    if got.dtype == torch.bfloat16:
        right |= want.abs() < torch.finfo(torch.bfloat16).tiny
        right |= (got.view(torch.int16).int() - want.view(torch.int16).int()).abs() <= 1
    return bool(right.all())


# What is decoded


@pytest.mark.parametrize("dtype", decode.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), [((96, 192), 64), ((33, 70), 32), ((7, 10), 128)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_the_bits_are_those_of_bitsandbytes(quant, nested, shape, block, dtype, poison):
    bnb = pytest.importorskip("bitsandbytes")
    q, s = bnb.functional.quantize_4bit(
        torch.randn(shape).to(dtype), blocksize=block, compress_statistics=nested, quant_type=quant
    )
    more = (s.state2.code, s.state2.absmax, s.offset, s.state2.blocksize) if nested else None
    got = decode.decoded(q, s.absmax, shape, block, s.code, nested=more, dtype=dtype)
    assert same(got, bnb.functional.dequantize_4bit(q, s))


def random(*shape, low=0, high=256, dtype=torch.uint8):
    return torch.randint(low, high, shape, dtype=torch.uint8).view(dtype)


def weight(name, N=5, K=26):
    """A weight (N, K) of that form, with random codes and scales."""
    torch.manual_seed(0)
    table, blocks = torch.randn(16), -(-N * K // 8)
    nested = torch.rand(256) - 0.5, torch.rand(-(-blocks // 4)), torch.tensor(0.3), 4
    halves, runs, groups = random((N * K + 1) // 2), torch.rand(blocks), torch.rand(N, -(-K // 8))
    fp8, int8 = random(N, K, dtype=E4M3), random(N, K, dtype=torch.int8)
    fp8.view(torch.uint8)[0, 0] = 0x7F  # NaN
    return {
        "runs": lambda: Coded(halves, runs, (N, K), 8, table),
        "long runs": lambda: Coded(halves, torch.rand(-(-N * K // 512)), (N, K), 512, table),
        "nested": lambda: Coded(halves, random(blocks), (N, K), 8, table, nested=nested),
        "int8": lambda: Coded(int8, torch.rand(N), (N, K), (1, K), by=1 / 127),
        "int8 blocks": lambda: Coded.blocks((int8, torch.rand(2, 4)), "3,7"),
        "int8 zeros": lambda: Coded.blocks((int8, groups, random(*groups.shape, dtype=torch.int8)), "1,8"),
        "fp8 blocks": lambda: Coded.blocks((fp8, torch.rand(3, 2)), "2,16"),
        "fp8 large blocks": lambda: Coded.blocks((fp8, torch.rand(1, 1)), "128,128"),
        "fp8 bf16 scales": lambda: Coded.blocks((fp8, torch.rand(N, 1).bfloat16()), f"1,{K}"),
        "int4 zeros": lambda: Coded(halves, groups, (N, K), (1, 8), torch.arange(16.0), False,
                                    random(*groups.shape, high=16).float()),
        "int4 signed": lambda: Coded(halves, groups, (N, K), (1, 8), (torch.arange(16.0) + 8) % 16 - 8, False),
        "mxfp4": lambda: Coded(halves, random(*groups.shape, high=140), (N, K), (1, 8), table, False),
    }[name]()  # fmt: skip


FORMS = ("runs", "long runs", "nested", "int8", "int8 blocks", "int8 zeros", "fp8 blocks", "fp8 large blocks",
         "fp8 bf16 scales", "int4 zeros", "int4 signed", "mxfp4")  # fmt: skip


def e4m3(byte):
    """The value of a byte, as the format says."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def one_by_one(w, dtype):
    """W, each value from its own code and scale."""
    (N, K), out = w.shape, torch.empty(w.shape, dtype=dtype)
    codes, scales = w.codes.view(torch.uint8).flatten().tolist(), w.scales.flatten()
    for e in range(N * K):
        n, k = divmod(e, K)
        runs = isinstance(w.block, int)
        at = e // w.block if runs else n // w.block[0] * -(-K // w.block[1]) + k // w.block[1]
        if w.table is not None:
            high = (e % 2 == 0) == w.high_first
            value = w.table[codes[e // 2] >> 4 if high else codes[e // 2] & 15]
        else:
            value = torch.tensor(e4m3(codes[e]) if w.codes.dtype == E4M3 else float((codes[e] + 128) % 256 - 128))
        if w.nested is not None:
            table, own, offset, block = w.nested
            scale = table[scales[at].item()] * own[at // block] + offset
        elif w.scales.dtype == torch.uint8:
            scale = torch.tensor(2.0 ** (scales[at].item() - 127))
        else:
            scale = scales[at].float() * w.by
        zero = 0.0 if w.zeros is None else w.zeros.flatten()[at].float()
        out[n, k] = ((value - zero) * scale).to(dtype)
    return out


@pytest.mark.parametrize("name", FORMS)
def test_every_value_as_the_format_says(name, poison):
    for shape in ((5, 26), (3, 7), (1, 1)) if name in ("runs", "nested", "long runs") else ((5, 26),):
        w = weight(name, *shape)
        for dtype in decode.DTYPES:
            got, want = decode.decoded(*w, dtype=dtype), one_by_one(w, dtype)
            assert got.dtype == dtype
            assert got.shape == w.shape
            assert same(got, want), dtype
            assert torch.equal(judge.plainly(w, dtype).nan_to_num(), want.nan_to_num())  # what a GPU tests against


def test_every_byte_of_e4m3_is_pytorchs():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(4, 64)
    got = decode.decoded(codes, torch.ones(1, 1), (4, 64), (4, 64))
    assert same(got, codes.float())
    assert torch.equal(got.nan_to_num().signbit(), codes.float().nan_to_num().signbit())


def test_no_weight_is_no_launch():
    assert decode.decoded(torch.empty(0, 8, dtype=torch.int8), torch.empty(0), (0, 8), (1, 8)).shape == (0, 8)


def test_a_weight_of_more_than_two_to_the_31_values(monkeypatch, tmp_path):
    """Its last tiles alone: of what lies before them no memory is touched."""
    first, rows, last, block = 1 << 19, (1 << 23) + 30, 30, 256
    mutated("decode", "tl.program_id(0)", f"(tl.program_id(0) + {first})", monkeypatch, tmp_path)
    start = lambda kernel, grid, args, *rest: launch.start(  # noqa: E731
        kernel, (grid[0] - first,), {n: args[n] for n in triton_internals.arg_names(kernel)}, *rest
    )
    monkeypatch.setattr(launch, "submit", start)
    codes, scales, table = torch.empty(rows, block, dtype=torch.uint8), torch.empty(rows), torch.randn(16)
    codes[-last:], scales[-last:] = random(last, block), torch.rand(last)
    halves = codes.view(-1)[-rows * block // 2 :]
    for w in (
        Coded(codes.view(torch.int8), scales, (rows, block), (1, block)),
        Coded(halves, scales, (rows, block), block, table),
    ):
        got = backend.kernels().decode.decoded(*w, dtype=torch.float16)[-last:]
        end = w.codes[-last:] if w.table is None else halves[-last * block // 2 :]
        want = w._replace(codes=end, scales=scales[-last:, None], shape=(last, block))
        assert torch.equal(got, judge.plainly(want, torch.float16))


MUTANTS = {  # what the kernel says, what the mutant says, the form that must notice
    "halves swapped": ("tl.interleave(high, low) if HIGH_FIRST", "tl.interleave(low, high) if HIGH_FIRST", "runs"),
    "low half first always": ("else tl.interleave(low, high)", "else tl.interleave(high, low)", "mxfp4"),
    "a neighbour's scale": ("(column // BLOCK_COLUMNS)", "((column + 8) // BLOCK_COLUMNS)", "int8 zeros"),
    "the scale of the row above": ("(n + i) // BLOCK_ROWS)", "(n + i - 1) // BLOCK_ROWS)", "int8"),
    "blocks counted short": ("tl.cdiv(K, BLOCK_COLUMNS)", "(K // BLOCK_COLUMNS)", "int8 blocks"),
    "offset left out": (" + tl.load(offset_ptr)", "", "nested"),
    "second scale left out": ("* own + tl", "+ tl", "nested"),
    "second scale of another block": ("at // BLOCK2", "at // BLOCK2 + 1", "nested"),
    "zero left out": ("value -= ", "value -= 0 * ", "int8 zeros"),
    "zero after the scale": ("value -= _spread(", "value -= 2 * _spread(", "int4 zeros"),
    "factor left out": ("s.to(tl.float32) * by", "s.to(tl.float32)", "int8"),
    "exponent's bias": ("s.to(tl.int32) << 23)", "(s.to(tl.int32) + 1) << 23)", "mxfp4"),
    "smallest exponent": ("tl.where(s == 0, 0x400000", "tl.where(s == 0, 0", "mxfp4"),
    "sign lost": ("| (bits & 0x80) << 24", "", "fp8 blocks"),
    "NaN a number": ("tl.where(low == 0x7F, float(\"nan\"), value)", "value", "fp8 blocks"),
    "last column lost": ("(k + j < K)", "(k + j < K - 1)", "int8"),
    "last row lost": ("(n + i < N)[:, None] & (k + j", "(n + i < N - 1)[:, None] & (k + j", "int8"),
    "last byte lost": ("(elements + 1) // 2 - first", "elements // 2 - first", "ragged"),
    "written past the end": ("inside &= i", "inside |= i", "ragged"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch, tmp_path):
    before, after, form = MUTANTS[name]
    w = weight("runs", 3, 7) if form == "ragged" else weight(form)
    if name == "smallest exponent":
        w.scales[0, 0] = 0
    want = one_by_one(w, torch.float32)

    def right():
        memory = torch.full((w.shape[0] * w.shape[1] + 64,), float("nan"))  # longer than the weight
        with monkeypatch.context() as m:
            m.setattr(torch, "empty", lambda *a, **kw: memory[:-64].view(w.shape))
            got = backend.kernels().decode.decoded(*w)
        return same(got, want) and bool(memory[-64:].isnan().all())

    assert right()
    mutated("decode", before, after, monkeypatch, tmp_path)
    assert not right()


@pytest.mark.parametrize("name", ["runs", "nested", "int8 zeros", "fp8 large blocks", "mxfp4"])
def test_the_self_test_passes_what_is_right(name, monkeypatch):
    monkeypatch.setattr(judge, "WEIGHTS", WEIGHTS)
    assert judge.decoding(weight(name), torch.float16) is None


@pytest.mark.parametrize("at", range(7))
def test_the_self_test_runs_the_machine_code_of_large_weights(at):
    """What is compiled for a weight of a model is what is compiled for the first that is tested."""
    label, w = [*compile_triton.weights(4096, 4096)][at]
    tested = (5, 13) if label == "nf4-ragged" else WEIGHTS[0]
    with launch.record((9, 0)) as found:
        decode.decoded(*w, dtype=torch.float16)
        small = w._replace(shape=tested, codes=w.codes if w.table is not None else w.codes[:160, :544])
        decode.decoded(*small, dtype=torch.float16)
    assert compile_triton._identity(found[0]) == compile_triton._identity(found[1])


@pytest.mark.parametrize("name", [n for n in MUTANTS if n != "written past the end"])
def test_the_self_test_refuses_what_is_wrong(name, monkeypatch, tmp_path):
    before, after, form = MUTANTS[name]
    mutated("decode", before, after, monkeypatch, tmp_path)
    assert "values of a" in judge.decoding(weight("runs" if form == "ragged" else form), torch.float32)


# Who uses it, and when


def parts_of(kind, N=24, K=40):
    if kind == "int8":
        return "bnb8", (random(N, K, dtype=torch.int8), torch.rand(N)), ""
    W = stored(quantised_layer(kind, N=N, K=K))
    name, _, rest = W.spec.partition(":")
    return name, W.parts, rest


@pytest.fixture
def alone(monkeypatch):
    """As without bitsandbytes, whose own kernel comes first."""
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)


@pytest.mark.parametrize("dtype", decode.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["stand-in", "nf4", "fp4+nested", "int8"])
def test_a_format_says_what_its_decoder_does(kind, dtype, monkeypatch, poison):
    name, parts, rest = parts_of(kind)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(backend, "failure", lambda w, dtype: None)
    got = frozen._launched(f"{name}:{rest}", parts, dtype)
    assert same(got, frozen._DECODERS[name](parts, rest, dtype))
    assert [*backend.off.values()] == [None]


def test_other_dtypes_and_layouts_are_pytorchs(alone):
    name, parts, rest = parts_of("stand-in")
    assert frozen._launched(f"{name}:{rest}", parts, torch.float64) is None
    w = weight("int8")
    assert backend.in_one_launch(w._replace(codes=w.codes.t().contiguous().t()), torch.float32) is None
    assert backend.in_one_launch(w._replace(codes=w.codes.int()), torch.float32) is None
    assert backend.in_one_launch(w._replace(scales=w.scales.to(E4M3)), torch.float32) is None
    assert backend.in_one_launch(weight("mxfp4", 2, 3), torch.float32) is None  # a row begins inside a byte
    assert not backend.off


@pytest.mark.parametrize(("K", "block", "whose"), [(40, 64, False), (40, 2048, True), (13, 64, True)])
def test_bitsandbytes_own_kernel_comes_first(K, block, whose, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", torch)
    parts = random(12 * K, 1), torch.rand(-(-24 * K // block)), torch.rand(16)
    assert (frozen._launched(f"bnb4:nf4,{block},0,24,{K}", parts, torch.float32) is not None) == whose


def test_what_fails_its_test_is_off_and_says_so(monkeypatch):
    w = weight("int8")
    monkeypatch.setattr(backend, "failure", lambda w, dtype: asked.append(dtype) or "3 of 74 values")
    asked = []
    with pytest.warns(UserWarning, match=r"is off on cpu, and PyTorch decodes it: 3 of 74 values"):
        assert backend.in_one_launch(w, torch.float16) is None
    assert backend.in_one_launch(weight("int8", 9, 30), torch.float16) is None  # the same form: not asked again
    assert asked == [torch.float16]
    monkeypatch.setattr(backend, "failure", lambda w, dtype: asked.append(w.block))
    assert backend.in_one_launch(w, torch.float16) is None
    for other, dtype in ((w, torch.float32), (weight("int8 blocks"), torch.float16)):
        assert backend.in_one_launch(other, dtype) is not None
    assert asked == [torch.float16, (1, 26), (3, 7)]


def test_what_it_raises_is_a_failure(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(decode, "decoded", broken)
    assert judge.decoding(weight("int8"), torch.float32) == "RuntimeError: no such instruction"


def test_no_test_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(backend, "_capturing", lambda device: True)
    assert backend.in_one_launch(weight("int8"), torch.float32) is None
    assert not backend.off


@pytest.mark.parametrize("kind", ["stand-in", "int8"])
def test_a_layer_trains_to_the_same_bits(kind, monkeypatch):
    base = quantised_layer(kind)
    name, _, _ = stored(base).spec.partition(":")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    layer = adapted(base, fp.LoraConfig(r=4))
    x, dy = (t.float() for t in inputs(SMALL))
    want = layer_results(layer, x, dy)
    launched = []
    monkeypatch.setitem(
        frozen._DECODERS,
        name,
        lambda parts, rest, dtype: launched.append(dtype) or frozen._launched(f"{name}:{rest}", parts, dtype),
    )
    got = layer_results(layer, x, dy)
    assert len(launched) == 2  # one each way
    assert all(torch.equal(got[n], t) for n, t in want.items())


def test_on_paper_it_is_one_launch(alone):
    parts = [t.to("meta") for t in parts_of("int8")[1]]
    with launch.record((9, 0)) as found:
        W = frozen.decode("bnb8", parts, torch.bfloat16)
    assert [each.kernel.fn.__name__ for each in found] == ["decode"]
    assert (W.shape, W.dtype, W.device.type) == ((24, 40), torch.bfloat16, "meta")
    assert not found[0].config.fuse
    assert frozen.decode("bnb8", parts, torch.bfloat16).shape == (24, 40)  # PyTorch's


def test_fake_tensors_are_decoded_by_pytorch(monkeypatch):
    name, parts, rest = parts_of("int8")
    assert frozen._launched(f"{name}:{rest}", parts, torch.float32) is not None
    monkeypatch.setattr(frozen, "in_one_launch", lambda *a: pytest.fail("launched"))
    with FakeTensorMode() as mode:
        assert frozen._launched(f"{name}:{rest}", [*map(mode.from_tensor, parts)], torch.float32) is None
    traced = torch.func.vmap(lambda s: s if frozen._launched(f"{name}:{rest}", parts, torch.float32) is None else None)
    assert traced(torch.ones(2)) is not None


def test_on_a_cpu_triton_is_not_imported():
    code = """
import sys, torch
import fused_peft as fp
from fused_peft.core import frozen
frozen.in_one_launch = lambda *a: 1 / 0
codes = torch.ones(2, 3, dtype=torch.int8)
assert frozen.decode("bnb8", (codes, torch.ones(2)), torch.float32).shape == (2, 3)
assert "fused_peft.kernels.decode" not in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
