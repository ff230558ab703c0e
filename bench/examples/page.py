"""docs/tour.md: the words and the code of ``tour.py``, and what each part of it printed when it was run here.

python bench/examples/page.py
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
from pathlib import Path

TOUR = Path(__file__).resolve().parent / "tour.py"
PAGE = TOUR.parent.parent.parent / "docs/tour.md"
NOT_SHOWN = "say", "options"  # how the script speaks, and reads its command line


def cells(source: str) -> list[tuple[str, list[ast.stmt]]]:
    """(words, statements up to the next words) of a script; what stands above its first words goes into the first."""
    found: list[tuple[str, list[ast.stmt]]] = [("", [])]
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "say":
            found.append((ast.literal_eval(call.args[0]).strip(), []))
        else:
            found[-1][1].append(node)
    (_, above), (words, body), *rest = found
    return [(words, above + body), *rest]


def shown(source: str, body: list[ast.stmt]) -> str:
    """The code of a cell as it stands in the script, without the docstring and NOT_SHOWN."""
    lines, wanted = source.splitlines(), []
    for i, node in enumerate(body):
        names = [node.name] if isinstance(node, ast.FunctionDef) else map(ast.unparse, getattr(node, "targets", ()))
        called = ast.unparse(node).startswith(tuple(f"{name}." for name in NOT_SHOWN))
        if isinstance(getattr(node, "value", None), ast.Constant) or called or set(names) & set(NOT_SHOWN):
            continue
        first = body[i - 1].end_lineno if wanted and i else node.lineno - 1  # blank lines between two statements stay
        wanted += lines[first : node.end_lineno]
    return "\n".join(wanted).strip("\n")


def page(source: str, printed: list[str]) -> str:
    """The page in Markdown. ``py`` and not ``python``: a cell does not run without those above it."""
    parts = []
    for (words, body), text in zip(cells(source), printed, strict=True):
        code = shown(source, body)
        parts += [words, *([f"```py\n{code}\n```"] if code else []), *([f"```text\n{text}\n```"] if text else [])]
    return "\n\n".join(parts) + "\n"


def run(source: str) -> list[str]:
    """What each cell prints, all in one namespace."""
    names, printed = {"__name__": "__main__", "__doc__": ast.get_docstring(ast.parse(source))}, []
    exec("def say(words): pass", names)
    for _, body in cells(source):
        body = [node for node in body if getattr(node, "name", "") != "say"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(ast.Module(body, []), str(TOUR), "exec"), names)
        printed.append("\n".join(line.rstrip() for line in out.getvalue().strip().splitlines()))
    return printed


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    source = TOUR.read_text()
    PAGE.write_text(page(source, run(source)))
    print(f"{PAGE} is written", file=sys.stderr)


if __name__ == "__main__":
    main()
