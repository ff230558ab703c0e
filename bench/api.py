"""docs/api.md: every public name, its signature and its docstring, as ``help`` shows them.

python bench/api.py
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

import fused_peft as fp
from fused_peft.integrations.transformers import FusedPeftCallback
from fused_peft.methods.base import PeftConfig
from fused_peft.methods.low_rank import LowRankConfig
from fused_peft.model.prompt import SoftPromptConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/api.md"
OPENING = """# API

Every public name of `fused_peft`, with its signature and its docstring, which `help` shows too. Fields that several
configs share stand once, with the class that they come from.
"""
SECTIONS = {
    "Adapting a model": "get_peft_model add_adapter set_adapter delete_adapter disable_adapter adapter_batch",
    "Hugging Face PEFT's models": "accelerate restore FusedPeftCallback",
    "Saving and loading": "save_pretrained load_adapter load_config AdapterFormatError",
    "Merging and serving": "merge unmerge merge_and_unload merged_state_dict save_merged export_lora NotMergeableError",
    "Training": "on_step lora_plus_groups mpc_penalty orthogonality_penalty check_training",
    "What runs, and how large it is": "explain get_layer_status print_trainable_parameters estimate",
    "Backends": "calibrate set_backend set_strict StrictError source_dir",
    "Layers": "PeftLinear PeftEmbedding Factors",
    "Configs": "PeftConfig LowRankConfig SoftPromptConfig bottleneck "
    + " ".join(sorted(name for name in fp.__all__ if name.endswith("Config"))),
}
_TYPES = {"~_Model": "nn.Module"}
BEYOND = {c.__name__: c for c in (FusedPeftCallback, PeftConfig, LowRankConfig, SoftPromptConfig)}


def own_doc(thing) -> str:
    """A docstring, without what a config repeats of the class that it is made from."""
    said = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and issubclass(thing, PeftConfig) and thing is not PeftConfig:
        said = said.removesuffix(inspect.getdoc(thing.__mro__[1])).strip()
    return said


def markdown(text: str) -> str:
    """A docstring as Markdown: an indented paragraph is code, and "name: what it is" an entry of a list."""
    found = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if all(line.startswith("    ") for line in lines):
            found.append("```py\n" + inspect.cleandoc("\n" + paragraph) + "\n```")
            continue
        shown, before = [], ""  # an entry goes on to the next one, or to the paragraph's end
        for line in lines:
            words = line.strip().replace("``", "`").replace("<", "\\<")
            named = re.match(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)$", words)
            if named and before[-1:] in ("", ".", ":"):
                listing = any(entry.startswith("- ") for entry in shown)
                shown += [""] * (bool(shown) and not listing)
                names = ", ".join(f"`{name}`" for name in named[1].split(", "))
                shown.append(f"- {names}: {named[2]}")
            else:
                shown.append(("  " if shown and shown[-1].startswith(("- ", "  ")) else "") + words)
            before = words
        found.append("\n".join(shown))
    return "\n\n".join(found)


def signature(name: str, thing) -> str:
    """As code: a function's, or a class with the fields of its own."""
    if not inspect.isclass(thing):
        return f"{name}{_bare(thing)}"
    base = f"class {name}({thing.__mro__[1].__name__}):" if thing is not PeftConfig else f"class {name}:"
    if dataclasses.is_dataclass(thing) and issubclass(thing, PeftConfig):
        inherited = {} if thing is PeftConfig else {f.name: f for f in dataclasses.fields(thing.__mro__[1])}
        rows = [base] + [
            f"    {f.name}: {f.type} = {_default(f)}" for f in dataclasses.fields(thing) if _new(f, inherited)
        ]
        return "\n".join(rows if len(rows) > 1 else [f"{base} ..."])
    if issubclass(thing, Exception):
        return f"{base} ..."
    return f"{name}{_bare(thing.__init__)}".replace("(self, ", "(").replace("\n    self,", "").removesuffix(" -> None")


class _Said(str):
    """An annotation that is shown without quotes."""

    __repr__ = str.__str__


def _bare(call) -> str:
    """A signature as it was written, but for the names of type variables."""
    of = inspect.signature(call)
    bare = lambda kind: kind if kind is inspect.Signature.empty else _Said(_TYPES.get(str(kind), kind))  # noqa: E731
    parameters = [p.replace(annotation=bare(p.annotation)) for p in of.parameters.values()]
    whole = str(of.replace(parameters=parameters, return_annotation=bare(of.return_annotation)))
    if len(whole) <= 90:
        return whole
    lines, named = [], False  # else one to a line
    for p in parameters:
        lines += ["    *,"] * (p.kind is p.KEYWORD_ONLY and not named)
        named |= p.kind is p.KEYWORD_ONLY
        lines.append(f"    {p},")
    end = whole.rfind(") -> ")
    return "\n".join(["(", *lines, whole[end:] if end >= 0 else ")"])


def _new(f, inherited) -> bool:
    return f.name not in inherited or inherited[f.name].default != f.default


def _default(f) -> str:
    if isinstance(f.default, str):
        return f'"{f.default}"'  # as ruff writes it
    return "{}" if f.default is dataclasses.MISSING else repr(f.default)


def entry(name: str) -> str:
    thing = BEYOND.get(name) or getattr(fp, name)
    parts = [f"### `{name}`", f"```py\n{signature(name, thing)}\n```", markdown(own_doc(thing))]
    if inspect.isclass(thing) and not issubclass(thing, (PeftConfig, Exception)):
        for method, value in vars(thing).items():
            call = getattr(value, "__func__", value)
            if not method.startswith("_") and inspect.isfunction(call) and call.__doc__:
                parts += [f"#### `{name}.{method}`", f"```py\n{signature(method, call)}\n```", markdown(own_doc(call))]
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    listed = [name for names in SECTIONS.values() for name in names.split()]
    assert sorted(listed) == sorted({*fp.__all__, *BEYOND}), set(listed) ^ {*fp.__all__, *BEYOND}
    parts = [OPENING]
    for title, names in SECTIONS.items():
        parts += [f"## {title}\n", "\n\n".join(map(entry, names.split())) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(page(), "utf-8")
