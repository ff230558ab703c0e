"""Which modules a config adapts: the rules of Hugging Face PEFT, by module name."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from ..core.frozen import is_foreign, is_linear
from ..methods import PeftConfig
from .layer import PeftLayer, PeftLinear, why_not_adaptable
from .moe_names import converted, renamed
from .parameter import base_of
from .parameter import why_not as why_not_parameter
from .reads import experts

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# what the layers of an expert are called where they are linear layers
_EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

_short = reprlib.Repr()  # a config's value as a message shows it: a few entries of a long one
_short.maxlist, _short.maxstring, _short.maxother = 3, 60, 80
shown = _short.repr


def ends(name: str) -> list[str]:
    """The name and every run of its last parts: a.b.c, b.c, c."""
    return [name, *(name[i + 1 :] for i, c in enumerate(name) if c == ".")]


def ends_with_any(name: str, wanted: Iterable[str]) -> bool:
    return not set(ends(name)).isdisjoint(wanted)


def layer_index(name: str, patterns) -> int | None:
    """The first numbered segment behind one of the patterns (any container when there is none)."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return int(found[1]) if found else None


def left_out(config: PeftConfig, name: str) -> bool:
    """Whether a config keeps the module of this name from being adapted: excluded, or trained whole."""
    excluded = config.exclude_modules
    if excluded:
        if re.fullmatch(excluded, name) if isinstance(excluded, str) else ends_with_any(name, excluded):
            return True
    return trained_whole(config, name)


def trained_whole(config: PeftConfig, name: str) -> bool:
    """Whether modules_to_save means the module of this name, or one around it."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ())


def target_set(config: PeftConfig) -> frozenset[str] | None:
    """The names in target_modules, for ``asked_for`` of many names; None where they are no list."""
    return frozenset(config.target_modules) if isinstance(config.target_modules, list) else None


def asked_for(config: PeftConfig, name: str, listed: frozenset[str] | None = None) -> bool:
    """Whether target_modules, within layers_to_transform, means the module of this name. listed: their ``target_set``,
    without which a list of thousands is walked through for each name."""
    targets, layers = listed or config.target_modules, config.layers_to_transform
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    if targets is not None:
        if name in targets:
            return True
        if not ends_with_any(name, targets):
            return False
    if layers is None or layers == []:
        return True
    return layer_index(name, config.layers_pattern) in ([layers] if isinstance(layers, int) else layers)


def is_target(config: PeftConfig, name: str, listed: frozenset[str] | None = None) -> bool:
    """Whether a resolved config means the module of this name; target_modules=None means every module."""
    return not left_out(config, name) and asked_for(config, name, listed)


def _all_linear(model: nn.Module, task_type: str | None) -> list[str]:
    """Every linear layer but the output embedding, or the classification head of a SEQ_CLS model."""
    names = {name: module for name, module in model.named_modules() if is_linear(module)}
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        if head is None and task_type == "SEQ_CLS":
            head = getattr(model, "score", None) or getattr(model, "classifier", None)
        names = {name: module for name, module in names.items() if module is not head}
    return list(names)


def _model_type(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return (config.get if isinstance(config, dict) else partial(getattr, config))("model_type", "custom")


def wants_all_linear(config: PeftConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def resolve(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config with target_modules (and other architecture defaults) and modules_to_save made explicit.

    Raises ValueError when target_modules is None and the architecture has no default.
    """
    found = {}
    heads = HEADS.get(config.task_type, ())
    if heads:
        saved = config.modules_to_save or []
        found["modules_to_save"] = [*saved, *(h for h in heads if h not in saved)]
    model_type = _model_type(model)
    for name, table in config.target_defaults.items():
        if getattr(config, name) is None:
            if model_type not in table and name == "target_modules":
                if config.target_parameters:  # which alone are adapted then
                    found[name] = []
                    continue
                raise ValueError(
                    f"{name}=None, but there is no default for model_type {model_type!r}; give {name} as names, a "
                    "regular expression or 'all-linear'"
                )
            found[name] = table.get(model_type, [])
    if wants_all_linear(config):
        found["target_modules"] = _all_linear(model, config.task_type)
    return converted(model, config.resolved(**found), config)


def find_targets(
    model: nn.Module, config: PeftConfig, asked: PeftConfig | None = None, again: bool = False
) -> dict[str, nn.Module]:
    """{name: linear module or nn.Embedding} that a resolved config adapts. asked: the user's own config, which errors
    quote. again: a layer that is adapted already is found too.

    Raises ValueError when nothing matches, naming near misses, and TypeError when a match cannot be adapted.
    """
    asked = asked or config
    modules, listed = dict(model.named_modules()), target_set(config)
    found = {name: module for name, module in modules.items() if name and is_target(config, name, listed)}
    if config.target_modules is None:
        found = {name: module for name, module in found.items() if is_linear(module) and module.bias is not None}
    if not found and not find_parameters(model, config):
        raise ValueError(_no_match(model, asked, config))
    for name, module in found.items():
        reason = None if again and isinstance(module, PeftLayer) else why_not_adaptable(module, lookups=True)
        parent, _, last = name.rpartition(".")
        if isinstance(modules[parent], nn.TransformerEncoderLayer) and last in ("linear1", "linear2"):
            reason = "nn.TransformerEncoderLayer reads its weight directly in eval mode, past any adapter; exclude it"
        if reason:
            raise TypeError(f"target_modules={shown(asked.target_modules)} matches {name!r}, but {reason}")
    return found


