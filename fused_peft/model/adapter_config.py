"""adapter_config.json: a config as Hugging Face PEFT reads it, and so that it comes back here as it was.

Where PEFT must read something else to compute the same (it has no lora_alpha=None), the file holds what PEFT reads, and
a *note* keeps the config's class and the fields that a plain reading would change, as they were. It lies in the
metadata of the weights, or in the file itself for methods that PEFT lacks: PEFT warns of entries that it does not know.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..methods import METHODS, PeftConfig
from . import prompt
from .checks import few

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
NOTE = "fused_peft"  # the entry that holds the note
ENTRY = "fused_peft.adapter_config"  # the entry of a training checkpoint's state_dict that holds the config

# what PEFT writes beside the hyper-parameters, and settings that mean nothing unless another is on
_NEUTRAL = {"auto_mapping", "eva_config", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}

# what PEFT writes for a method although it changes nothing once the values are loaded: AdaLoRA's rank is init_r
_NEUTRAL_FOR = {
    "ADALORA": {"r", "init_lora_weights"},
    "DELORA": {"init_weights"},
    "PROMPT_TUNING": {"prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
}

# what an older version of this library wrote beside a lora_alpha of None, which it left out
_NO_ALPHA = {"r", "lora_dropout", "use_rslora", "alpha_pattern"}

# PEFT's initialisations that leave the base weight alone: of no consequence once the values are loaded
_INIT_ONLY = {"orthogonal", "eva"}


class AdapterFormatError(ValueError):
    """The folder does not hold an adapter that this library can load; the message names the file and the problem."""


def in_peft(config: PeftConfig) -> bool:
    """Whether stock Hugging Face PEFT has the method of this config."""
    return config.peft_type in prompt.CONFIGS or any(
        m.disk for m in METHODS.values() if m.config.peft_type == config.peft_type
    )


def reads_in_peft(config: PeftConfig) -> bool:
    """Whether stock PEFT loads what is saved with this config, and computes the same."""
    return in_peft(config) and not _document(config)[1]


def write_config(config: PeftConfig, path: Path) -> None:
    """Write the config into the folder ``path``, made if need be, marked for inference as PEFT does.

    The caller writes ``note(config)`` into the weights' metadata. Warns of settings that PEFT would ignore.
    """
    put_config(config_text(config), path)


def config_text(config: PeftConfig, **more: Any) -> str:
    """What goes into the file, with ``more`` entries. Warns of settings that PEFT would ignore."""
    document, ignored = _document(config)
    if ignored and in_peft(config):
        warnings.warn(
            f"Hugging Face PEFT ignores {ignored} of {config.peft_type.upper()}; it will load another adapter",
            stacklevel=4,
        )
    if not in_peft(config):
        document[NOTE] = note(config)
    return json.dumps(dict(sorted((document | more).items())), indent=2) + "\n"  # patterns keep their order


def put_config(text: str, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".{CONFIG_NAME}.{os.getpid()}"
    aside.write_text(text)
    os.replace(aside, path / CONFIG_NAME)


def _document(config: PeftConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the file's entries, those of them that PEFT would ignore)."""
    values = config.stored()
    defaults = _defaults(config)
    # PEFT and Transformers ask for the base model's name, known or not
    values = {
        k: v for k, v in values.items() if v is not None or defaults[k] is not None or k == "base_model_name_or_path"
    }
    foreign = {k: values[k] for k in config.beyond_peft & values.keys()}
    ignored = {k: v for k, v in foreign.items() if v != defaults[k]}
    read_there = config.for_peft() if in_peft(config) else {}
    document = {k: v for k, v in values.items() if k not in foreign} | read_there | ignored
    return document | {"peft_type": config.peft_type, "inference_mode": True}, ignored


