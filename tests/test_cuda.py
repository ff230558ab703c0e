"""csrc/ without a GPU: its index arithmetic exhaustively, every plan in the emulator, mutants, the build, the choice.

The emulator runs blocks, warps and whatever is asynchronous in an order drawn from a seed, with shared memory and
results full of NaN at first: what is read too early, or never written, is a wrong number.
"""

import ctypes
import re
import shutil
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, Shape
from oracle import distinct
from plans import DTYPES, Gemm, clusters
from torch.utils import cpp_extension

import fused_peft as fp
from fused_peft.__main__ import main
from fused_peft.backends import built, cuda, emulation, extension, plans
from fused_peft.backends.plans import PLANS, Plan
from fused_peft.backends.triton import kernels
from fused_peft.core import dispatch, operands, records
from fused_peft.tools import compile_csrc, verify

ROOT = Path(__file__).resolve().parent.parent
CSRC = fp.source_dir("csrc")
CUTLASS = ROOT / ".venv/cutlass/cutlass_library/source/include"
TOOLKIT = compile_csrc.toolkit() / "include" if compile_csrc.nvcc() else Path("none")

pytest.importorskip("triton", reason="Triton runs on Linux")
compiles = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

emulated = pytest.mark.skipif(
    torch.cuda.is_available() or not shutil.which("g++"), reason="for the emulator, which needs a C++ compiler"
)


def _program(tmp_path, source, *include):
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-w",
        "-pthread",
        *(f"-I{i}" for i in (CSRC, *include)),
        source,
        "-o",
        tmp_path / "program",
    ]
    subprocess.run(command, check=True)
    return subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=False)


@compiles
def test_index_arithmetic_exhaustively(tmp_path):
    done = _program(tmp_path, ROOT / "tests/schedule_test.cpp")
    assert done.returncode == 0, done.stdout


@compiles
def test_who_shares_counters_and_flags(tmp_path):
    done = _program(tmp_path, ROOT / "tests/zeros_test.cpp")
    assert done.returncode == 0, done.stdout


@compiles
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stream.capturing ? fresh : of_streams", "false ? fresh : of_streams"),
        ("{stream.device, stream.id}", "{stream.device, 0}"),
        ("{stream.device, stream.id}", "{0, stream.id}"),
        ("chunk = {chunk.data + whole,", "chunk = {chunk.data,"),
        ("mine.words < words", "!mine.words"),
    ],
)
def test_wrong_ways_to_share_them_are_noticed(old, new, tmp_path):
    text = (CSRC / "zeros.cuh").read_text()
    assert text.count(old) == 1
    (tmp_path / "zeros.cuh").write_text(text.replace(old, new))
    (tmp_path / "zeros_test.cpp").write_text((ROOT / "tests/zeros_test.cpp").read_text())
    assert _program(tmp_path, tmp_path / "zeros_test.cpp").returncode


@pytest.mark.skipif(
    not CUTLASS.is_dir() or not (TOOLKIT / "cccl").is_dir(), reason="needs CUTLASS's and CUDA's headers"
)
def test_layouts_are_those_of_cutlass(tmp_path):
    done = _program(tmp_path, ROOT / "tests/layout_test.cpp", CUTLASS, TOOLKIT, TOOLKIT / "cccl")
    assert done.returncode == 0, done.stdout


# Every plan, emulated


@emulated
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
def test_every_plan(plan):
    R = plan.inner or 24
    for i, cluster in enumerate(clusters(plan)):
        # edges in every direction; tiles and stages enough that rings, panels and flags are used again
        odd = Gemm(plan, plan.BM * 2 + 72, plan.BN + 40, 5 * 64 + 8, R, seed=i)
        assert not odd.disagreement(cluster=cluster, order=i, processors=2 + 2 * i)
    even = Gemm(plan, plan.BM, plan.BN, 64, 8, vectors=DTYPES[plan.dtype])
    assert not even.disagreement(inside=False)


FEW = [p for p in PLANS if (p.dtype, p.BM, p.BN) == ("bf16", 128, 192)]


