"""The rules that keep it one house: who may import whom, and that the README tells the truth."""

import ast
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_peft.__main__ import main
from fused_peft.methods import METHODS
from fused_peft.model.parameter import why_not_method

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_peft"
README = (ROOT / "README.md").read_text()

# Who stands on whom: a file imports from its own folder and from lower floors, wherever in the file the import is
FLOORS = (
    {"core"},
    {"backends", "methods"},
    {"model"},
    {"distributed", "tools"},
    {"integrations"},
    {"__init__", "__main__"},
)
LEVEL = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}


def imports(file: Path) -> set[str]:
    """Modules imported anywhere in a file, by their full names."""
    parts = file.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for a in node.names:  # a module of a package, or a name of a module
                path = ROOT.joinpath(*module.split("."), a.name)
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                found.add(f"{module}.{a.name}" if is_module else module)
    return found


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {dotted(file): file for file in PACKAGE.rglob("*.py")}
GRAPH = {name: {i for i in imports(file) if i in SOURCES} - {name} for name, file in SOURCES.items()}


def folder_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def test_every_folder_has_its_floor():
    assert {p.parent.name for p in PACKAGE.glob("*/*.py")} <= set(LEVEL)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down_only(name):
    own, level = folder_of(name), LEVEL[folder_of(name)]
    upwards = {i for i in GRAPH[name] if folder_of(i) != own and LEVEL[folder_of(i)] >= level}
    if name == "fused_peft.__main__":
        upwards -= {"fused_peft"}
    assert not upwards


def test_there_are_no_circles():
    waiting = {name: set(needs) for name, needs in GRAPH.items()}
    while free := [name for name, needs in waiting.items() if not needs]:
        for name in free:
            del waiting[name]
        for needs in waiting.values():
            needs.difference_update(free)
    assert not waiting


def test_a_rule_catches_an_import_inside_a_function(tmp_path, monkeypatch):
    file = tmp_path / "fused_peft/core/x.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from ..model import layer\n    from .. import methods\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "fused_peft/model").mkdir()
    (tmp_path / "fused_peft/model/layer.py").touch()
    (tmp_path / "fused_peft/methods").mkdir()
    assert imports(file) == {"fused_peft.model.layer", "fused_peft.methods"}


@pytest.mark.parametrize("folder", sorted(set(LEVEL) - {"methods", "__init__", "__main__"}))
def test_only_methods_name_a_method(folder):
    """Anywhere else a method is asked for what it declares."""
    names = {m.name for m in METHODS.values()} if folder in ("core", "backends") else set()
    names |= {n for m in METHODS.values() for n in m.disk} if folder in ("core", "backends") else set()
    for file in files(f"fused_peft/{folder}"):
        assert not set(re.findall(r"\w+", file.read_text())) & names, file


@pytest.mark.parametrize("file", files("kernels"), ids=lambda f: f.stem)
def test_a_kernel_imports_triton_torch_and_configs_only(file):
    assert {name.split(".")[0] for name in imports(file)} <= {"triton", "torch", "kernels"} | sys.stdlib_module_names


def test_only_ops_saves_for_backward():
    """And its likes for rows in groups."""
    allowed = {PACKAGE / f"core/{name}.py" for name in ("ops", "grouped", "experts")}
    for file in [*PACKAGE.rglob("*.py"), *files("kernels")]:
        assert file in allowed or "save_for_backward" not in file.read_text(), file


def test_the_oracle_is_independent():
    assert not {name for name in imports(ROOT / "tests/paper.py") if "fused_peft" in name}


def test_kernels_is_not_a_regular_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_unused_module():
    """Every file of the package is imported by another, or is an entry point."""
    used = set().union(*GRAPH.values())
    for name, file in SOURCES.items():
        entry = name in ("fused_peft", "fused_peft.__main__") or "integrations" in name or file.name == "__init__.py"
        assert entry or name in used or name.endswith("distributed.parallel"), file


PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}


