"""The roofline model counts what runs: our kernels as recorded, PyTorch's operations as dispatched, on meta tensors."""

import csv
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_peft as fp
from fused_peft.backends.triton import Triton
from fused_peft.tools import compile_triton as aot

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import roofline
from baselines import Shape
from roofline import KERNELS, METHODS, PEFT, RANKS, WIDTHS, predict, schedule

BF16, FP32 = torch.bfloat16, torch.float32
BIG = Shape(8192, 4096, 4096, 16)
FUSED = [m for m in METHODS if m not in ("svdiff", "bitfit")]


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class Dispatched(TorchDispatchMode):
    """Bytes read and written by each operation that moves any; a tensor given twice is read once."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        read = {id(t): t for t in tree_leaves(args[1:] if name == "copy_" else args)}
        if not name.startswith(("empty", "new_empty", "promote")) and not func.is_view and name != "_unsafe_view":
            self.moved.append(nbytes(read.values()) + nbytes(tree_leaves(result)))
        return result


def modelled(who, method, shape):
    """The launches of forward, and those of backward."""
    both, n = schedule(who, method, shape, True), len(schedule(who, method, shape, False))
    return both[:n], both[n:]


def dispatched(layer, shape):
    """Bytes of every operation of forward, and of backward."""
    x = torch.empty(shape.M, shape.K, dtype=BF16, device="meta", requires_grad=True)
    dy = torch.empty(shape.M, shape.N, dtype=BF16, device="meta")
    with Dispatched() as forward:
        y = layer(x)
    with Dispatched() as backward:
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
    return forward.moved, backward.moved


def linear(shape):
    return nn.Linear(shape.K, shape.N, bias=False, dtype=BF16, device="meta")


def test_lora_is_two_launches_forward_and_four_backward():
    assert [len(launches) for launches in modelled("ours", "lora", BIG)] == [2, 4]
    assert [launch.name for launch in schedule("ours", "lora", Shape(16, 4096, 4096, 64), False)] == ["gemm_lowrank"]
    assert len(schedule("ours", "lora", Shape(16, 4096, 4096, 256), False)) == 2


@pytest.mark.parametrize(
    ("who", "method", "backward", "square", "wide"),
    [
        ("ours", "lora", False, 1.049, 1.017),
        ("eager", "lora", False, 1.135, 1.10),
        ("peft", "lora", False, 1.31, 1.28),
        ("ours", "lora", True, 1.071, 1.038),
        ("eager", "lora", True, 1.18, 1.115),
        ("peft", "lora", True, 1.36, 1.26),
        ("ours", "dora", True, 1.127, 1.094),
    ],
)
def test_figures_of_the_design(who, method, backward, square, wide):
    assert predict(who, method, BIG, backward) == pytest.approx(square, abs=0.05)
    assert predict(who, method, Shape(8192, 4096, 14336, 16), backward) == pytest.approx(wide, abs=0.05)


@pytest.mark.parametrize("method", [m for m in FUSED if m != "liera"])
def test_ours_is_never_above_eager_on_many_rows(method):
    for (K, N), r, backward in product(WIDTHS, RANKS, (False, True)):
        shape = Shape(8192, K, N, r)
        assert predict("ours", method, shape, backward) <= predict("eager", method, shape, backward), (shape, backward)


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("shape", [BIG, Shape(1024, 4096, 14336, 64), Shape(16, 4096, 4096, 16)], ids=str)
def test_kernels_are_those_the_backend_starts(method, shape):
    names, options = METHODS[method]
    o = aot._operands(shape.M, shape.K, shape.N, shape.r, BF16, FP32, f"w {names}", **options)
    recorded = list(aot._recorded(Triton(), o, (9, 0)))
    for phase, launches in zip(("forward", "backward"), modelled("ours", method, shape), strict=True):
        started = []
        for launch in (launch for found, launch in recorded if found == phase):
            args = dict(launch.args)
            if not args.get("PRODUCT0", True) and not args["USUM"]:
                args["d0_ptr"] = None  # given, not read
            moved = nbytes(getattr(value, "base", value) for value in args.values())
            started.append((launch.kernel.__name__.removesuffix("_tma"), moved))
        ours = [(x.name, x.bytes_read + x.bytes_written) for x in launches if x.name in KERNELS]
        assert sorted(ours) == sorted(started)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "parallel_adapter"])  # no config has only its bias a
def test_eager_moves_the_bytes_that_are_dispatched(method):
    name, _, dropout = method.partition("_")
    config = fp.methods.METHODS[name].example(BIG.r)
    if dropout:
        config.lora_dropout = 0.1
    layer = fp.PeftLinear.from_linear(linear(BIG), config)
    for launches, moved in zip(modelled("eager", method, BIG), dispatched(layer, BIG), strict=True):
        assert len(launches) == len(moved)
        assert sum(x.bytes_read + x.bytes_written for x in launches) == pytest.approx(sum(moved), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [m for m in PEFT if "dropout" not in m])  # one launch on a GPU only
def test_hf_peft_moves_the_bytes_that_are_dispatched(method):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=BIG.r),
        "dora": lambda: peft.LoraConfig(r=BIG.r, use_dora=True),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[]),
        "liera": lambda: peft.HiraConfig(r=BIG.r),
    }[method]()
    config.target_modules = {"0"}
    model = peft.get_peft_model(nn.Sequential(linear(BIG)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(device="meta", dtype=BF16)
    for launches, moved in zip(modelled("peft", method, BIG), dispatched(layer, BIG), strict=True):
        assert len(launches) == len(moved)
        assert sum(x.bytes_read + x.bytes_written for x in launches) == pytest.approx(sum(moved), rel=1e-4)


def test_what_hf_peft_lacks_is_named():
    with pytest.raises(ValueError, match="ssb"):
        schedule("peft", "ssb", BIG, False)
    with pytest.raises(ValueError, match="nobody"):
        schedule("nobody", "lora", BIG, False)


def test_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "roofline.csv"
    monkeypatch.setattr(roofline, "ROWS", (8192,))
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--launch-us", "2", "--out", str(out)])
    roofline.main()
    rows = list(csv.DictReader(out.open()))
    assert {r["method"] for r in rows} == set(METHODS)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