def find_parameters(model: nn.Module, config: PeftConfig) -> dict[str, tuple[nn.Module, str]]:
    """{full name: (the module that holds it, its name there)} of the parameters that target_parameters means, among
    them what a quantiser or a parametrization has put in the place of one: ``check_parameters`` says so."""
    wanted, found = frozenset(config.target_parameters or ()), {}
    last = {entry.rpartition(".")[2] for entry in wanted}
    for owner_name, owner in model.named_modules() if wanted else ():
        replaced = {*owner.__dict__, *owner._modules.get("parametrizations", ())} & last
        for key in (*owner._parameters, *sorted(replaced)):
            name = f"{owner_name}.{key}" if owner_name else key
            held = key in replaced or owner._parameters[key] is not None
            if held and ends_with_any(name, wanted) and not left_out(config, name):
                found[name] = owner, key
    return found


def check_parameters(found: dict[str, tuple[nn.Module, str]], asked: PeftConfig, again: bool = False) -> None:
    """TypeError that names the first of them that cannot carry an adapter. again: one that does so already may."""
    for name, (owner, key) in found.items():
        if again and key in getattr(owner, "_held", ()):
            continue
        if reason := _why_not(owner, key) or why_not_parameter(owner, key):
            raise TypeError(f"target_parameters={shown(asked.target_parameters)} matches {name!r}, but {reason}")


def _why_not(owner: nn.Module, key: str) -> str | None:
    if is_linear(owner):
        return f"it belongs to a linear layer; give {key!r}'s module in target_modules"
    if isinstance(owner, (nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase)):
        return f"a {base_of(owner).__name__} does not multiply rows by it"
    return None


def second_names(model: nn.Module) -> dict[str, str]:
    """{further name of a module that is registered more than once: the first, by which it is matched, as in PEFT}."""
    first = {id(module): name for name, module in model.named_modules()}
    every = ((name, first[id(module)]) for name, module in model.named_modules(remove_duplicate=False))
    return {name: known for name, known in every if name != known}


def nearest(entry: str, names: Iterable[str]) -> list[str]:
    """The names and last parts of names that an entry may have been meant for."""
    names = list(names)
    last = sorted({name.rpartition(".")[2] for name in names})
    return difflib.get_close_matches(entry, [*last, *names], n=3, cutoff=0.5)


def _no_match(model: nn.Module, asked: PeftConfig, config: PeftConfig) -> str:
    """Why no module is adapted, and what to write instead."""
    targets = asked.target_modules
    names = [name for name, _ in model.named_modules() if name]
    message = f"target_modules={shown(targets)} matches no module"
    for name, first in second_names(model).items():
        if asked_for(config, name) and not asked_for(config, first):
            return f"{message}; {name!r} is another name of {first!r}, and a module is matched by its first name"
    if isinstance(targets, str) and not wants_all_linear(asked):
        wanted = re.split(r"[|,\s]+", targets)
        if all(any(ends_with_any(name, (w,)) for name in names) for w in wanted):
            return f"{message}: a string is a regular expression for the full name; for names, target_modules={wanted}"
    if config.target_parameters:
        stacks = [f"{name}.{key}" for name, keys in experts(model).items() for key in keys]
        near = [
            n for entry in config.target_parameters for n in nearest(entry, [n for n, _ in model.named_parameters()])
        ]
        message += f", and target_parameters={shown(config.target_parameters)} no parameter"
        return (
            f"{message}; the nearest names are {', '.join(dict.fromkeys(near))}"
            if near
            else message + (f"; its stacks of experts are {', '.join(stacks[:4])}" if stacks else "")
        )
    if held := experts_asked_for(model, asked, config):
        name, parts = next(iter(held.items()))
        return f"{message}; {name} holds its experts in 3-D parameters: target_parameters={parts!r} adapts those"
    narrowed = {
        name: getattr(config, name)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if getattr(config, name)
    }
    if narrowed:
        message += " once narrowed by " + ", ".join(f"{name}={shown(value)}" for name, value in narrowed.items())
    linear = [n for n in names if is_linear(m := model.get_submodule(n)) or isinstance(m, PeftLinear)]
    near = [] if wants_all_linear(asked) else [n for entry in _listed(targets)[:4] for n in nearest(entry, linear)]
    if isinstance(targets, str):
        near += difflib.get_close_matches(targets.lower(), ["all-linear"])
    if near:
        return f"{message}; the nearest names are {', '.join(dict.fromkeys(near))}"
    if linear:
        last = sorted({name.rpartition(".")[2] for name in linear})
        return f"{message}; the model's linear layers end in {', '.join(last[:10])}"
    return f"{message}; the model has no linear layer below its root (wrap a lone layer with PeftLinear.from_linear)"