def _blocks(language: str) -> list[str]:
    return [block for text in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_every_page_opens_with_words():
    for page, text in PAGES.items():
        first = [line for line in text.splitlines() if line][1]
        assert text.startswith("# "), page
        assert re.match(r"[A-Z`]", first), f"{page}: {first}"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_a_page_exists(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    words = [w for w in re.findall(r"`([\w./-]+(?:\.(?:py|csv|sh|cuh|cu|toml)|/))`", text) if "NAME" not in w]
    missing = [w for w in words if not (ROOT / w).exists() and not (PACKAGE / w).exists()]
    for link in re.findall(r"\]\(([^):]+)\)", text):
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
            missing.append(link)
    assert not missing


def _anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


LAYER = {"shape": "2048x768x3072 r=8", "dtype": "fp32", "step": "forward + backward", "threads": "2"}


def test_the_readmes_figures_come_from_the_results():
    import csv

    def rows(name: str, **chosen: str) -> list[dict[str, str]]:
        with (ROOT / "bench/results" / name).open() as file:
            return [r for r in csv.DictReader(file) if all(r[k] == v for k, v in chosen.items())]

    def time(method: str, who: str) -> str:
        (row,) = rows("cpu/layers.csv", **LAYER, method=method, contender=who)
        return f"{float(row['ratio_p50']):.2f}"

    def kept(method: str, who: str) -> str:
        (row,) = rows("cpu/memory.csv", method=method, contender=who)
        return f"{int(row['kept_bytes']) / int(row['x_bytes']):.2f}"

    def on_gpu(who: str) -> str:
        (row,) = rows("gpu/speed.csv", method="lora", contender=who, M="8192", K="4096", N="4096", r="16", dtype="bf16",
                      graph="yes", step="both")  # fmt: skip
        return f"{float(row['ratio_p50']):.2f}"

    trained = rows("cpu/training.csv", contender="accelerated", threads="1")
    saved = [100 * (1 - float(r["vs_peft_p50"])) for r in trained if r["method"] != "ia3"]
    (layer,) = rows("cpu/layers.csv", **LAYER, method="lora", contender="ours")
    lora, lora_dropout, dora = ((time(m, "ours"), time(m, "peft")) for m in ("lora", "lora+dropout", "dora"))
    text = " ".join(README.split())
    for said in (
        f"takes {min(saved):.0f} to {max(saved):.0f} % less time",
        f"the time is {100 * (1 - float(layer['vs_peft_p50'])):.0f} % less",
        f"{lora[0]} of the frozen layer's, PEFT's {lora[1]}",
        f"with dropout {lora_dropout[0]} against {lora_dropout[1]}",
        f"DoRA {dora[0]} against {dora[1]}",
        f"LoRA takes {on_gpu('gluon')} of the frozen layer's time, PEFT's {on_gpu('peft_half')} with bf16 adapters",
        f"and {on_gpu('peft')} with its default fp32 ones",
        f"keeps its input and {kept('lora', 'ours')} times as much again",
        f"PEFT's keeps {kept('lora', 'peft')} times as much again, and {kept('lora+dropout', 'peft')} with dropout",
        f"{len(METHODS)} methods",
    ):
        assert said in text, said
    assert kept("lora", "ours") == kept("lora+dropout", "ours")  # "with dropout too"


def test_the_page_about_experts_names_the_methods():
    can, cannot = PAGES["docs/experts.md"].partition("## Which methods")[2].partition("## ")[0].split("The others", 1)
    acts = {n for n, m in METHODS.items() if why_not_method(m, m.example(2), stacked=True, routed=True) is None}
    assert set(re.findall(r"`(\w+)`", can)) == acts
    assert set(re.findall(r"`(\w+)`", cannot)) == set(METHODS) - acts


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(((?:docs/)?\w[\w-]*\.md)", README))
    assert linked == set(PAGES) - {"README.md"}


_RECIPES = """
import json, os, sys, traceback
found = []
for i, recipe in enumerate(json.load(sys.stdin)):
    os.makedirs(str(i)), os.chdir(str(i))
    try:
        exec(recipe, {"__name__": "__main__"})
        found.append("")
    except BaseException:
        found.append(traceback.format_exc())
    os.chdir("..")
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def recipes_run(tmp_path_factory):
    """{recipe: how it failed, or nothing}; one process for all, each with names and a folder of its own."""
    folder, recipes = tmp_path_factory.mktemp("recipes"), _blocks("python")
    command = [sys.executable, "-c", _RECIPES]
    run = subprocess.run(command, input=json.dumps(recipes), cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(zip(recipes, json.loads((folder / "found.json").read_text()), strict=True))


@pytest.mark.parametrize("recipe", _blocks("python"), ids=lambda r: r.strip().splitlines()[-1][:40])
def test_every_python_recipe_in_the_pages_runs(recipe, recipes_run):
    assert not recipes_run[recipe], recipes_run[recipe]


_IN_THE_INTERPRETER = """
import torch, example
x = torch.randn(37, 70)[:, :65]
torch.testing.assert_close(example.doubled(x), 2 * x, rtol=0, atol=0)
"""


def test_the_kernel_of_the_page_about_extending_runs(tmp_path):
    (kernel,) = re.findall(r"```py\n(.*?)```", PAGES["docs/extend.md"], re.S)
    (tmp_path / "example.py").write_text(kernel)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _IN_THE_INTERPRETER]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_readmes_one_line_is_all_that_a_script_needs(monkeypatch):
    """What the diff shows runs, as it was and with its one line, on a small model of the kind that it loads."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import fused_peft as fp

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=9))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: copy.deepcopy(model))
    (diff,) = _blocks("diff")
    before = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
    after = [line[1:] for line in diff.splitlines()]
    assert len(after) == len(before) + 1
    forms = []
    for lines in (before, after):
        names = {"peft": peft, "fp": fp, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
        exec("\n".join(lines), names)
        forms.append({row.form for row in fp.explain(names["model"])})
    assert forms[1] == {"factors"} != forms[0]


def test_every_command_in_the_pages_is_known():
    makefile = (ROOT / "Makefile").read_text()
    for line in filter(None, "\n".join(_blocks("bash")).splitlines()):
        command = line.partition("#")[0].split()
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M), line
        elif command[:3] == ["python", "-m", "fused_peft"]:
            with pytest.raises(SystemExit, match="0"):
                main([command[3], "--help"])
        elif command[:3] == ["python", "-m", "pytest"]:
            subprocess.run([sys.executable, "-m", "pytest", "--collect-only", *command[3:]], cwd=ROOT, check=True)
        elif command[0].endswith(".sh"):
            assert (ROOT / command[0]).is_file(), line
        elif command[0] in ("python", "torchrun"):
            at = next(i for i, word in enumerate(command) if word.endswith(".py"))
            script = ROOT / command[at]
            text = script.read_text()
            if "import shared" in text or "from shared" in text:
                text += (script.parent / "shared.py").read_text()
            options = [word for word in command[at:] if word.startswith("--")]
            assert "argparse" in text, line
            assert all(f'"{option}"' in text for option in options), line
        else:
            assert command[:2] == ["pip", "install"], line