@emulated
@pytest.mark.parametrize("plan", FEW, ids=lambda p: p.name)
def test_options(plan):
    gemm = Gemm(plan, 70, 200, 136, {16: 8, 32: 24}.get(plan.inner, 40), vectors=torch.float16)
    for options in ({"vectors": False}, {"want": ("y",)}, {"want": ("z",)}, {"inside": False, "group": 1}):
        assert not gemm.disagreement(**options)
    if plan.form in ("LATE", "SCALED"):
        no_rank = Gemm(plan, 70, 200, 136, 0)
        assert not no_rank.disagreement()


@emulated
@pytest.mark.parametrize("plan", FEW, ids=lambda p: p.name)
def test_any_order_of_events_gives_the_same_bits(plan):
    gemm = Gemm(plan, 300, 400, 6 * 64, 16)
    first = gemm.run(order=0, cluster=(2, 1))
    for order in range(1, 5):
        again = gemm.run(order=order, cluster=(2, 1), processors=2 + order % 3 * 2)
        assert all(torch.equal(first[name], again[name]) for name in first)


@emulated
def test_rows_of_a_larger_tensor_and_what_lies_around_it():
    gemm = Gemm(FEW[0], 130, 200, 72, 8)
    padded = lambda t: torch.full((t.shape[0] + 3, t.shape[1] + 24), torch.nan, dtype=t.dtype)  # noqa: E731
    for name in ("x", "w", "s", "b"):
        t = getattr(gemm, name)
        inside = padded(t)[: t.shape[0], 8 : 8 + t.shape[1]]
        setattr(gemm, name, inside.copy_(t))
    assert not gemm.disagreement()


# Mutants: each must turn a comparison red

MUTANTS = {  # what is wrong: file, old, new, form
    "a stage is released while products read it": (
        "gemm", "products_wait<1>();  // the stage before", "products_wait<3>();", "LATE",
    ),
    "the producer does not wait for the release": ("gemm", "slot.phase ^ 1", "slot.phase", "LATE"),
    "accumulators are read while products run": (
        "gemm", "products_wait<0>();\n    if (stage", "products_wait<4>();\n    if (stage", "LATE",
    ),
    "the last columns of the rank are left out": (
        "schedule", "return ceil_div(left < DEPTH ? left : DEPTH, STEP)", "return left / STEP", "LATE",
    ),
    "the first product adds to what was there": ("gemm", "!first || k || step);\n            if", "1); if", "LATE"),
    "d_out is left out": ("gemm", "z(i) * by[i / 4 * 2 + i % 2]", "z(i)", "LATE"),
    "the bias twice": ("gemm", "acc[block][from + i] + (p.bias", "acc[block][from + i] + 2 * (p.bias", "LATE"),
    "multicast reaches one block only": ("gemm", "column, row, 3);", "column, row, 1);", "LATE"),
    "releases of the neighbour are not counted": ("gemm", "4 * CONSUMERS * p.schedule.size()", "4 * CONSUMERS", "LATE"),
    "offsets of the transposed operand exchanged": (
        "schedule", "* ROW, DEPTH * ROW, ATOM", "* ROW, ATOM, DEPTH * ROW", "MASKED",
    ),
    "one mask for two elements": ("gemm", "kept(bits, 1, p.threshold)", "kept(bits, 0, p.threshold)", "MASKED"),
    "the mask is ignored": ("gemm", "      mask();\n", "", "MASKED"),
    "the mask also hits the main pair": (
        "gemm", "mask();\n      finish(main_pair<false>(false, inner));",
        "finish(main_pair<false>(false, inner)); mask();",
        "MASKED",
    ),
    "registers change while a product reads them": ("gemm", "left[step % 2]", "left[0]", "SCALED"),
    "x is not scaled": ("gemm", "v.x * by.x, v.y * by.y", "v.x, v.y", "SCALED"),
    "T is read before its flag": ("gemm", "while (!ptx::peek(flag)) ptx::pause();", "", "INLINE"),
    "the flag stays up": ("gemm", "ptx::write(flag, 0u)", "(void)flag", "INLINE"),
    "T of the wrong rows": ("gemm", "int m = row(tile, block, i), r", "int m = row(tile, block, 0), r", "INLINE"),
    "a tile's number is read before it is told": (
        "gemm", "  ptx::barrier_wait(memory + P::TOLD + 8 * turn.stage, turn.phase);\n", "", "LATE",
    ),
    "the neighbour is not told": ("gemm", "to < p.schedule.size(); ++to", "to < 1; ++to", "LATE"),
    "the counter stays up": ("gemm", "ptx::write(p.counter, 0u);", "", "LATE"),
    "tiles are a block's by its number, whether it runs or not": (
        "gemm",
        "int drawn = draw(), number;\n    if constexpr (P::AHEAD == 1) {\n"
        "      while ((number = tell(drawn)) < p.schedule.count()) {\n        drawn = draw();",
        "int drawn = ptx::block() / p.schedule.size(), number;\n    if constexpr (P::AHEAD == 1) {\n"
        "      while ((number = tell(drawn)) < p.schedule.count()) {\n        drawn += clusters;",
        "INLINE",
    ),
    "the mask of this tile again": (
        "gemm", "        next = after(number, rank);\n        tile", "        tile", "MASKED",
    ),
    "only a few hashes where K is short": (
        "gemm", "for (int step = ceil_div(p.K, DEPTH);", "for (int step = STEPS;", "MASKED",
    ),
    "d_out and the bias are read before they are there": ("gemm", "    if (vectors) await();\n", "", "LATE"),
    "their stage is not given back": ("gemm", "release(slot.stage);\n        slot", "slot", "LATE"),
    "the bias lies on d_out": ("gemm", "part(&p.bias.map, to + P::BIAS,", "part(&p.bias.map, to,", "LATE"),
}  # fmt: skip


