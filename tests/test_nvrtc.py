"""csrc/'s way to a GPU without nvcc: NVRTC found and called, what it makes kept on disk, loaded and launched through a
stand-in for the driver; why it cannot be, in words."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fused_peft.backends import built, cuda, extension, nvrtc, plans
from fused_peft.backends.built import BuildError
from fused_peft.backends.plans import PLANS
from fused_peft.backends.triton import kernels
from fused_peft.core import dispatch
from fused_peft.core.paths import source_dir
from fused_peft.tools import compile_csrc

pytest.importorskip("triton", reason="Triton runs on Linux")
ROOT = Path(__file__).resolve().parent.parent
WHEEL = ROOT / ".venv/nvrtc"  # where `make test` installs NVRTC
compiles = pytest.mark.skipif(not extension.cxx(), reason="needs a C++ compiler")
FEW = [
    next(p for p in PLANS if (p.dtype, p.form, p.across, p.inner) == wanted)
    for wanted in (("bf16", "LATE", False, 0), ("fp16", "SCALED", True, 0), ("bf16", "INLINE", False, 16))
]


@pytest.fixture(scope="module")
def found():
    """NVRTC, with nvcc out of sight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(WHEEL))
        patch.setattr(compile_csrc, "nvcc", lambda: None)
        nvrtc.find.cache_clear()
        try:
            yield nvrtc.find()
        except BuildError as e:
            pytest.skip(str(e))
        finally:
            nvrtc.find.cache_clear()


# What NVRTC makes


@pytest.mark.parametrize("plan", FEW, ids=lambda p: p.name)
def test_a_plan_is_compiled_as_it_has_to_be(plan, found, tmp_path):
    report = compile_csrc.compiled(plan, tmp_path, 1024, found)
    assert not report.faults(), report
    assert report.compiler == str(found)


def test_an_assert_between_products_is_refused(found, tmp_path, monkeypatch):
    commit, text = "ptx::products_commit();", plans.headers()["gemm.cuh"].decode()
    assert commit in text
    changed = {**plans.headers(), "gemm.cuh": text.replace(commit, f"assert(slot.stage < 99); {commit}").encode()}
    monkeypatch.setattr(compile_csrc, "headers", lambda: changed)
    options = tuple(option for option in nvrtc.OPTIONS if option != "-DNDEBUG")
    monkeypatch.setattr(nvrtc.Nvrtc.compile, "__defaults__", (options,))
    assert any("C75" in fault for fault in compile_csrc.compiled(FEW[0], tmp_path, 1024, found).faults())


def test_an_error_names_its_line(found):
    with pytest.raises(BuildError, match=r"nvrtc \d+\.\d+: plan.cu\(1\): error: "):
        found.compile("nonsense;", {})


def test_without_nvcc_the_check_takes_nvrtc(found):
    assert [str(compiler) for compiler in compile_csrc.compilers()] == [str(found)]


# What the driver is given


@pytest.fixture(scope="module")
def told(found, tmp_path_factory):
    """What ``nvrtc_run`` prints."""
    places = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    folder = tmp_path_factory.mktemp("built")
    env = {**os.environ, "PATH": os.pathsep.join(places), "TORCH_EXTENSIONS_DIR": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench"), *sys.path])
    env.pop("TRITON_INTERPRET", None)
    wheel = found.file.parents[3]  # of nvidia/.../lib
    command = [sys.executable, ROOT / "tests/nvrtc_run.py", wheel]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout), "folder": folder}


MAP = {"kind": 9, "swizzle": 3, "l2": 3, "rank": 2}  # bf16, 128 bytes, 256 bytes


