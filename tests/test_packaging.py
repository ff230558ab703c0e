"""An sdist, the wheel built from it, and a bare checkout all import, find kernels/ and csrc/, and shadow nothing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import sys, pathlib
import torch, fused_peft as fp
where = pathlib.Path(sys.argv[1]).resolve()
assert where in pathlib.Path(fp.__file__).resolve().parents, fp.__file__
assert {f.name for f in fp.source_dir("csrc").iterdir()} >= set(sys.argv[2].split())
assert (fp.source_dir("kernels") / "dropout.py").is_file()
import fused_peft.kernels.dropout as kernel
assert where in pathlib.Path(kernel.__file__).resolve().parents, kernel.__file__
layer = fp.PeftLinear(8, 4, config=fp.SSBConfig())
layer(torch.randn(3, 8)).sum().backward()
assert set(fp.methods.METHODS) >= {"lora", "ia3", "ssl", "ssb", "bitfit"}
"""


CSRC = " ".join(f.name for f in (ROOT / "csrc").iterdir())  # all of it: it is compiled where it is used


def run(*command, cwd, **env):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the source tree without build products or environments."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    skip = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def dist(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)  # sdist, then the wheel from it
    return out


def test_wheel_installed_elsewhere(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(("kernels/", "csrc/", "tests/", "bench/"))]
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-c", PROBE, site, CSRC, cwd=elsewhere, PYTHONPATH=site)
    run("-c", "import importlib.util as u; assert u.find_spec('kernels') is None", cwd=elsewhere, PYTHONPATH=site)
    assert "eager: available" in run("-m", "fused_peft", "info", cwd=elsewhere, PYTHONPATH=site)


def test_wheel_requirements(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith("/METADATA")]
        metadata = z.read(name).decode()
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in core) == ["safetensors", "torch", "tqdm", "triton"]
    (triton,) = [line for line in core if "triton" in line]
    assert 'platform_system == "Linux"' in triton
    assert {f"Provides-Extra: {e}" for e in ("peft", "demo", "dev")} <= set(metadata.splitlines())


def test_sdist_is_complete(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for name in (
        "Makefile",
        "kernels/dropout.py",
        "csrc/gemm.cuh",
        "tests/paper.py",
        "bench/bench_layers.py",
        "README.md",
    ):
        assert name in names


def test_bare_checkout(checkout):
    run("-c", PROBE, checkout, CSRC, cwd=checkout)


def test_editable_install(tmp_path):
    """This very environment, seen from another folder."""
    run("-c", PROBE, ROOT, CSRC, cwd=tmp_path)


def test_another_package_named_kernels_wins(checkout, tmp_path):
    """Even from the source root, where the folder kernels/ is on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True")
    code = (
        "import fused_peft, kernels; assert kernels.theirs; import fused_peft.kernels.dropout as d; print(d.__file__)"
    )
    assert str(checkout) in run("-c", code, cwd=checkout, PYTHONPATH=tmp_path)


def test_transformers_sees_no_kernels_package_of_ours(checkout):
    pytest.importorskip("transformers")
    code = (
        "import fused_peft, importlib.metadata as m\n"
        "try: m.version('kernels'); print('True')\n"
        "except m.PackageNotFoundError:\n"
        "    from transformers.utils import is_kernels_available; print(is_kernels_available())"
    )
    installed = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; m.version('kernels')"], capture_output=True, check=False
    )
    assert run("-c", code, cwd=checkout).strip() == str(installed.returncode == 0)
