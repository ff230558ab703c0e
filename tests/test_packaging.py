"""An sdist, the wheel built from it, and a bare checkout all import, find kernels/ and csrc/, and shadow nothing.

What set-up installs is pinned, and the wheel carries its licence and its types.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fused_peft
from fused_peft.core import versions

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


@pytest.fixture(scope="module")
def wheel(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    """The lines of the wheel's METADATA above the README."""
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return wheel.read(name).decode().partition("\n\n")[0].splitlines()


def test_wheel_installed_elsewhere(wheel, tmp_path):
    assert not [n for n in wheel.namelist() if n.startswith(("kernels/", "csrc/", "tests/", "bench/"))]
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel.filename, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-c", PROBE, site, CSRC, cwd=elsewhere, PYTHONPATH=site)
    run("-c", "import importlib.util as u; assert u.find_spec('kernels') is None", cwd=elsewhere, PYTHONPATH=site)
    assert "eager: available" in run("-m", "fused_peft", "info", cwd=elsewhere, PYTHONPATH=site)


def requirements(lines) -> list[Requirement]:
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def test_wheel_requirements(metadata):
    core = {r.name: r for r in requirements(metadata) if r.marker is None or "extra" not in str(r.marker)}
    assert set(core) == {"numpy", "safetensors", "torch", "tqdm", "triton"}
    assert str(core["triton"].marker) == 'platform_system == "Linux"'
    assert {f"Provides-Extra: {e}" for e in ("peft", "qlora", "demo", "dev")} <= set(metadata)


def test_wheel_has_its_licence_and_its_types(wheel, metadata):
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(metadata)
    (licence,) = [n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "fused_peft/py.typed" in wheel.namelist()


# what the types of public names may leave open: entries of files and reports, and settings that are passed on
_OPEN = r"dict\[str, Any\]|\*\*\w+: Any|\*args: Any(?=, \*\*)"


def public_names() -> list[str]:
    """What a user may write after ``fp.``: every public name, and every public method of those that are classes."""
    found, kinds = {}, (types.FunctionType, classmethod, staticmethod, property)
    for name in fused_peft.__all__:
        found[name] = value = getattr(fused_peft, name)
        ours = [k for k in getattr(value, "__mro__", ()) if k.__module__.startswith("fused_peft")]
        members = {m: v for k in reversed(ours) for m, v in vars(k).items() if not m.startswith("_")}
        calls = {m: getattr(v, "__func__", getattr(v, "fget", v)) for m, v in members.items() if isinstance(v, kinds)}
        # integrations: PEFT's own methods, which configs have once it is imported
        found |= {f"{name}.{m}": v for m, v in calls.items() if "integrations" not in v.__module__}
    return [name for name in found if not name.endswith(".to_peft")]  # whose type is PEFT's own


def test_mypy_sees_the_types_of_an_installed_wheel(wheel, tmp_path):
    run("-m", "venv", "--without-pip", "user", cwd=tmp_path)
    (site,) = tmp_path.glob("user/lib/python*/site-packages")
    wheel.extractall(site)
    names = public_names()
    lines = ["import torch", "import fused_peft as fp", 'fp.LoraConfig(r="8")', "fp.unmerge(1)"]
    lines += ["kept: torch.nn.Linear = fp.restore(torch.nn.Linear(1, 1))"]
    lines += [f"reveal_type(fp.{name})" for name in names]
    (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    found = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--python-executable", "user/bin/python", "--cache-dir", "cache",
            "script.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = dict(re.findall(r"^script.py:(\d+): (.*)$", found.stdout, re.M))
    assert len(said) == len(names) + 2, found.stdout[-3000:] + found.stderr
    assert said["3"].startswith('error: Argument "r"')
    assert said["4"].startswith('error: Argument 1 to "unmerge"')
    shown = {name: said[str(i)] for i, name in enumerate(names, 6)}
    assert all(text.startswith("note: Revealed type is") for text in shown.values())
    open_ = {name: text for name, text in shown.items() if re.search(r"\bAny\b", re.sub(_OPEN, "", text))}
    assert not open_


def test_the_pythons_it_names(metadata):
    """Those that set-up is pinned for; the oldest of them can read every file."""
    assert "Requires-Python: >=3.10" in metadata
    named = [line.rpartition(":: ")[2] for line in metadata if line.startswith("Classifier: Programming Language")]
    assert named == ["3", "3.10", "3.11", "3.12", "3.13"]
    assert f"Python {named[1]} to {named[-1]}" in (ROOT / "constraints.txt").read_text().partition("\n")[0]
    files = [file for folder in ("fused_peft", "kernels", "bench", "tests") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    for file in files:
        ast.parse(file.read_text("utf-8"), str(file), feature_version=(3, 10))
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* OSError: pass", feature_version=(3, 10))


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == fused_peft.__version__


def pins() -> dict[str, Requirement]:
    """Name: the line of constraints.txt that holds for this Python. Fails where there are two."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    found = [r for r in found if r.marker is None or r.marker.evaluate()]
    names = [canonicalize_name(r.name) for r in found]
    assert len(names) == len(set(names))
    return dict(zip(names, found, strict=True))


def test_every_constraint_is_one_release():
    for pin in pins().values():
        assert re.fullmatch(r"==[0-9.]+", str(pin.specifier)), pin


def test_all_that_set_up_installs_is_pinned(metadata):
    """From the wheel's own requirements on, through every package that is here at its pinned version.

    Triton is not in the file, since a CUDA build of torch requires one; what such a build brings is torch's own choice.
    """
    pinned, missing = pins(), set()
    todo = [(r, {"extra": e}) for r in requirements(metadata) for e in ("", "peft", "demo", "dev")]
    seen = {"fused-peft", "triton"}
    while todo:
        requirement, environment = todo.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate(environment)) or name in seen:
            continue
        seen.add(name)
        if name not in pinned:
            missing.add(name)
        elif importlib.metadata.version(name) in pinned[name].specifier:
            own = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [(r, {"extra": e}) for r in own for e in ("", *requirement.extras)]
    assert not {n for n in missing if not n.startswith(("nvidia-", "cuda-"))}
    assert len(seen) > 20


def test_the_pinned_versions_are_inside_the_tried_ranges():
    pinned = {name: str(pins()[name].specifier)[2:] for name in versions.TRIED if name != "triton"}
    pinned["triton"] = re.search(r"triton==([\d.]+)", (ROOT / "Makefile").read_text())[1]
    for name, version in pinned.items():
        assert versions.inside(name, version), (name, version)


def test_make_installs_nothing_unpinned():
    """Every pip install of the Makefile is constrained, or names an exact version and no dependency."""
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if re.search(r"pip install|\(PIN\)", line)]
    assert len(lines) > 5
    for line in lines:
        assert "constraints.txt" in line or "$(PIN)" in line or re.search(r'--no-deps .*"[\w-]+==[\d.]+"', line), line


def test_sdist_is_complete(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for name in (
        "Makefile",
        "LICENSE",
        "constraints.txt",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "fused_peft/py.typed",
        "kernels/dropout.py",
        "csrc/gemm.cuh",
        "tests/paper.py",
        "bench/bench_layers.py",
        "README.md",
        "docs/methods.md",
        "docs/speed.svg",
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