@compiles
def test_a_launch_in_clusters(told):
    late = told["LATE"]
    assert told["failure"] is None
    assert late["new"] == 1
    assert late["own"]
    assert late["shape"] == [8, 1, 1, 384, 1, 1]  # 3 x 2 tiles, an odd row of which has a neighbour past the edge
    assert late["allowed"] == [late["shared"], 0]  # on the device of the call
    assert told["allowed on"] == 3  # on another one for a call there
    assert late["shared"] == compile_csrc.shared_bytes()["bf16_128x256_rows_late"]
    assert late["attributes"] == {"4": 2, "6": 1}  # a cluster of two; may begin before the launch before it has ended
    shapes = {"x": (300, 136), "w": (512, 136), "s": (300, 24), "b": (512, 24)}
    for name, shape in shapes.items():
        row, box = told["row_bytes"][name], [128, 64]  # of w's 256 rows each block of the cluster brings half
        about = {"address": told["addresses"][name], "shape": list(shape), "row_bytes": row, "box": box}
        assert late["maps"][name] == {**MAP, **about}
    for name in ("y", "z"):
        map = late["maps"][name]
        assert (map["shape"], map["row_bytes"], map["box"]) == ([300, 512], 1024, [16, 64])


@compiles
def test_host_and_kernel_agree_on_the_parameters(told):
    (file,) = told["folder"].glob("*/bf16_128x256_rows_late_*.cubin")
    taken = int(re.search(r"CONSTANT\[0\]:(\d+)", compile_csrc.dumped(file, "--dump-resource-usage"))[1])
    assert taken == told["parameters"] + 0x240  # where parameters begin that are aligned to 64 bytes


@compiles
def test_a_launch_that_makes_t_itself(told):
    inline = told["INLINE"]
    assert inline["shape"] == [6, 1, 1, 384, 1, 1]
    assert inline["attributes"]["4"] == 1
    assert inline["maps"]["s"]["address"] == told["t"]
    assert (inline["maps"]["a"]["shape"], inline["maps"]["a"]["box"]) == ([16, 136], [16, 64])
    assert inline["maps"]["w"]["box"] == [256, 64]


@compiles
def test_a_thread_without_a_context_gets_the_devices_own(told):
    assert told["context of plan"] == told["context of cast"] == 1 + 3  # as the stand-in numbers device 3's


@compiles
def test_the_hosts_time(told):
    assert told["us_call"] <= 15
    assert told["cast"] == [1, 1, 1, 256, 1, 1]


@compiles
def test_drivers_that_are_too_old(told, found):
    assert "the CUDA driver is of CUDA 11.8, and 12.0 is needed" in told["failure 11080"]
    if found.version[0] > 12:
        assert told["failure 12040"].startswith(
            f"csrc/ cannot be compiled: libnvrtc.so.{found.version[0]} makes code for drivers of CUDA "
            f"{found.version[0]}; this one is of CUDA 12 (pip install nvidia-cuda-nvrtc-cu12)"
        )


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_drivers_functions_are_declared_as_nvidia_does():
    include = Path(kernels().triton_internals.triton.__file__).parent / "backends/nvidia/include"
    if not (include / "cuda.h").exists():
        pytest.skip("this Triton brings no cuda.h")
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{source_dir('csrc')}", f"-I{include}"]
    subprocess.run([*command, ROOT / "tests/driver_test.cpp"], check=True)


# What is kept on disk


def test_kept_once_and_read_again(tmp_path):
    file, made = tmp_path / "of" / "a.cubin", []
    make = lambda: made.append(1) or b"code"  # noqa: E731
    assert built.kept(file, make) == built.kept(file, make) == b"code"
    assert len(made) == 1


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[1:], lambda d: b"", lambda d: b"x" + d[1:], None])
def test_a_file_that_is_not_whole_is_made_anew(tmp_path, change):
    file = tmp_path / "a.cubin"
    built.kept(file, lambda: b"code" * 100)
    file.write_bytes(change(file.read_bytes()) if change else b"\x7fELF of another program")
    assert built.read(file) is None
    assert built.kept(file, lambda: b"new") == built.read(file) == b"new"