def _mutated(tmp_path, file, old, new, plan):
    """A function that starts the plan compiled from csrc/ with one change."""
    folder = tmp_path / "csrc"
    shutil.copytree(CSRC, folder)
    source = folder / f"{file}.cuh"
    assert source.read_text().count(old) == 1, old
    source.write_text(source.read_text().replace(old, new))
    (folder / "plan.cpp").write_text(f'#include "launch.cuh"\n{plan.instance}')
    library = tmp_path / "plan.so"
    flags = ["-std=c++17", "-O1", "-w", "-DFUSED_PEFT_EMULATE", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, folder / "plan.cpp", "-o", library], check=True)
    function = getattr(ctypes.CDLL(str(library)), f"fused_peft_{plan.name}")
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p

    def start(plan, call):
        if wrong := function(ctypes.addressof(call)):
            raise RuntimeError(wrong.decode())

    return start


@emulated
@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_mutants(name, tmp_path):
    file, old, new, form = MUTANTS.get(name, ("gemm", "// The side that loads.", "//", "INLINE"))
    plan = next(p for p in FEW if p.form == form)
    start = _mutated(tmp_path, file, old, new, plan)
    gemm = Gemm(plan, 300, 424, 6 * 64, 8)
    ways = [(order, (2 - order % 2, 1)) for order in range(5)]
    found = (gemm.disagreement(start=start, cluster=cluster, order=order, processors=2) for order, cluster in ways)
    assert any(found) == (name != "none")


# Every call that orders or waits: without it, a comparison turns red. The built library leaves out one line of gemm.cuh

NEITHER = """thread block blocks uniform cluster_rank shared_memory give_registers take_registers barrier_init prefetch
load load_multicast store load_matrices store_matrices pack unpack read read_shared write peek take send pause product
"""
SITES = [
    (line, name)
    for line, text in enumerate((CSRC / "gemm.cuh").read_text().splitlines(), 1)
    for name in re.findall(r"ptx::(\w+)", text)
    if name not in NEITHER.split()
]
FORMS = [next(p for p in FEW if p.form == form) for form in ("LATE", "MASKED", "SCALED", "INLINE")]
WAYS = [(order, (2 - order % 2, 1)) for order in range(6)]


def test_a_line_orders_once():
    """So that a line names one of them; and nothing is called past the namespace."""
    assert len({line for line, _ in SITES}) == len(SITES)
    assert "using namespace ptx" not in (CSRC / "gemm.cuh").read_text()


