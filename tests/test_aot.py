"""Ahead-of-time compilation: the gate's judgement, what it covers, the main kernel's code. `make gate` compiles all."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fused_peft.backends.triton import kernels
from fused_peft.tools import compile_triton as aot

pytest.importorskip("triton", reason="Triton runs on Linux")
GROUPED = ("tile_table", "down_grouped", "gemm_grouped", "outer_grouped", "add_up_grouped")
CLEAN = aot.Report("k", "gemm_lowrank", "sm_90", "bf16", "", 200, 0, 0, 200_000, 4, 0, 6, 1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spilled": 12}, "12 spilled"),
        ({"serialised": 1}, "serialises its wgmma"),
        ({"shared": 227 * 1024 + 1}, "of shared memory, 232448 are there"),
        ({"arch": "sm_80", "shared": 163 * 1024 + 1}, "166912 are there"),
        ({"nested": True}, "were not flattened into one"),
        ({"wgmma": 0}, "no tensor-core instruction"),
    ],
)
def test_the_gate_refuses(changes, fault):
    assert not CLEAN.faults()
    assert any(fault in found for found in replace(CLEAN, **changes).faults())


@pytest.mark.parametrize(
    ("inner", "nested"), [("scf.for %k = %a to %b {", True), ("scf.while (%k = %a) {", True), ("scf.if %k {", False)]
)
def test_a_loop_in_a_loop_is_read_from_the_code(inner, nested):
    code = ["scf.if %p {", "  scf.for %i = %a to %b {", "    foo", "  }", "} else {", "  scf.for %i = %a to %b {"]
    code += [f"    {inner}", "    } loc(#1)", "  } loc(#2)", "} loc(#3)", "scf.for %i = %a to %b {", "}"]
    assert aot._nested("\n".join(code)) == nested


def test_fp32_and_sums_need_no_tensor_cores():
    assert not replace(CLEAN, wgmma=0, dtype="fp32").faults()
    assert not replace(CLEAN, wgmma=0, multiplies=False).faults()


def _compiling():
    """The environment without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _compile(tmp_path, *args, env=()):
    command = [sys.executable, "-m", "fused_peft", "compile", "--out", tmp_path / "cubins", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**_compiling(), **dict(env)})


_LIST = """
from fused_peft.tools import compile_triton as aot
for name, launch in aot.launches("ARCH").items():
    print(name, launch.kernel.__name__, aot._dtype(launch))
"""


@pytest.mark.parametrize("arch", aot.ARCHES)
def test_every_kernel_is_among_the_launches(arch):
    listed = subprocess.run(
        [sys.executable, "-c", _LIST.replace("ARCH", arch)],
        capture_output=True,
        text=True,
        check=True,
        env=_compiling(),
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    found = {kernel for _, kernel, _ in rows}
    elsewhere = {"gemm_cuda"} | (set() if arch == "sm_90" else {"gemm_lowrank_tma", "gemm_gluon", "back"})
    elsewhere |= set() if arch == "sm_90" else {"scale"}
    others = {"gemm_gluon", "add_up", "finish", "split", "scale", "decode", *GROUPED}
    assert found == {*kernels().configs.CLOSED_FORMS, *others} - elsewhere
    assert all(name.startswith(f"{kernel}-") for name, kernel, _ in rows)
    wanted = {("gemm_lowrank", "bf16"), ("gemm_lowrank", "fp32"), ("form", "fp32"), ("outer", "bf16")}
    assert wanted <= {(kernel, dtype) for _, kernel, dtype in rows}


def test_the_main_kernel_uses_wgmma_and_tma(tmp_path):
    only = "gemm_lowrank_tma-128x256x64w8s3-bf16-lora-bias-dropout"
    done = _compile(tmp_path, "--arch", "sm_90", "--only", only, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert {row["name"].rpartition("-")[2] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert min(row["wgmma"], row["tma_load"], row["tma_store"]) > 0, row
        assert not row["stack"] + row["spilled"] + len(row["faults"]), row
        assert (tmp_path / f"cubins/{row['name']}.cubin").stat().st_size > 1000


def test_the_gluon_kernel_stays_on_tma_and_wgmma(tmp_path):
    assert replace(CLEAN, kernel="gemm_gluon", tma_store=0).faults() == [
        "not wgmma on what TMA loads, stored through TMA"
    ]
    only = "gemm_gluon-128x256x64w4s4-bf16-r64-dropout"
    done = _compile(tmp_path, "--arch", "sm_90", "--only", only, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert not row["stack"] + row["spilled"] + row["serialised"] + len(row["faults"]), row


def test_every_form_of_the_gluon_kernel_is_compiled():
    code = """
from fused_peft.tools import compile_gluon
found = compile_gluon.launches()
args = [launch.args for launch in found.values()]
there = lambda a, *names: tuple(a[n] is not None for n in names)
assert {(a["TRANSPOSED"], there(a, "s_desc"), a["BR"]) for a in args} == {
    (t, (r > 0,), max(r, 16)) for t in (False, True) for r in (0, 16, 32, 64)}
assert {(a["BN"], a["MASK"], str(a["x_desc"].base.dtype)) for a in args} == {
    (n, m, f"torch.{d}") for n in (128, 256) for m in (False, True) for d in ("bfloat16", "float16")}
ends = {there(a, "bias_ptr", "d_out_ptr", "z_desc") + (a["BIAS_INSIDE"],) for a in args}
assert {e[:3] for e in ends} == {(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)}, ends
assert {e[3] for e in ends if e[0] and e[1]} == {False, True}
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=_compiling())


def test_a_cover_shows_every_two_options_of_a_kernel_together():
    code = """
from fused_peft.tools import compile_triton as aot
found = aot.launches("sm_90")
gemms = [launch for launch in found.values() if launch.kernel.__name__.startswith("gemm")]
seen = lambda launches, *names: {
    (launch.kernel.__name__, *(str(launch.args.get(n, launch.config)) for n in names)) for launch in launches
}
one, two = (aot.covering(found, together) for together in (1, 2))
for few, pairs in (one, ["MASK"]), (one, ["BR"]), (two, ["MASK", "config"]), (two, ["INLINE", "GATE"]):
    chosen = [launch for launch in few.values() if launch.kernel.__name__.startswith("gemm")]
    assert seen(gemms, *pairs) == seen(chosen, *pairs), pairs
assert set(one) < set(found) and len(one) < len(two) < 0.7 * len(found), (len(one), len(two), len(found))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=_compiling())


def test_beside_another_architecture_only_what_differs_is_compiled(tmp_path):
    done = _compile(tmp_path, "--arch", "sm_86", "--beside", "sm_80", "--cover", "1", "--only", "gemm_lowrank-64x128")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "s3-" in done.stdout  # 99 KiB hold three stages
    none = _compile(tmp_path, "--arch", "sm_80", "--beside", "sm_80")
    assert "0 kernels compiled" in none.stdout
    assert none.returncode == 1


def test_bad_calls(tmp_path):
    assert "invalid choice: 'sm_75'" in _compile(tmp_path, "--arch", "sm_75").stderr
    assert "TRITON_INTERPRET is set" in _compile(tmp_path, "--arch", "sm_90", env={"TRITON_INTERPRET": "1"}).stderr
    with pytest.raises(ValueError, match="arch='sm_75' is not one of sm_80, sm_86, sm_89, sm_90"):
        next(aot.compile_all("sm_75", tmp_path))
