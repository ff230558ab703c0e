"""The ranges of other packages' versions: one table, pyproject's, and one warning outside of it."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fused_peft.core import versions
from fused_peft.model import prompt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def installed(monkeypatch):
    """Sets what is installed, as if nothing had been warned of yet."""
    monkeypatch.setattr(versions, "_warned", set())
    present = {}

    def version(package):
        if package not in present:
            raise importlib.metadata.PackageNotFoundError(package)
        return present[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return present


def stated() -> dict[str, SpecifierSet]:
    """pyproject's range of every package that has both ends; Python 3.10 has no reader of TOML."""
    words = re.findall(r'"(\w+[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text())
    ranges = [Requirement(word) for word in words]
    return {r.name: r.specifier for r in ranges if {s.operator for s in r.specifier} == {">=", "<"}}


def test_the_table_is_what_pyproject_states():
    assert stated() == {name: SpecifierSet(f">={a},<{b}") for name, (a, b) in versions.TRIED.items()}


def test_the_readme_states_it_too():
    text = (ROOT / "README.md").read_text("utf-8")
    for name, (first, end) in versions.TRIED.items():
        assert f"`{name}>={first},<{end}`" in text
    assert f'pip install "torch>={versions.TRIED["torch"][0]},<{versions.TRIED["torch"][1]}"' in text


def test_order_is_that_of_pip():
    releases = ("0", "0.21", "0.22", "2.10.9", "2.11", "2.13", "2.15", "3", "3.6", "3.9.0", "3.10", "5.24", "5.25.0")
    ends = ("", ".0", ".1", ".0.dev0", "a1", ".0rc2", "+cpu", ".0.post1", ".0a0+git1234", ".post1.dev2")
    for package, (first, end) in versions.TRIED.items():
        wanted = SpecifierSet(f">={first},<{end}", prereleases=True)
        for version in map("".join, itertools.product(releases, ends)):
            assert versions.inside(package, version) == (version in wanted), (package, version)
    assert not versions.inside("torch", "unknown")


def silent(package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_outside(package)


@pytest.mark.parametrize("package", versions.TRIED)
def test_one_warning_that_names_it_outside_and_none_inside(package, installed):
    first, end = versions.TRIED[package]
    silent(package)  # not installed
    installed[package] = f"{first}.0+cpu"
    silent(package)
    installed[package] = f"{end}.0.dev0"
    with pytest.warns(UserWarning, match=re.escape(f"{package} {end}.0.dev0 is outside")) as caught:
        versions.warn_outside(package)
    assert f'pip install "{package}>={first},<{end}"' in str(caught[0].message)
    silent(package)  # said once


def test_an_unknown_package_is_a_mistake(installed):
    with pytest.raises(KeyError):
        versions.warn_outside("numpy")


def test_import_names_torch_and_triton_outside_and_imports_no_triton(tmp_path):
    """In a process of its own, which has other versions; with the real ones it is silent."""
    code = (
        "import importlib.metadata as m, sys; real = m.version\n"
        "m.version = lambda name: {'torch': '2.15.0+cu130', 'triton': '3.5.1'}.get(name) or real(name)\n"
        "import fused_peft; print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert run.stderr.count("UserWarning") == 2
    assert "torch 2.15.0+cu130 is outside the range that fused_peft was tested on, >=2.11,<2.14" in run.stderr
    assert "triton 3.5.1 is outside" in run.stderr
    quiet = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:fused_peft", "-c", "import fused_peft"], cwd=tmp_path, check=False
    )
    assert quiet.returncode == 0


def test_soft_prompts_name_transformers(installed, monkeypatch):
    installed["transformers"] = "5.25.0"

    def stop(*args):
        raise ValueError("far enough")

    monkeypatch.setattr(prompt, "hooked", stop)
    with pytest.warns(UserWarning, match=re.escape("transformers 5.25.0 is outside")), pytest.raises(ValueError):
        prompt.attach(None, None)