@emulated
@pytest.mark.parametrize(("line", "name"), [(0, "none"), *SITES], ids=lambda v: str(v))
def test_nothing_that_orders_is_left_out(line, name):
    gemms = [Gemm(plan, 300, 264, 5 * 64, 8) for plan in FORMS]
    library = extension.library(True)
    library.fused_peft_leave_out(line)
    try:
        found = (g.disagreement(cluster=cluster, order=i, processors=2) for i, cluster in WAYS for g in gemms)
        assert any(found) == (name != "none"), f"gemm.cuh:{line}, {name}"
    finally:
        library.fused_peft_leave_out(0)


# The backend


@pytest.fixture
def forced():
    fp.set_backend("cuda")
    fp.set_strict(True)


SHAPE = Shape((130,), 136, 264, 16)


@pytest.mark.parametrize("case", distinct(CASES), ids=lambda c: c.name)
def test_methods(case, forced):
    """Every method whose calls the backend takes: forward and backward within the limits, fp16."""
    try:
        found = verify.measure(case.make(SHAPE.r), torch.float16, DEVICE, shape=(130, SHAPE.K, SHAPE.N), draws=1)
    except fp.StrictError as e:
        why = str(e).rpartition("cuda: ")[2]
        assert why in ("the call is not one GEMM with a frozen weight", "r=68 is not a multiple of 8") or "r=" in why, (
            why
        )
        pytest.skip(why)
    for tensor, (error, plain) in found.items():
        row = verify.Row(case.method, torch.float16, tensor, error, plain)
        assert error <= max(row.limit, 1.25 * plain) * (4 if tensor not in ("y", "dx") else 1), (tensor, error, plain)


@pytest.mark.parametrize(
    ("config", "used"),
    [
        (fp.LoraConfig(r=16), ["gemm_cuda INLINE", "down", "gemm_cuda LATE"]),
        (fp.LoraConfig(r=16, lora_dropout=0.1), ["down", "gemm_cuda LATE", "down", "gemm_cuda MASKED"]),
        (fp.LoraConfig(r=72), ["down", "gemm_cuda LATE", "down", "gemm_cuda LATE"]),
        (fp.IA3Config(), ["gemm_cuda LATE", "gemm_cuda SCALED"]),
        (fp.SSLConfig(), ["gemm_cuda SCALED", "gemm_lowrank_tma"]),  # the column sums for d_in's gradient are Triton's
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, fp.methods.PeftConfig) else None,
)
def test_what_is_launched(config, used, forced, monkeypatch):
    k, seen, submit = kernels(), [], kernels().launch.submit

    def watched(kernel, grid, args, *rest):
        if kernel.__name__ not in ("outer", "back", "add_up", "finish"):
            seen.append(" ".join(filter(None, [kernel.__name__, args.get("form") if kernel is cuda.GEMM else ""])))
        submit(kernel, grid, args, *rest)

    monkeypatch.setattr(k.launch, "submit", watched)
    monkeypatch.setattr(k.outer, "one_read", lambda *_: False)
    layer = fp.PeftLinear(136, 264, config=config, dtype=torch.float16, device=DEVICE)
    layer(torch.randn(130, 136, dtype=torch.float16, device=DEVICE, requires_grad=True)).sum().backward()
    assert seen == used


@emulated
def test_compiled_backward_uses_it_too(forced):
    layer = fp.PeftLinear(72, 136, config=fp.LoraConfig(r=8, lora_dropout=0.1), dtype=torch.float16)
    x = torch.randn(130, 72, dtype=torch.float16, requires_grad=True)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()  # strict: any other backend raises


@emulated
def test_T_is_made_inside_or_before_as_the_config_says(forced, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda.GEMM, "_start", lambda grid, form, **_: seen.append(form))
    x = torch.randn(130, 136, dtype=torch.float16)
    for inline in (True, False):
        cuda.configs.insist("gemm_cuda", inline=inline)
        for r in (8, 24, 64, 72):
            fp.PeftLinear(136, 264, config=fp.LoraConfig(r=r), dtype=torch.float16)(x)
    cuda.configs.insist("gemm_cuda")
    assert seen == ["INLINE"] * 3 + ["LATE"] * 5