def _listed(value: Any) -> list:
    """The entries of a field: of a list, the keys of a table, or the one value."""
    if isinstance(value, (list, set, dict)):
        return list(value)
    return [] if value is None or (isinstance(value, str) and not value) else [value]


def given(model: nn.Module, asked: PeftConfig, field: str) -> list:
    """The entries of a field that the user chose: none of "all-linear", of the architecture's default (also where a
    stored config lists it) and of a task's heads."""
    entries, default = _listed(getattr(asked, field)), asked.target_defaults.get(field, {}).get(_model_type(model))
    if (field == "target_modules" and wants_all_linear(asked)) or set(entries) == set(_listed(default)):
        return []
    heads = HEADS.get(asked.task_type, ()) if field == "modules_to_save" else ()
    return [entry for entry in entries if entry not in heads]


def modules_to_save(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules trained whole: those whose name ends with an entry of modules_to_save, as PEFT matches. A
    module registered twice has two names, and each that is meant gets a copy of its own, as in PEFT.

    Raises ValueError for an entry that the user gave and that matches nothing, and for quantised modules.
    """
    wanted = config.modules_to_save or []
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name] if wanted else []
    for entry in wanted:
        if entry not in HEADS.get(config.task_type, ()) and not any(n.endswith(entry) for n in names):
            near = difflib.get_close_matches(entry, [n.rpartition(".")[2] for n in names], n=3)
            hint = f"; the nearest names are {', '.join(dict.fromkeys(near))}" if near else ""
            raise ValueError(f"modules_to_save={wanted!r}: {entry!r} matches no module{hint}")
    places = {}  # where the parent is registered twice, both names mean one place
    for name in (n for n in names if any(n.endswith(entry) for entry in wanted)):
        parent, _, last = name.rpartition(".")
        places.setdefault((id(model.get_submodule(parent)), last), name)
    found = places.values()
    found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]
    for name in found if not config.inference_mode else ():
        if how := _quantised(model.get_submodule(name)):
            raise ValueError(
                f"modules_to_save={wanted!r}: {name} would train whole, and {how}, which takes no gradient; keep it "
                f"out of the quantisation (BitsAndBytesConfig: llm_int8_skip_modules=[{name!r}])"
            )
    return found


def _quantised(module: nn.Module) -> str | None:
    """Which weight below a module is stored in a quantised format, or None."""
    for name, m in module.named_modules():
        for key, p in m._parameters.items():
            if p is not None and (is_foreign(p) or not p.is_floating_point() or p.itemsize == 1):
                kind = type(p).__name__ if is_foreign(p) else str(p.dtype)
                return f"{name}{'.' * bool(name)}{key} of its {type(m).__name__} is a {kind}"
    return None


def experts_asked_for(model: nn.Module, asked: PeftConfig, config: PeftConfig) -> dict[str, list[str]]:
    """{module that holds experts in 3-D parameters: those of them} where the user's target_modules would mean layers of
    an expert, and no target_parameters adapts them."""
    every, found = wants_all_linear(asked), {}
    if not every and not given(model, asked, "target_modules"):
        return {}
    adapted = find_parameters(model, config)
    for name, stacks in experts(model).items():
        parts = [*stacks]
        if re.search("expert|moe", type(model.get_submodule(name)).__name__, re.IGNORECASE):
            known = renamed(model)  # which ``converted`` has read
            parts += [part for layer in _EXPERT_LAYERS if layer not in known for part in (layer, f"0.{layer}")]
        means = every or any(asked_for(asked, f"{name}.{p}") and not left_out(config, f"{name}.{p}") for p in parts)
        left = [stack for stack in stacks if f"{name}.{stack}" not in adapted]
        if means and left and not left_out(config, name):
            found[name] = left
    return found


def expert_layers(model: nn.Module) -> list[str]:
    """The names that layers of the model's experts have, or had while they were linear layers."""
    parts = {*_EXPERT_LAYERS, *renamed(model), *(stack for stacks in experts(model).values() for stack in stacks)}
    held = set(experts(model)) | {n.rpartition(".")[0] for n, _ in model.named_modules()}
    return [f"{name}.{part}" for name in held for part in parts] if experts(model) else []


def embeddings(model: nn.Module, which: str) -> nn.Module | None:
    """A Transformers model's input or output embeddings."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        return None if get is None else get()
    except NotImplementedError:  # a Transformers model without any
        return None
