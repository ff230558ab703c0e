"""What the layers of an expert were called while each was a linear layer of its own, as users and PEFT still name them.

Transformers 5 keeps experts in stacks; Hugging Face PEFT 0.21 reads the old names in target_modules as the stacks that
hold those layers now (``peft.utils.transformers_weight_conversion``), for the architectures that Transformers lists.
Two layers that one stack holds share a rank of twice r, alpha doubled too, so that s stays.
"""

from __future__ import annotations

import importlib
import re
import reprlib
import warnings
from dataclasses import replace

from torch import nn

from ..core.frozen import is_linear
from ..methods import PeftConfig

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
# family -> {old name of a layer: the parameter that holds it now}
FAMILIES = {
    "mixtral": {"gate": "gate.weight", "w1": _GATE_UP, "w3": _GATE_UP, "w2": _DOWN},
    "qwen2_moe": {"gate": "gate.weight", "gate_proj": _GATE_UP, "up_proj": _GATE_UP, "down_proj": _DOWN},
}


def renamed(model: nn.Module) -> dict[str, str]:
    """{old name: parameter} of a model whose architecture PEFT reads by old names; empty for others."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    try:
        table = importlib.import_module("transformers.conversion_mapping")._MODEL_TO_CONVERSION_PATTERN
    except (ImportError, AttributeError):  # no Transformers, or another one
        table = {}
    return FAMILIES.get({"mixtral": "mixtral", **table}.get(model_type), {})


def _held(model: nn.Module, parameter: str) -> list[str]:
    """The modules that hold a parameter of this name, the end of its full name."""
    return [name[: -len(parameter) - 1] for name, _ in model.named_parameters() if name.endswith(f".{parameter}")]


def _means(targets: frozenset[str], name: str) -> bool:
    """Whether a list of targets means the module of this name: it, or its end, is among them."""
    return any(name[i:] in targets for i in (0, *(j + 1 for j, c in enumerate(name) if c == ".")))


def converted(model: nn.Module, config: PeftConfig, asked: PeftConfig) -> PeftConfig:
    """A resolved config with the old names of its target_modules as target_parameters, ranks and alphas as PEFT's.

    asked: the user's own. Raises ValueError where one of two layers that share a stack is named without the other.
    """
    old = renamed(model)
    if not old or config.target_modules is None:
        return config
    everything = isinstance(asked.target_modules, str) and asked.target_modules.lower() == "all-linear"
    targets = config.target_modules
    if isinstance(targets, str):
        named = {o for o, new in old.items() if any(re.fullmatch(targets, f"{m}.{o}") for m in _held(model, new))}
        if not named:
            return config
        targets = [name for name, _ in model.named_modules() if name and re.fullmatch(targets, name)]
    else:
        named = set(old) if everything else {t.rpartition(".")[2] for t in targets} & old.keys()
    if everything and config.dropout and "gate" in named:
        named.discard("gate")
        warnings.warn(
            f"target_modules='all-linear' leaves the routers out, since dropout={config.dropout} cannot act on their "
            "input; set it to 0 to adapt them too",
            stacklevel=6,  # the caller of get_peft_model
        )
    if not named:
        return config
    for new in {old[n] for n in named}:
        together = [n for n in old if old[n] == new]
        if missing := [n for n in together if n not in named]:
            here = ", ".join(n for n in together if n in named)
            raise ValueError(
                f"target_modules={asked.target_modules!r} names {here} without {', '.join(missing)}, and one "
                f"parameter, {new}, holds both for all experts; name both, or target_parameters={[new]!r}"
            )
    ends = tuple(f".{n}" for n in named)
    wanted = frozenset(targets)
    left = [n for n, m in model.named_modules() if is_linear(m) and n.endswith(ends) and _means(wanted, n)]
    if left:
        warnings.warn(
            f"target_modules={reprlib.repr(asked.target_modules)} leaves out {len(left)} linear layers (first: "
            f"{left[0]}): as in Hugging Face PEFT, {', '.join(sorted(named))} mean the experts' stacks alone in this "
            "model; a regular expression that matches no expert reaches those layers, with target_parameters beside it",
            stacklevel=6,
        )
    parameters = [*dict.fromkeys([*(config.target_parameters or ()), *(old[n] for n in sorted(named))])]
    changed = {
        "target_modules": [t for t in targets if t.rpartition(".")[2] not in named],
        "target_parameters": sorted(parameters),
    }
    if config.peft_type == "LORA" and _GATE_UP in parameters and (named & {"w1", "gate_proj"}):
        pattern = rf".*\.{_GATE_UP}"
        changed["rank_pattern"] = {**config.rank_pattern, pattern: 2 * config.r}
        if config.lora_alpha is not None:
            changed["alpha_pattern"] = {**config.alpha_pattern, pattern: 2 * config.lora_alpha}
    return replace(config, **changed)
