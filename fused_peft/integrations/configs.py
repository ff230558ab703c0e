"""This library's configs where Hugging Face PEFT takes its own: each is a ``peft.PeftConfig``.

Importing this file puts PEFT's PeftConfig under ours as a base class. A config of a method that PEFT lacks goes through
PEFT as it is (``tuners``). One of a method that PEFT has gives way to PEFT's own, ``to_peft``, where a tuner is made or
an adapter is added; keys, files and everything else are then PEFT's, and ``peft`` accelerates the layers.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import hf_hub_download
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType

from ..core.imports import after_import
from ..methods import METHODS, PeftConfig, method_of
from ..methods.base import Root
from ..model import adapter_config, prompt
from .tuners import REGISTERED

_OURS = "_of_fused_peft"  # marks a config of PEFT's that stands in the place of one of this library's


def to_peft(config: PeftConfig) -> peft.PeftConfig:
    """PEFT's own config of the same method, or the config itself where PEFT has none.

    Raises ValueError for a setting that PEFT's lacks and for one that it has no such value of.
    """
    if config.peft_type in REGISTERED:
        return config
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type]
    entries, ignored = adapter_config.for_peft(config)
    known, defaults = {f.name for f in fields(kind)}, {f.name: f.default for f in fields(config)}
    unknown = entries.keys() - known
    lost = ignored | {k: entries[k] for k in sorted(unknown) if entries[k] not in (defaults[k], {}, [])}
    name = type(config).__name__
    if lost:
        raise ValueError(
            f"{', '.join(f'{k}={v!r}' for k, v in lost.items())} of fused_peft.{name} has no counterpart in "
            f"peft.{kind.__name__}; leave it out, or adapt with fused_peft.get_peft_model(model, config)"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS and not start.startswith("pissa_niter_"):
        raise ValueError(
            f"init_lora_weights={start!r} of fused_peft.{name} is a start that peft.{kind.__name__} lacks; adapt with "
            "fused_peft.get_peft_model(model, config)"
        )
    return kind(**{k: v for k, v in entries.items() if k in known})


_STARTS = ("gaussian", "pissa", "olora")  # of ours, those that PEFT has by the same name


def taken(config: Any) -> Any:
    """What PEFT goes on with where it is given a config."""
    if not isinstance(config, PeftConfig) or config.peft_type in REGISTERED:
        return config
    own = to_peft(config)
    setattr(own, _OURS, True)
    return own


def is_ours(config: Any) -> bool:
    """Whether a config of PEFT's stands in the place of one of this library's."""
    return getattr(config, _OURS, False)


def _to_dict(self) -> dict:
    return {"peft_type": self.peft_type, **self.stored()}


def _save(self, save_directory, auto_mapping_dict: dict | None = None, **kwargs) -> None:
    more = {} if auto_mapping_dict is None else {"auto_mapping": auto_mapping_dict}
    adapter_config.put_config(adapter_config.config_text(self, **more), Path(save_directory))


def _load(path, subfolder: str | None = None, **kwargs) -> PeftConfig:
    """The config in a folder, or in a repository of the hub."""
    folder = Path(path, subfolder or "")
    if not folder.exists() and not Path(path).is_absolute():
        how = {k: v for k, v in kwargs.items() if k in inspect.signature(hf_hub_download).parameters}
        folder = Path(hf_hub_download(str(path), adapter_config.CONFIG_NAME, subfolder=subfolder, **how)).parent
    return adapter_config.load_config(folder)


def _or_of_entries(init):
    """A config's ``__init__`` that takes a file's entries too: PEFT calls it so, with the peft_type among them."""

    @wraps(init)
    def __init__(self, *args, **entries) -> None:
        if "peft_type" not in entries:
            init(self, *args, **entries)
            return
        auto = entries.get("auto_mapping")
        self.__dict__.update(adapter_config.from_entries(entries).__dict__)
        if auto is not None:
            self.__dict__["auto_mapping"] = auto

    return __init__


def _become_pefts() -> None:
    """Make every config class a subclass of PEFT's, with PEFT's names for what it asks of one."""
    if PeftConfig.__bases__ != (Root,):
        return
    PeftConfig.__bases__ = (peft.PeftConfig,)
    PeftConfig.to_peft, PeftConfig.to_dict, PeftConfig.save_pretrained = to_peft, _to_dict, _save
    PeftConfig.from_pretrained = staticmethod(_load)
    for config in {m.config for m in METHODS.values()} | {*prompt.CONFIGS.values()}:
        if config.peft_type in REGISTERED:
            config.__init__ = _or_of_entries(config.__init__)
        config.peft_type = PeftType(config.peft_type)


def _tuner_takes_ours(init):
    @wraps(init)
    def __init__(self, model, peft_config, adapter_name, *args, **kwargs) -> None:
        if isinstance(peft_config, dict):
            peft_config = {**peft_config, adapter_name: taken(peft_config[adapter_name])}
        init(self, model, taken(peft_config), adapter_name, *args, **kwargs)

    __init__._takes_ours = True
    return __init__


def _model_takes_ours(add_adapter):
    @wraps(add_adapter)
    def add(self, adapter_name, peft_config, *args, **kwargs) -> None:
        add_adapter(self, adapter_name, taken(peft_config), *args, **kwargs)

    return add


def _knowing_names(build):
    """The renamings by which Transformers' ``load_adapter`` finds a file's tensors: those of methods that share a
    peft_type, and so are not named after it, among them."""

    @wraps(build)
    def mapping(weight_conversions, adapter_name, peft_config=None):
        made = build(weight_conversions, adapter_name, peft_config=peft_config)
        if made and isinstance(peft_config, PeftConfig):
            own = f"{method_of(peft_config).name}_"
            if own != PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]:
                renaming = type(made[0])(rf"({re.escape(own)}[^\.]*)", rf"\1.{adapter_name}")
                made.insert(2, renaming)  # behind those that take off the PeftModel's prefix
        return made

    mapping._knows_names = True
    return mapping


def _meet_conversion() -> None:
    module = sys.modules[_CONVERSION]
    if not hasattr(module.build_peft_weight_mapping, "_knows_names"):  # wrapped once
        module.build_peft_weight_mapping = _knowing_names(module.build_peft_weight_mapping)


_CONVERSION = "peft.utils.transformers_weight_conversion"  # which imports Transformers, and is not always there


_become_pefts()
after_import(_CONVERSION, _meet_conversion)
if not hasattr(BaseTuner.__init__, "_takes_ours"):  # wrapped once, though this file is imported anew
    BaseTuner.__init__ = _tuner_takes_ours(BaseTuner.__init__)
    for door in (peft.PeftModel, peft.PeftMixedModel):
        door.add_adapter = _model_takes_ours(door.add_adapter)
