"""Fused layers for parameter-efficient fine-tuning.

    import fused_peft as fp
    model = fp.get_peft_model(model, fp.LoraConfig(r=16, target_modules="all-linear"))

Methods and notation: arXiv 2407.05417. ``python -m fused_peft info`` shows what runs on this machine and why.
"""

import importlib as _importlib
import sys as _sys
import warnings as _warnings
from typing import TypeVar as _TypeVar

__version__ = "0.2.0"

from .core.paths import provide_kernels as _provide_kernels
from .core.paths import provide_moved as _provide_moved
from .core.paths import source_dir

_provide_kernels()
_provide_moved()

from .core.imports import after_import as _after_import  # noqa: E402
from .core.versions import warn_outside as _warn_outside  # noqa: E402

_warn_outside("torch")  # before anything that an untried version could break
_warn_outside("triton")

import torch.nn as _nn  # noqa: E402

from . import backends as _backends  # noqa: E402
from .core import ops as _ops  # noqa: E402
from .core.dispatch import StrictError, set_backend, set_strict  # noqa: E402
from .core.factors import Factors, NotMergeableError  # noqa: E402
from .integrations import blocks as _blocks  # noqa: E402, F401
from .integrations import quantised as _quantised  # noqa: E402, F401
from .methods import (  # noqa: E402
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    DeloraConfig,
    DiffPruningConfig,
    DoraConfig,
    FloraConfig,
    IA3Config,
    KasaConfig,
    LieraConfig,
    LoraConfig,
    LoraDashConfig,
    LoraXsConfig,
    MiloraConfig,
    MosLoraConfig,
    OloraConfig,
    ParallelAdapterConfig,
    PissaConfig,
    SamParserConfig,
    SpectralAdapterConfig,
    SSBConfig,
    SSLConfig,
    SVDiffConfig,
    TriLoraConfig,
    VeraConfig,
    bottleneck,
)
from .model import batch as _batch  # noqa: E402
from .model import explain as _explain  # noqa: E402
from .model import export as _export  # noqa: E402
from .model import schedule as _schedule  # noqa: E402
from .model import status as _status  # noqa: E402
from .model.adapter_config import AdapterFormatError, load_config  # noqa: E402
from .model.batch import adapter_batch  # noqa: E402
from .model.checks import check_training  # noqa: E402
from .model.convert import (  # noqa: E402
    disable_adapter,
    get_peft_model,
    merge,
    merge_and_unload,
    print_trainable_parameters,
    unmerge,
)
from .model.embedding import PeftEmbedding  # noqa: E402
from .model.explain import explain  # noqa: E402
from .model.export import export_lora  # noqa: E402
from .model.layer import PeftLinear  # noqa: E402
from .model.load import load_adapter  # noqa: E402
from .model.merged import merged_state_dict, save_merged  # noqa: E402
from .model.named import add_adapter, delete_adapter, set_adapter  # noqa: E402
from .model.penalties import mpc_penalty, orthogonality_penalty  # noqa: E402
from .model.prompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig  # noqa: E402
from .model.save import save_pretrained  # noqa: E402
from .model.schedule import lora_plus_groups, on_step  # noqa: E402
from .model.status import get_layer_status  # noqa: E402
from .tools.calibrate import calibrate  # noqa: E402
from .tools.estimate import estimate  # noqa: E402
from .tools.stored import decoding as _decoding  # noqa: E402

_Model = _TypeVar("_Model", bound=_nn.Module)

# What knows the floors above it by these lines alone: nothing below imports upwards.
_backends.decode.failure = _decoding
_ops.on_dtensors = lambda: _importlib.import_module("fused_peft.distributed.parallel")  # imports torch.distributed


def _peft_rows(model, tokens, dtype):
    """explain's rows of a Hugging Face PEFT model."""
    return _bridge("explain").explanations(model, tokens, dtype) if "peft" in _sys.modules else []


def _allocate_in_peft(model, step):
    """on_step of a Hugging Face PEFT model."""
    if "peft" in _sys.modules and hasattr(model, "peft_config"):
        _bridge("on_step").allocate(model, step)


def _members_in_peft(model):
    """What adapter_batch acts on in a Hugging Face PEFT model."""
    return _bridge("adapter_batch").members(model) if "peft" in _sys.modules else []


def _exported_from_peft(model, adapter_name):
    """What export_lora reads of a Hugging Face PEFT model."""
    if "peft" in _sys.modules and hasattr(model, "peft_config"):
        _bridge("export_lora")
        return _importlib.import_module("fused_peft.integrations.peft_read").exported(model, adapter_name)
    return None


