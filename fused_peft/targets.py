"""Which modules a config adapts: the rules of Hugging Face PEFT, by module name."""

from __future__ import annotations

import difflib
import re

from torch import nn

from .linear import PeftLinear, is_linear, why_not_adaptable
from .methods import PeftConfig

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _ends_with_any(name: str, ends) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _layer_index(name: str, patterns) -> int | None:
    """The first numbered segment behind one of the patterns (any container when there is none)."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return int(found[1]) if found else None


def is_target(config: PeftConfig, name: str) -> bool:
    """Whether a resolved config means the module of this name; target_modules=None means every module."""
    excluded, targets = config.exclude_modules, config.target_modules
    if excluded:
        if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_with_any(name, excluded):
            return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ()):
        return False
    if targets is None:
        return True
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    if name in targets:
        return True
    layers = config.layers_to_transform
    if not _ends_with_any(name, targets):
        return False
    if layers is None or layers == []:
        return True
    return _layer_index(name, config.layers_pattern) in ([layers] if isinstance(layers, int) else layers)


def _all_linear(model: nn.Module, task_type: str | None) -> list[str]:
    """Every linear layer but the output embedding, or the classification head of a SEQ_CLS model."""
    names = {name: module for name, module in model.named_modules() if is_linear(module)}
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        if head is None and task_type == "SEQ_CLS":
            head = getattr(model, "score", None) or getattr(model, "classifier", None)
        names = {name: module for name, module in names.items() if module is not head}
    return list(names)


def resolve(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config with target_modules (and other architecture defaults) and modules_to_save made explicit.

    Raises ValueError when target_modules is None and the architecture has no default.
    """
    found = {}
    heads = _HEADS.get(config.task_type, ())
    if heads:
        saved = config.modules_to_save or []
        found["modules_to_save"] = [*saved, *(h for h in heads if h not in saved)]
    model_config = getattr(model, "config", None)
    if isinstance(model_config, dict):
        model_type = model_config.get("model_type", "custom")
    else:
        model_type = getattr(model_config, "model_type", "custom")
    for name, table in config.target_defaults.items():
        if getattr(config, name) is None:
            if model_type not in table and name == "target_modules":
                raise ValueError(
                    f"{name}=None, but there is no default for model_type {model_type!r}; give {name} as names, a "
                    "regular expression or 'all-linear'"
                )
            found[name] = table.get(model_type, [])
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        found["target_modules"] = _all_linear(model, config.task_type)
    return config.resolved(**found)


def find_targets(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """{name: linear module} that a resolved config adapts.

    Raises ValueError when nothing matches, naming near misses, and TypeError when a match cannot be adapted.
    """
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if name and is_target(config, name)}
    if config.target_modules is None:
        found = {name: module for name, module in found.items() if is_linear(module) and module.bias is not None}
    if not found:
        raise ValueError(_no_match(config, modules))
    for name, module in found.items():
        reason = why_not_adaptable(module)
        parent, _, last = name.rpartition(".")
        if isinstance(modules[parent], nn.TransformerEncoderLayer) and last in ("linear1", "linear2"):
            reason = "nn.TransformerEncoderLayer reads its weight directly in eval mode, past any adapter; exclude it"
        if reason:
            raise TypeError(f"target_modules={config.target_modules!r} matches {name!r}, but {reason}")
    return found


def _no_match(config: PeftConfig, modules: dict[str, nn.Module]) -> str:
    linear = [
        name for name, module in modules.items() if name and (is_linear(module) or isinstance(module, PeftLinear))
    ]
    ends = sorted({name.rpartition(".")[2] for name in linear})
    wanted = config.target_modules or []
    wanted = [wanted] if isinstance(wanted, str) else wanted
    near = [n for w in wanted for n in difflib.get_close_matches(w, ends + linear, n=3, cutoff=0.5)]
    narrowed = {
        name: getattr(config, name)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if getattr(config, name)
    }
    message = f"target_modules={config.target_modules!r} matches no module"
    if narrowed:
        message += f" once narrowed by {narrowed}"
    if near:
        return f"{message}; the nearest names are {', '.join(dict.fromkeys(near))}"
    if ends:
        return f"{message}; the model's linear layers end in {', '.join(ends[:20])}"
    return f"{message}; the model has no linear layer below its root (wrap a lone layer with PeftLinear.from_linear)"


def modules_to_save(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules trained whole: those whose name ends with an entry of modules_to_save, as PEFT matches.

    Raises ValueError for an entry that the user gave and that matches nothing.
    """
    wanted = config.modules_to_save or []
    names = [name for name, _ in model.named_modules() if name]
    for entry in wanted:
        if entry not in _HEADS.get(config.task_type, ()) and not any(n.endswith(entry) for n in names):
            near = difflib.get_close_matches(entry, [n.rpartition(".")[2] for n in names], n=3)
            hint = f"; the nearest names are {', '.join(dict.fromkeys(near))}" if near else ""
            raise ValueError(f"modules_to_save={wanted!r}: {entry!r} matches no module{hint}")
    found = [n for n in names if any(n.endswith(entry) for entry in wanted)]
    return [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]