def test_the_closed_form_makes_T_inside_where_that_is_predicted_faster():
    inline = lambda M, r: cuda.config_of_gemm((9, 0), 16, M, 4096, 4096, r).inline  # noqa: E731
    assert inline(8192, 16)
    assert not inline(2048, 16)
    assert not inline(8192, 0)
    assert not inline(8192, 128)  # no plan has so many columns


@emulated
def test_processors_may_be_limited(forced, monkeypatch):
    blocks, start = [], extension.call

    def call(name, struct, emulated):
        blocks.extend([struct.processors] if name != "cast" else [])
        start(name, struct, emulated)

    monkeypatch.setattr(extension, "call", call)
    layer = fp.PeftLinear(136, 264, config=fp.LoraConfig(r=16), dtype=torch.float16)
    x = torch.randn(130, 136, dtype=torch.float16)
    results = []
    for most in ("", "3", "1"):
        monkeypatch.setenv("FUSED_PEFT_SMS", most)
        kernels().launch.most_processors.cache_clear()
        results.append(layer(x))
    assert blocks == [4, 3, 1]
    assert all(torch.equal(results[0], y) for y in results)
    for wrong in ("0", "-4", "half"):
        monkeypatch.setenv("FUSED_PEFT_SMS", wrong)
        kernels().launch.most_processors.cache_clear()
        with pytest.raises(ValueError, match=f"FUSED_PEFT_SMS='{wrong}' must be a positive integer"):
            layer(x)
    monkeypatch.undo()
    kernels().launch.most_processors.cache_clear()


@emulated
def test_factor_is_scaled_and_rounded_once(forced):
    x, B = torch.empty(1, 8, dtype=torch.float16), torch.randn(40, 16).t()
    got, left = dispatch.backends()["cuda"].factor(B.t(), 0.3, x)
    assert left == 1
    torch.testing.assert_close(got, (B.t() * torch.tensor(0.3)).half(), rtol=0, atol=0)
    same = torch.randn(16, 8).half()
    assert dispatch.backends()["cuda"].factor(same, 1.0, x)[0] is same


# The choice


