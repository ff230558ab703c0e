"""python -m fused_peft, as a user runs it, and that what the package says can be printed anywhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_peft import __main__ as cli
from fused_peft import __version__, source_dir
from fused_peft.methods import METHODS
from fused_peft.tools import verify

PACKAGE = Path(cli.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *source_dir("kernels").rglob("*.py")])

# every method's layers: what a user prints of them
PRINTS = """
import dataclasses, torch, fused_peft as fp
from fused_peft.methods import METHODS
for name, method in METHODS.items():
    config = dataclasses.replace(method.example(2), target_modules=["0"])
    model = fp.get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 12)), config)
    print(fp.explain(model))
    print(model)
    fp.print_trainable_parameters(model)
print(fp.estimate(torch.nn.Sequential(torch.nn.Linear(12, 12)), config, tokens=64))
"""
# a reason of the machine's own words
FOREIGN = """
import sys
from fused_peft import __main__ as cli
from fused_peft.core import dispatch
class Foreign:
    name, priority = "foreign", 1
    def available(self): return ["no kernel in C:/Users/J\\u00f6rg/\\u30ab"]
dispatch.register(Foreign())
sys.argv = ["fused_peft", "info"]
sys.exit(cli.run())
"""


def python(*arguments, **environment):
    """A process of its own; its return code, stdout and stderr."""
    run = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, encoding="cp1252",
        check=False,
    )  # fmt: skip
    return run.returncode, run.stdout, run.stderr


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert torch.__version__ in out
    assert "eager: available" in out


def test_verify_prints_every_method_and_fails_when_a_figure_does(capsys, monkeypatch):
    monkeypatch.setattr(
        verify, "configs", lambda real=verify.configs: {k: v for k, v in real().items() if k in ("lora", "ssb")}
    )
    assert cli.main(["verify", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("dlora_B") == out.count("dd_out") == 3
    assert "all within their limits" in out
    monkeypatch.setattr(verify, "LIMITS", dict.fromkeys(verify.LIMITS, 1e-12))
    assert cli.main(["verify", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_methods_lists_every_method_with_its_count(capsys):
    assert cli.main(["methods", "--in", "100", "--out", "50", "--r", "4"]) == 0
    out = capsys.readouterr().out
    header, *lines = (re.split(r"\s{2,}", line) for line in out.splitlines()[1:])
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert set(rows) == set(METHODS)
    assert [rows[m]["trainable"] for m in ("lora", "ssb", "dora")] == [str(4 * 150), "150", "650"]
    assert rows["parallel_adapter"]["mergeable"] == "no"
    assert rows["svdiff"]["form"] == "factors or weight"
    assert rows["dora"]["stored"] == "lora_A.weight lora_B.weight lora_magnitude_vector"


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([])
    assert e.value.code == 2
    assert "info" in capsys.readouterr().err


def test_version():
    assert python("-m", "fused_peft", "--version") == (0, f"fused_peft {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["methods"], ["info"], ["--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(arguments):
    """``| head -2``, and its worst case: the reader has gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fused_peft", *arguments]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert run.stderr == b""
    assert run.returncode in (0, 141)  # argparse, which prints the help, says nothing of it


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("code", [PRINTS, FOREIGN], ids=["models", "foreign words"])
def test_output_prints_in_any_encoding(code, encoding):
    returncode, out, err = python("-c", code, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert returncode == 0, err
    assert out


def strings(source: str):
    """(line, text) of every string literal that is not a docstring, the pieces of f-strings included."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def test_strings_finds_all_but_docstrings():
    source = '"""a"""\nx = "b"\ndef f():\n    """c"""\n    raise ValueError(f"d {x} e" "f")\n'
    assert {text for _, text in strings(source)} == {"b", "d ", " ef"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_text_of_the_package_is_plain_ascii(file):
    """Printed or raised, a text must not fail where stdout is cp1252 or ASCII: W * (1 + s*BA), not the sign."""
    found = [(line, text) for line, text in strings(file.read_text("utf-8")) if not text.isascii()]
    assert not found, f"{file.name}: write these in ASCII"
