"""``python -m fused_peft export``: an adapter's folder as plain LoRA, or merged into its base, to serve from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..methods import PeftConfig
from ..model.adapted import STATE, few
from ..model.adapter_config import CONFIG_NAME, WEIGHTS_NAME, load_config
from ..model.export import export_lora
from ..model.load import load_adapter
from ..model.merged import save_merged
from ..model.targets import HEADS

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def run(adapter: Path, base: str | None, out: Path, rank: int | None, merged: bool) -> int:
    """Export, and say what was written; exit status 2, with the reason, where it cannot be."""
    try:
        errors = export(adapter, base, out, rank, merged)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as e:
        print(f"export: {e}", file=sys.stderr)
        return 2
    if merged:
        print(f"{out}: the merged model")
        return 0
    inexact = {name: error for name, error in errors.items() if error}
    for name, error in inexact.items():
        print(f"{name}  relative error {error:.3g}")
    print(f"{out}: plain LoRA, {len(errors) - len(inexact)} of {len(errors)} layers exact")
    return 0


def export(adapter: Path, base: str | None, out: Path, rank: int | None, merged: bool) -> dict[str, float]:
    """{layer: relative error}, empty for a merged model. Raises before anything is written: FileNotFoundError for
    folders that are not there, FileExistsError for an ``out`` that holds something, ValueError and its kin for an
    adapter and a base that do not fit."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out={str(out)!r} is there and not an empty folder; give another, or empty it")
    config = load_config(adapter)
    model, missing = base_model(config, base, adapter)
    load_adapter(model, adapter, is_trainable=False)
    trained = tuple(f"{name}." for name in getattr(model, STATE).saved)
    if lost := [key for key in missing if not key.startswith(trained or ("\0",))]:
        raise ValueError(
            f"the base model has no {few(lost)}, and the adapter neither: they would be random; give --base, the model "
            "that the adapter was trained on"
        )
    if merged:
        save_merged(model, out)
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank=")  # each layer's error is printed
        return export_lora(model, out, rank=rank)


def base_model(config: PeftConfig, base: str | None, adapter: Path) -> tuple[nn.Module, list[str]]:
    """The base that an adapter's config names, or ``base``, by its task or its architecture, with as many labels as the
    adapter's head has, and the keys of weights that its folder lacks. Raises FileNotFoundError or ValueError."""
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{CONFIG_NAME} names no base model; give --base, the folder of the model that was adapted")
    if base and not Path(base, "config.json").is_file():
        raise FileNotFoundError(
            f"--base={base!r} is no folder with a config.json; give that of the model that was adapted"
        )
    import transformers

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    revision = {} if base or not config.revision else {"revision": config.revision}
    try:
        own = transformers.AutoConfig.from_pretrained(name, **revision)
    except (OSError, ValueError) as e:
        raise ValueError(f"base model {name!r} is not to be had ({e}); give --base, its folder") from e
    kind = getattr(transformers, AUTO.get(config.task_type, ""), None)
    if kind is None or type(own) not in kind._model_mapping:
        kind = getattr(transformers, next(iter(own.architectures or ()), "AutoModel"), transformers.AutoModel)
    if labels := _labels(adapter, HEADS.get(config.task_type, ())):
        own.num_labels = labels
    model, info = kind.from_pretrained(name, config=own, dtype="auto", output_loading_info=True, **revision)
    return model, sorted(info["missing_keys"])


def _labels(adapter: Path, heads: Collection[str]) -> int | None:
    """The rows of the head that an adapter has trained."""
    ends = tuple(f".{head}{part}.weight" for head in heads for part in ("", ".out_proj"))
    try:
        with safe_open(adapter / WEIGHTS_NAME, framework="pt") as f:
            shapes = [f.get_slice(key).get_shape() for key in f.keys() if key.endswith(ends)]
    except (OSError, SafetensorError):  # loading says what is wrong
        return None
    rows = {shape[0] for shape in shapes if len(shape) == 2}
    return rows.pop() if len(rows) == 1 else None