def note(config: PeftConfig) -> dict[str, Any]:
    """{"class": the config's class, "fields": what a plain reading of its file would change, "of": which file}."""
    document = _document(config)[0]
    plainly = _plainly(document)
    defaults = _defaults(config)
    changed = {k: v for k, v in config.stored().items() if plainly.get(k, defaults[k]) != v}
    return {"class": type(config).__name__, "fields": changed, "of": _digest(document)}


def _defaults(config: PeftConfig) -> dict[str, Any]:
    return {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(config)}


def _digest(document: dict[str, Any]) -> int:
    """Of the entries that matter to a reading; the base model may have moved."""
    of_base = ("base_model_name_or_path", "revision", "auto_mapping")
    kept = {k: v for k, v in _plainly(document).items() if k not in (*of_base, NOTE)}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def _plainly(document: dict[str, Any]) -> dict[str, Any]:
    """The fields as a plain reading takes them: that the file is marked for inference says nothing of the config."""
    return {k: v for k, v in document.items() if k not in ("inference_mode", "peft_type")}


def load_config(path: str | os.PathLike[str]) -> PeftConfig:
    """The config stored in the folder ``path``, written by this library (equal to what was saved) or by PEFT.

    Raises FileNotFoundError, or AdapterFormatError for a broken file, an unknown method, or a setting that changes
    the result and that this library does not know.
    """
    file = _config_file(path)
    try:
        stored = json.loads(file.read_text())
        if not isinstance(stored, dict):
            raise TypeError(f"a table is needed, not {type(stored).__name__}")
    except (ValueError, TypeError) as e:
        raise AdapterFormatError(f"{file} is not an adapter config: {e}") from e
    left = _note_in_weights(file.parent) or stored.get(NOTE) or {}
    return _read(stored, left, file)


def packed(config: PeftConfig) -> Tensor:
    """The config and its note as bytes, for an entry of a state_dict."""
    text = json.dumps({"config": _document(config)[0], NOTE: note(config)})
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def unpacked(entry: Tensor) -> PeftConfig:
    """The config of such an entry. Raises as ``load_config``."""
    try:
        found = json.loads(bytes(entry.tolist()))
        stored, left = found["config"], found[NOTE]
    except (ValueError, KeyError, TypeError) as e:
        raise AdapterFormatError(f"{ENTRY} of the state_dict is not an adapter config: {e}") from e
    return _read(stored, left, ENTRY)


def from_entries(entries: dict[str, Any]) -> PeftConfig:
    """The config of a file's entries, its note among them. Raises as ``load_config``."""
    return _read(entries, entries.get(NOTE) or {}, CONFIG_NAME)