@pytest.fixture
def hopper(monkeypatch, record):
    """As on a machine with one sm_90 and everything it takes to build; nothing is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    monkeypatch.setattr(extension, "failure", lambda on_cpu: None)
    monkeypatch.setattr(cuda, "_broken", lambda emulated: None)
    record()
    yield monkeypatch
    dispatch.choose.cache_clear()


PROBLEM = operands.Problem(
    "cuda", (9, 0), torch.bfloat16, torch.float32, 8192, 4096, 4096, 16, frozenset({"x", "w", "A", "B"})
)


def measured(**ms) -> dict:
    """What a record says of PROBLEM, times by backend."""
    return {**records.described(PROBLEM), "ms": ms}


PASSED = [records.variant(name, PROBLEM) for name in ("cuda", "triton", "cublas")]


def test_off_until_it_is_tested_and_measured(hopper, record):
    choice = dispatch.choose(PROBLEM)
    assert choice.backend.name == "triton"
    assert choice.why().startswith("cuda: not self-tested on this GPU; ")
    assert "triton: predicted to take" in choice.why()
    record(passed=PASSED)
    assert dispatch.choose(PROBLEM).why().startswith("cuda: not measured on this GPU; ")
    record(passed=PASSED, calls=[measured(cuda=1.04, triton=1.2, cublas=1.0, eager=2.0)])
    assert (
        dispatch.choose(PROBLEM).why().startswith("cuda: measured to take 1.04 times as long as the fastest after it")
    )
    record(passed=PASSED, calls=[measured(cuda=0.97, triton=1.2, cublas=1.0, eager=2.0)])
    choice = dispatch.choose(PROBLEM)
    assert choice.backend.name == "cuda"
    assert choice.why() == (
        "cuda: measured to take 0.97 of the fastest after it, on 8192 x 4096 x 4096, an H100, 2026-01-01"
    )
    assert dispatch.choose(replace(PROBLEM, M=100)).backend.name == "triton"  # nothing near was measured
    record(failed={PASSED[0]: "dB is off"}, calls=[measured(cuda=0.5, cublas=1.0)])
    assert "cuda: its self-test failed on an H100, 2026-01-01: dB is off" in dispatch.choose(PROBLEM).why()
    fp.set_backend("cuda")  # not even by name
    assert dispatch.choose(PROBLEM).backend.name != "cuda"


def test_info_says_how_it_stands(capsys):
    assert main(["info"]) == 0
    line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("backend      cuda"))
    assert "tried first on cuda; where its self-test passed and it was measured fastest" in line


def test_it_is_chosen_where_eager_beats_triton_only(hopper, record):
    record(passed=PASSED, calls=[measured(cuda=0.8, triton=1.2, cublas=1.1, eager=1.0)])
    assert dispatch.choose(PROBLEM).backend.name == "cuda"


def test_asked_for_by_name(hopper):
    fp.set_backend("cuda")
    assert dispatch.choose(PROBLEM).backend.name == "cuda"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32 is not bfloat16 or float16"),
        ({"arch": (8, 0)}, "sm_80 is not sm_90"),
        ({"arch": (10, 0)}, "sm_100 is not sm_90"),
        ({"r": 4}, "r=4 is not a multiple of 8"),
        ({"M": 63}, "63 x 4096 x 4096 is below 64"),
        ({"N": 4100}, "its rows are not whole 16 bytes"),
        ({"hadamard": True}, "not one GEMM with a frozen weight"),
        ({"drop_base": True}, "not one GEMM with a frozen weight"),
    ],
)
def test_reasons(hopper, changes, reason):
    fp.set_backend("cuda")
    choice = dispatch.choose(replace(PROBLEM, **changes))
    assert choice.backend.name in ("triton", "cublas", "eager")  # what comes after it
    assert reason in choice.why()
    fp.set_strict(True)
    with pytest.raises(fp.StrictError, match=re.escape(reason)):
        dispatch.choose(replace(PROBLEM, **changes))


def test_an_older_gpu_is_a_reason(hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda i=0: (8, 0))
    assert dispatch.backends()["cuda"].available() == [
        "no GPU here is an sm_90 (H100, H200), which the kernel is written for"
    ]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A build folder of its own, and one plan to build."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for module in (emulation, plans):
        monkeypatch.setattr(module, "PLANS", PLANS[:1])
    cleared = (plans.fingerprint, extension.library, extension.function, cuda._broken)
    for cached in cleared:
        cached.cache_clear()
    yield types.SimpleNamespace(folder=tmp_path, monkeypatch=monkeypatch)
    monkeypatch.undo()
    for cached in cleared:
        cached.cache_clear()


@compiles
def test_built_once_and_found_again(workshop):
    assert extension.failure(True) is None
    extension.library(True)
    extension.library.cache_clear()
    workshop.monkeypatch.setattr(emulation, "_build", None)  # not called again
    workshop.monkeypatch.setenv("PATH", "")  # nor is a compiler needed
    assert extension.failure(True) is None
    extension.library(True)


@compiles
def test_a_failed_build_is_a_reason_and_is_remembered(workshop):
    broken = Plan("bf16", 128, 256, False, "NONE_SUCH")
    for module in (emulation, plans):
        workshop.monkeypatch.setattr(module, "PLANS", [broken])
    plans.fingerprint.cache_clear()
    with pytest.raises(extension.BuildError, match=r"csrc/ failed to compile: .*error.*delete .*failed\.txt"):
        extension.library(True)
    assert "csrc/ failed to compile" in extension.failure(True)
    workshop.monkeypatch.setattr(emulation, "_build", None)
    assert "csrc/ failed to compile" in cuda._broken(True)
    if not torch.cuda.is_available():
        assert "csrc/ failed to compile" in dispatch.backends()["cuda"].available()[0]
        fp.set_backend("cuda")
        layer = fp.PeftLinear(64, 64, config=fp.LoraConfig(r=8), dtype=torch.float16)
        layer(torch.randn(64, 64, dtype=torch.float16))  # computed all the same
        assert "csrc/ failed to compile" in fp.explain(torch.nn.Sequential(layer))[0].why


def test_where_nothing_can_be_written(workshop):
    (workshop.folder / "file").write_text("")
    workshop.monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(workshop.folder / "file"))
    with pytest.raises(extension.BuildError, match="Not a directory"):
        extension.library(True)
    assert "Not a directory" in cuda._broken(True)


@compiles
def test_a_lock_left_behind_is_no_obstacle(workshop):
    folder = emulation._folder()
    folder.mkdir(parents=True)
    (folder / "lock").write_text("")  # of a process that was killed: torch would wait for ever
    extension.library(True)


@compiles
def test_a_library_that_is_gone_or_does_not_load(workshop):
    extension.library(True)
    (file,) = emulation._folder().glob("*.so")
    extension.library.cache_clear()
    file.unlink()
    forgetful = type(cpp_extension.JIT_EXTENSION_VERSIONER)()  # as in another process
    workshop.monkeypatch.setattr(cpp_extension, "JIT_EXTENSION_VERSIONER", forgetful)
    extension.library(True)  # built anew
    for so in file.parent.glob("*.so"):  # files of their names are loaded already, and would be found so
        so.unlink()
    file.with_name("other.so").write_bytes(b"of another machine")
    extension.library.cache_clear()
    with pytest.raises(extension.BuildError, match="built but does not load"):
        extension.library(True)
    assert "built but does not load" in cuda._broken(True)


def test_a_failure_noted_meanwhile_is_not_repeated(workshop):
    asked = []

    def failure():  # nothing is known at first; then another process has failed
        asked.append(None)
        return None if len(asked) == 1 else "csrc/ failed to compile: over there"

    workshop.monkeypatch.setattr(emulation, "_build", None)
    workshop.monkeypatch.setattr(emulation, "failure", failure)
    assert extension.failure(True) is None
    with pytest.raises(extension.BuildError, match="over there"):
        extension.library(True)


def test_without_compilers(workshop):
    workshop.monkeypatch.setenv("PATH", "")
    workshop.monkeypatch.setattr(built.sys, "executable", "/nowhere/python")
    missing = "ninja is not installed (pip install ninja), g++ is not on the PATH"
    assert extension.failure(True) == f"csrc/ cannot be compiled: {missing}"
    with pytest.raises(extension.BuildError, match="ninja is not installed"):
        extension.library(True)


# The check


CLEAN = compile_csrc.Report("plan", "nvrtc 13.0", 168, 0, 230_000, 5, 8, 8, 0, 3, ())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 2}, "2 local loads and stores"),
        ({"wgmma": 0}, "no HGMMA"),
        ({"tma_load": 0}, "no UTMALDG"),
        ({"tma_store": 0}, "no UTMASTG"),
        ({"fences": 20}, "20 fences of the whole GPU"),
        ({"shared": 232449}, "232449 bytes of shared memory"),
        ({"warnings": ("(C7510) wgmma serialized",)}, "C7510"),
    ],
)
def test_the_check_refuses(changes, fault):
    assert not CLEAN.faults()
    assert any(fault in found for found in replace(CLEAN, **changes).faults())


@pytest.mark.skipif(not compile_csrc.nvcc(), reason="needs nvcc")
def test_asserts_in_device_code_are_refused(tmp_path, monkeypatch):
    """What -DNDEBUG prevents: a call between products serialises them, and the check says so."""
    commit, text = "ptx::products_commit();", plans.headers()["gemm.cuh"].decode()
    text = text.replace(commit, f"assert(slot.stage < 99); {commit}")
    changed = {**plans.headers(), "gemm.cuh": f"#include <cassert>\n{text}".encode()}
    monkeypatch.setattr(compile_csrc, "headers", lambda: changed)
    flags = [flag for flag in compile_csrc.FLAGS if flag != "-DNDEBUG"]
    monkeypatch.setattr(compile_csrc.Nvcc.compile, "__defaults__", (flags,))
    report = compile_csrc.compiled(PLANS[0], tmp_path, 1000, compile_csrc.Nvcc())
    assert any("C75" in fault for fault in report.faults()), report
