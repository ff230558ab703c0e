"""docs/troubleshooting.md has every reason and message that the library can give, and none that it cannot."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_peft"
PAGE = (ROOT / "docs/troubleshooting.md").read_text()

GAP = "..."  # on the page: whatever a message has there
# errors of an argument name it, its value and what is allowed; the others are raised for developers, or caught within
ELSEWHERE = {"ValueError", "TypeError", "KeyError", "IndexError", "AttributeError", "NoPlan", "BuildError"}
TABLES = {"peft_unfused.py"}  # whose strings are reasons wherever they stand
# strings that look like messages and are shown to nobody, or only as a part of one
NOT_MESSAGES = (
    r"^(aten::|csrc/replay|the .* backend starts kernels|nothing tests it, since|nothing computes on DTensors)"
)


def said(node: ast.AST) -> str:
    """A literal with a gap for each value in it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(said(v) if isinstance(v, ast.Constant) else GAP for v in node.values)
    if isinstance(node, ast.BinOp):
        return said(node.left) + said(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else GAP


def literals(node: ast.AST) -> Iterator[str]:
    """The messages among the strings in an expression: those of four words or more."""
    if isinstance(node, (ast.Constant, ast.JoinedStr)) or (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    ):
        text = said(node).strip()
        if len(re.findall(r"[A-Za-z]{2,}", text)) >= 4 and " " in text:
            yield text
            return
    for child in ast.iter_child_nodes(node):
        yield from literals(child)


def gives_reasons(function: ast.FunctionDef) -> bool:
    """By its annotation: a reason or something else, or a list of them."""
    gives = ast.unparse(function.returns) if function.returns else ""
    named = gives == "str" and function.name.startswith(("_about_", "about_"))
    return named or gives == "list[str]" or ("str" in gives.split(" | ") and "|" in gives)


def in_reasons(function: ast.FunctionDef) -> Iterator[str]:
    """What it returns, or puts into what it returns."""
    for node in ast.walk(function):
        appends = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if appends or (isinstance(node, (ast.Return, ast.Assign, ast.AugAssign)) and node.value is not None):
            yield from literals(node.value)


def messages(tree: ast.Module, table: bool = False) -> set[str]:
    """What a file can say: reasons, warnings, and errors that are about no argument."""
    found = set(literals(ast.Module([n for n in tree.body if isinstance(n, ast.Assign)], []))) if table else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and gives_reasons(node):
            found.update(in_reasons(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warnings.warn"):
            found.update(literals(node.args[0]))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func).split(".")[-1] not in ELSEWHERE:
                found.update(literals(node.exc.args[0]))
    return {text for text in found if not re.match(NOT_MESSAGES, text)}


FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if not f.name.startswith(("compile_", "__main__"))]
TREES = {str(f.relative_to(PACKAGE)): ast.parse(f.read_text()) for f in FILES}
SAID = {f"{n}: {t}": t for n, tree in TREES.items() for t in sorted(messages(tree, Path(n).name in TABLES))}
EVERYTHING = [text for tree in TREES.values() for text in literals(tree)]


def plain(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def entries(page: str) -> list[str]:
    """The messages at the head of the page's rows."""
    rows = re.findall(r"^\| `(.+?)` \|", page, re.M)
    return [row.replace(r"\|", "|") for row in rows]


def pattern(entry: str) -> re.Pattern:
    """Matches a message that contains the entry; a gap in either stands for anything."""
    words = ".*".join(re.escape(part) for part in plain(entry).split(GAP))
    return re.compile(words)


ENTRIES = entries(PAGE)


def test_there_is_something_to_look_for():
    assert len(SAID) > 150


@pytest.mark.parametrize("where", SAID)
def test_every_message_is_on_the_page(where):
    assert any(pattern(entry).search(plain(SAID[where])) for entry in ENTRIES), SAID[where]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_a_message(entry):
    """Of the code as it is, errors of arguments included."""
    assert any(pattern(entry).search(plain(text)) for text in EVERYTHING), entry


def test_each_entry_has_its_cure():
    for row in re.findall(r"^\| `.+?` \|(.*)\|$", PAGE, re.M):
        assert row.strip().endswith((".", ")")), row
    assert len(ENTRIES) == len(set(ENTRIES))


def test_a_new_reason_would_be_missed():
    tree = ast.parse('def why(x) -> str | None:\n    return f"{x} is not what the kernel takes"\n')
    (text,) = messages(tree)
    assert text == "... is not what the kernel takes"
    assert not any(pattern(entry).search(text) for entry in ENTRIES)
    assert messages(ast.parse('raise ValueError(f"x={x} must be one of the four")')) == set()