def _peft_statuses(model):
    """get_layer_status's entries of a Hugging Face PEFT model."""
    if "peft" not in _sys.modules:
        return []
    _bridge("get_layer_status")
    return _importlib.import_module("fused_peft.integrations.peft_read").statuses(model)


_batch.OF_PEFT.append(_members_in_peft)
_explain.OF_PEFT.append(_peft_rows)
_export.OF_PEFT.append(_exported_from_peft)
_schedule.OF_PEFT.append(_allocate_in_peft)
_status.OF_PEFT.append(_peft_statuses)


def _bridge(what: str):
    """The file that works on Hugging Face PEFT's models; ImportError where PEFT is not there to import."""
    try:
        from .integrations import peft
    except ImportError as e:
        raise ImportError(
            f"fused_peft.{what} works on models of Hugging Face PEFT, which does not import here ({e}); pip install "
            '"fused_peft[peft]"'
        ) from e
    peft.know_bitsandbytes()
    return peft


def _meet_peft():
    """Make the configs PEFT's, and the methods that it lacks known to it."""
    begun = _sys.modules.get("fused_peft.integrations.tuners")
    if begun is not None and not hasattr(begun, "REGISTERED"):  # PEFT is imported by it, and the rest will be
        return
    try:
        _importlib.import_module("fused_peft.integrations.peft")
    except Exception as e:  # importing PEFT must not fail for it
        _warnings.warn(f"Hugging Face PEFT will not take this library's configs: {e}", stacklevel=2)


def _meet_trl(module):
    """Let the trainer of one of TRL's modules know this library's adapters."""
    _importlib.import_module("fused_peft.integrations.trl").meet(module)


_after_import("peft", _meet_peft)
for _module in ("dpo", "kto", "grpo", "rloo"):
    _module = f"trl.trainer.{_module}_trainer"
    _after_import(_module, lambda module=_module: _meet_trl(module))
del _module


def accelerate(model: _Model) -> _Model:
    """Put the layers of a PEFT model (LoRA on linear layers, embeddings and stacks of experts, AdaLoRA, (IA)³, VeRA,
    DeLoRA, HiRA, MiSS, GraLoRA) on the fused call, in place; returns the model.

    Keys, checkpoints and the whole of PEFT's interface stay as they are; results differ from PEFT's by rounding,
    dropout draws other masks, and gradients of gradients are refused. Layers that cannot be fused keep PEFT's forward:
    one warning says how many, and why (``fused_peft.explain`` names every layer). Adapters added later, on whichever
    modules, are accelerated by themselves until ``restore``; twice does no harm. Raises TypeError when model is no
    module, ValueError when it has no PEFT layer.
    """
    return _bridge("accelerate").accelerate(model)


def restore(model: _Model) -> _Model:
    """Undo ``accelerate``, in place; returns the model. Layers that were not accelerated stay as they are.

    Raises TypeError when model is no module.
    """
    return _bridge("restore").restore(model)


__all__ = [
    "accelerate",
    "adapter_batch",
    "add_adapter",
    "AdaLoraConfig",
    "AdapterFormatError",
    "BitFitConfig",
    "BottleneckConfig",
    "DeloraConfig",
    "DiffPruningConfig",
    "DoraConfig",
    "Factors",
    "FloraConfig",
    "IA3Config",
    "KasaConfig",
    "LieraConfig",
    "LoraConfig",
    "LoraDashConfig",
    "LoraXsConfig",
    "MiloraConfig",
    "MosLoraConfig",
    "NotMergeableError",
    "OloraConfig",
    "ParallelAdapterConfig",
    "PeftEmbedding",
    "PeftLinear",
    "PissaConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "SSBConfig",
    "SSLConfig",
    "SVDiffConfig",
    "SamParserConfig",
    "SpectralAdapterConfig",
    "StrictError",
    "TriLoraConfig",
    "VeraConfig",
    "bottleneck",
    "calibrate",
    "check_training",
    "delete_adapter",
    "disable_adapter",
    "estimate",
    "explain",
    "export_lora",
    "get_layer_status",
    "get_peft_model",
    "load_adapter",
    "load_config",
    "lora_plus_groups",
    "merge",
    "merge_and_unload",
    "merged_state_dict",
    "mpc_penalty",
    "on_step",
    "orthogonality_penalty",
    "print_trainable_parameters",
    "restore",
    "save_merged",
    "save_pretrained",
    "set_adapter",
    "set_backend",
    "set_strict",
    "source_dir",
    "unmerge",
]