@pytest.mark.parametrize("page", PAGES)
def test_tables_come_from_the_results(page):
    sys.path.insert(0, str(ROOT / "bench"))
    import report

    assert report.render(PAGES[page]) == PAGES[page], "run `make report`"


def test_every_table_stands_in_a_page():
    sys.path.insert(0, str(ROOT / "bench"))
    import report

    marked = [name for text in PAGES.values() for name in re.findall(r"<!-- ([\w-]+) -->", text)]
    assert sorted(marked) == sorted(report.TABLES)


INTERNALS = PACKAGE / "core/torch_internals.py"
PRIVATE = r"torch\._[A-Za-z]\w*|torch\.utils\._\w+|torch\.ops\.aten\._\w+|_aten\._\w+|from torch import.* _[A-Za-z]"


def test_private_names_of_torch_stand_in_one_file():
    for file in PACKAGE.rglob("*.py"):
        assert file == INTERNALS or not re.findall(PRIVATE, file.read_text()), file


def test_private_names_of_torch_are_still_there():
    """Where one is gone its stand-in runs, slower: this test is how that is noticed."""
    import torch

    for name in ("_are_functorch_transforms_active", "_is_tracing", "_is_any_autocast_enabled"):
        assert hasattr(torch._C, name), name
    assert hasattr(torch.ops.aten, "_unsafe_view")
    assert hasattr(torch, "_assert_async")
    assert hasattr(super(torch.autograd.Function, torch.autograd.Function), "apply")
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    assert is_traceable_wrapper_subclass


def test_the_stand_ins_for_private_names_work():
    """A layer trains to the same gradients in a process where those names are gone."""
    code = """
import importlib.util, sys, types
import torch
class Gone:
    def __init__(self, own, names): self.own, self.names = own, names
    def __getattr__(self, name):
        if name in self.names: raise AttributeError(name)
        return getattr(self.own, name)
if {gone}:
    real = torch._C
    torch._C = Gone(real, ("_are_functorch_transforms_active", "_is_tracing", "_is_any_autocast_enabled"))
    torch.ops.aten = Gone(torch.ops.aten, ("_unsafe_view",))
    wrapped = sys.modules["torch.utils._python_dispatch"]
    sys.modules["torch.utils._python_dispatch"] = Gone(wrapped, ("is_traceable_wrapper_subclass",))
    spec = importlib.util.spec_from_file_location("fused_peft.core.torch_internals", {internals})
    internals = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(internals)
    torch._C, torch.ops.aten = real, torch.ops.aten.own
    sys.modules["torch.utils._python_dispatch"] = wrapped
    base = types.SimpleNamespace(Function=real._FunctionBase)  # as if nothing above Function had apply
    internals.torch = types.SimpleNamespace(autograd=base)
    assert internals.unsafe_view is torch.ops.aten.view
    assert internals.tracing is torch.jit.is_tracing
    assert internals.is_traceable_wrapper_subclass.__module__ == spec.name
    assert not internals.is_traceable_wrapper_subclass(torch.ones(1))
import fused_peft as fp
torch.manual_seed(0)
layer = fp.PeftLinear(8, 6, config=fp.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
y = layer(torch.randn(3, 8))
y.square().sum().backward()
if {gone}:
    from fused_peft.core import ops
    assert ops.tracing is internals.tracing
    assert ops._apply.__func__ is torch.autograd.Function.apply.__func__
print([p.grad.sum().item() for p in layer.adapter_tensors()])
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code.replace("{gone}", str(gone)).replace("{internals}", repr(str(INTERNALS)))],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        for gone in (False, True)
    ]
    assert runs[0].stdout == runs[1].stdout