def for_peft(config: PeftConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what PEFT's own config of the method is made of, those settings that it would ignore)."""
    document, ignored = _document(config)
    found = {k: v for k, v in _plainly(document).items() if k not in ignored}
    return found | {"inference_mode": config.inference_mode}, ignored


def _read(stored: dict[str, Any], left: dict[str, Any], file: Path | str) -> PeftConfig:
    """The config of a document and its note; ``file`` is what errors name."""
    stored = {k: v for k, v in stored.items() if k != NOTE}
    try:
        peft_type = stored.pop("peft_type")
    except KeyError as e:
        raise AdapterFormatError(f"{file} is not an adapter config: {e}") from e
    known = dict(prompt.CONFIGS)
    for m in METHODS.values():  # of the configs that share a peft_type, the one the others derive from
        known[m.config.peft_type] = min(known.get(m.config.peft_type, m.config), m.config, key=lambda c: len(c.__mro__))
    if peft_type not in known:
        raise AdapterFormatError(f"{file}: peft_type={peft_type!r} is unknown; known: {', '.join(sorted(known))}")
    kind = known[peft_type]
    names = {f.name for f in fields(kind)}
    neutral = _NEUTRAL | _NEUTRAL_FOR.get(peft_type, set())
    unknown = {k: v for k, v in stored.items() if k not in names | neutral and v not in (None, False, {}, [])}
    if unknown:
        raise AdapterFormatError(f"{file}: {unknown} is not supported for {peft_type}; load this adapter with PEFT")
    if stored.get("init_lora_weights") in _INIT_ONLY:
        stored["init_lora_weights"] = True
    if stored.get("prompt_tuning_init") == "TEXT":  # of no consequence once the values are loaded
        stored["prompt_tuning_init"] = "RANDOM"
    flags = {f.name for f in fields(kind) if f.type == "bool"}
    values = {k: v for k, v in _plainly(stored).items() if k in names and not (v is None and k in flags)}
    if left.get("of") == _digest(stored):  # unless the file was edited since
        values |= {k: was for k, was in left.get("fields", {}).items() if k in names}
    ours = not left and stored.keys() >= _NO_ALPHA and "auto_mapping" not in stored  # which PEFT writes
    if ours and "lora_alpha" in names and "lora_alpha" not in stored:
        values["lora_alpha"] = None
        warnings.warn(
            f"{file} has no lora_alpha, as an older version of this library left it out where it was None (s = 1); "
            "read as lora_alpha=None. Save the adapter anew",
            stacklevel=4,
        )
    peers = {m.config.__name__: m.config for m in METHODS.values() if m.config.peft_type == peft_type}
    try:
        return peers.get(left.get("class"), kind)(**values)
    except (TypeError, ValueError) as e:
        raise AdapterFormatError(f"{file}: {e}") from e


def _config_file(path: str | os.PathLike[str]) -> Path:
    """The config's file in a folder; FileNotFoundError or NotADirectoryError that says what was given instead."""
    path = Path(path)
    file = path / CONFIG_NAME
    if file.is_file():
        return file
    if path.is_file():
        raise NotADirectoryError(f"path={str(path)!r} is a file; give the folder that holds {CONFIG_NAME}")
    if path.is_dir():
        below = sorted(found.parent.name for found in path.glob(f"*/{CONFIG_NAME}"))
        there = (
            f"{few(below)} in it {'has' if len(below) == 1 else 'have'} one: give {str(path / below[-1])!r}"
            if below
            else ""
        )
        raise FileNotFoundError(
            f"path={str(path)!r} holds no {CONFIG_NAME}; {there or 'give the folder that save_pretrained wrote'}"
        )
    call = _download(path.as_posix())
    hint = f"; an adapter on the Hugging Face hub is downloaded first: path = {call}" if call else ""
    given = re.sub(r"^(https?|hf):/+", r"\1://", str(path))
    raise FileNotFoundError(f"path={given!r} is no folder here; give the one that save_pretrained wrote{hint}")


# user/name[@revision][/folder] behind hf:, or a page's address; a Path has made one slash of two
_HUB = re.compile(
    r"(?:hf:|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co))/+([^/]+/[^/@]+)(?:@([^/]+))?"
    r"(?:/(?:tree|blob|resolve)/([^/]+))?(?:/(.+))?"
)


def _download(path: str) -> str:
    """The call that fetches what a name or an address of the hub stands for; empty for another path."""
    if not (found := _HUB.fullmatch(path)):
        name = len(path.split("/")) == 2 and not path.startswith("/")
        return f"huggingface_hub.snapshot_download({path!r})" if name else ""
    repository, at, page, folder = found.groups()
    folder = (folder or "").removesuffix(CONFIG_NAME).removesuffix(WEIGHTS_NAME).rstrip("/")
    revision = f", revision={at or page!r}" if at or page else ""
    return f"huggingface_hub.snapshot_download({repository!r}{revision})" + (f" + {'/' + folder!r}" if folder else "")


def _note_in_weights(path: Path) -> dict[str, Any]:
    """The note that save_pretrained left in the metadata of the weights; empty where there is none."""
    try:
        with safe_open(path / WEIGHTS_NAME, framework="pt") as f:
            found = json.loads((f.metadata() or {}).get(NOTE, "{}"))
    except (OSError, SafetensorError, ValueError):  # reading the weights says what is wrong with them
        return {}
    return found if isinstance(found, dict) else {}
