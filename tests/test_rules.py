"""The rules that keep it one house: who may import whom, and that the README tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_peft.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_peft"
README = (ROOT / "README.md").read_text()

FOUNDATION = {"factors", "dropout"}


def imports(file: Path) -> set[str]:
    """Top-level names imported; those inside the package as "fused_peft.x"."""
    depth = len(file.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(file.relative_to(ROOT).parts[: depth - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found.update([module] if node.module else [f"{module}.{a.name}" for a in node.names])
    return found


def inner(file: Path) -> set[str]:
    return {name.split(".", 2)[1] for name in imports(file) if name.startswith("fused_peft.")}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("file", files("fused_peft/methods"), ids=lambda f: f.stem)
def test_a_method_imports_factors_and_its_base_only(file):
    assert inner(file) <= {"factors", "ops", "methods"}
    assert not {name for name in imports(file) if "backend" in name or "triton" in name}


@pytest.mark.parametrize("file", files("fused_peft/backends"), ids=lambda f: f.stem)
def test_a_backend_knows_no_method(file):
    assert inner(file) <= FOUNDATION | {"dispatch", "backends", "kernels", "extension"}
    names = {n for m in METHODS.values() for n in (m.name, *m.disk)}
    words = set(re.findall(r"\w+", file.read_text()))
    assert not words & names


@pytest.mark.parametrize("file", files("kernels"), ids=lambda f: f.stem)
def test_a_kernel_imports_triton_torch_and_configs_only(file):
    assert {name.split(".")[0] for name in imports(file)} <= {"triton", "torch", "kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", [PACKAGE / f"{name}.py" for name in sorted(FOUNDATION)], ids=lambda f: f.stem)
def test_the_foundation_imports_nothing_of_the_package(file):
    assert not inner(file)


def test_only_ops_saves_for_backward():
    for file in [*PACKAGE.rglob("*.py"), *files("kernels")]:
        assert file.name == "ops.py" or "save_for_backward" not in file.read_text(), file


def test_the_oracle_is_independent():
    assert not {name for name in imports(ROOT / "tests/paper.py") if "fused_peft" in name}


def test_kernels_is_not_a_regular_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_unused_module():
    """Every file of the package is imported by another, or is an entry point."""
    used = set()
    for file in PACKAGE.rglob("*.py"):
        used |= imports(file)
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        parent, _, last = name.rpartition(".")
        entry = last in ("fused_peft", "__main__") or "integrations" in name
        assert entry or name in used or f"{parent}.{last}" in used, file


def _readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_path_in_the_readme_exists():
    words = re.findall(r"`([\w./-]+(?:\.(?:py|md|csv|png|sh|cuh|cu|toml)|/))`", README)
    words += re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(words) > 10
    missing = [w for w in words if not (ROOT / w).exists() and not any(ROOT.glob(f"*/{w}"))]
    assert not missing


@pytest.mark.parametrize("recipe", _readme_blocks("python"), ids=lambda r: r.strip().splitlines()[0][:40])
def test_every_python_recipe_in_the_readme_runs(recipe, tmp_path):
    run = subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_command_in_the_readme_is_known():
    makefile = (ROOT / "Makefile").read_text()
    for line in filter(None, "\n".join(_readme_blocks("bash")).splitlines()):
        command = line.partition("#")[0].split()
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M), line
        elif command[:3] == ["python", "-m", "fused_peft"]:
            subprocess.run([sys.executable, "-m", "fused_peft", command[3], "--help"], check=True, capture_output=True)
        elif command[:3] == ["python", "-m", "pytest"]:
            subprocess.run([sys.executable, "-m", "pytest", "--collect-only", *command[3:]], cwd=ROOT, check=True)
        elif command[0].endswith(".sh"):
            assert (ROOT / command[0]).is_file(), line
        elif command[0] in ("python", "torchrun"):
            script = next(ROOT / word for word in command[1:] if word.endswith(".py"))
            subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
        else:
            assert command[:2] == ["pip", "install"], line


def test_tables_in_the_readme_come_from_the_results():
    sys.path.insert(0, str(ROOT / "bench"))
    import report

    assert report.render(README) == README, "run `make report`"