def test_one_builder_at_a_time(tmp_path):
    file, made, going = tmp_path / "a.cubin", [], threading.Event()

    def make():
        made.append(1)
        going.wait(0.2)
        return b"code"

    results = []
    threads = [threading.Thread(target=lambda: results.append(built.kept(file, make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"code"] * 4
    assert len(made) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.cubin", "a.cubin.lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"cannot be written.*set TORCH_EXTENSIONS_DIR"):
        built.kept(tmp_path / "file" / "a.cubin", lambda: b"code")


class Compiler:
    """Stands for NVRTC."""

    def __init__(self, version: str):
        self.version, self.compiled = version, []

    def __str__(self):
        return f"nvrtc {self.version}"

    def compile(self, source, headers):
        self.compiled.append(source)
        return f"{self} {source}".encode(), ""


def test_another_version_or_source_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extension, "driver_version", lambda: (13, 0))
    old, new = Compiler("12.9"), Compiler("13.0")
    for compiler in (old, new, old):
        monkeypatch.setattr(nvrtc, "find", lambda driver, compiler=compiler: compiler)
        assert extension.cubin(FEW[0].name).startswith(str(compiler).encode())
    assert len(old.compiled) == len(new.compiled) == 1
    assert extension.cubin(FEW[1].name) != extension.cubin(FEW[0].name)
    plans.fingerprint.cache_clear()
    monkeypatch.setattr(plans, "headers", lambda: {"gemm.cuh": b"changed"})
    extension.cubin(FEW[0].name)
    assert len(old.compiled) == 3
    monkeypatch.undo()
    plans.fingerprint.cache_clear()


def test_all_kernels_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extension, "driver_version", lambda: (13, 0))
    compiler = Compiler("13.0")
    monkeypatch.setattr(nvrtc, "find", lambda driver: compiler)
    for _ in range(2):
        extension.prepare()
        assert len(set(compiler.compiled)) == len(compiler.compiled) == len(PLANS) + 1


# Where it is looked for, and why it cannot be had


@pytest.fixture
def nowhere(monkeypatch):
    """No NVRTC anywhere, a driver of CUDA 13."""
    monkeypatch.setattr(nvrtc, "_folders", lambda: iter(()))
    monkeypatch.setattr(nvrtc, "_loaded", list)
    monkeypatch.setattr(extension, "driver_version", lambda: (13, 0))
    nvrtc.find.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    nvrtc.find.cache_clear()


def test_the_packages_of_both_cudas_are_looked_into(tmp_path, monkeypatch):
    wanted = [tmp_path / "nvidia" / part / "lib" for part in ("cu13", "cuda_nvrtc")]
    for folder, major in zip(wanted, (13, 12), strict=True):
        folder.mkdir(parents=True)
        (folder / f"libnvrtc.so.{major}").write_text("")
        (folder / f"libnvrtc.alt.so.{major}").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda/lib64").mkdir(parents=True)
    (tmp_path / "cuda/lib64/libnvrtc.so.12.4").write_text("")
    got = [str(file.relative_to(tmp_path)) for file in nvrtc.candidates() if file.is_relative_to(tmp_path)]
    assert got == [
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13", "cuda/lib64/libnvrtc.so.12.4",
    ]  # fmt: skip


def test_reasons(nowhere, tmp_path):
    assert extension.failure() == (
        "csrc/ cannot be compiled: NVRTC (libnvrtc.so.12 or .13), which CUDA builds of PyTorch bring, is not found "
        "(pip install nvidia-cuda-nvrtc)"
    )
    nowhere.setattr(nvrtc, "_folders", lambda: iter([tmp_path]))
    (tmp_path / "libnvrtc.so.11.2").write_text("")  # knows no sm_90a
    nvrtc.find.cache_clear()
    assert "is not found" in extension.failure()
    (tmp_path / "libnvrtc.so.12").write_text("broken")
    nvrtc.find.cache_clear()
    assert f"{tmp_path}/libnvrtc.so.12 does not load: " in extension.failure()


def test_no_driver_and_no_compiler_are_reasons_of_the_backend(nowhere, record):
    nowhere.undo()
    nowhere.setattr(extension, "DRIVER", "libno_such_driver.so.1")
    nowhere.setattr(extension, "cxx", lambda: None)
    nowhere.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")
    nowhere.setattr(torch.cuda, "is_available", lambda: True)
    nowhere.setattr(torch.cuda, "device_count", lambda: 1)
    nowhere.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    extension.driver_version.cache_clear()
    (why,) = dispatch.backends()["cuda"].available()
    assert "the CUDA driver cannot be opened: libno_such_driver.so.1" in why
    assert "there is no C++ compiler (" in why
    extension.library.cache_clear(), cuda._broken.cache_clear()
    assert cuda._broken(False) == why
    cuda._broken.cache_clear()
