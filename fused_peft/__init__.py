"""Fused layers for parameter-efficient fine-tuning.

    import fused_peft as fp
    model = fp.get_peft_model(model, fp.LoraConfig(r=16, target_modules="all-linear"))

Methods and notation: arXiv 2407.05417. ``python -m fused_peft info`` shows what runs on this machine and why.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "kernels").is_dir() and (_root / "kernels").is_dir():
    # A source checkout or an editable install: kernels/ stands beside this folder, not in it.
    __path__.append(str(_root))


def source_dir(name: str) -> _Path:
    """The folder of ``kernels`` or ``csrc``, in a wheel or in a checkout. Raises FileNotFoundError."""
    for parent in (_Path(__file__).parent, _root):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"{name}/ is missing from this installation of fused_peft; reinstall it")


from .versions import warn_outside as _warn_outside  # noqa: E402

_warn_outside("torch")  # before anything that an untried version could break
_warn_outside("triton")

from .checks import check_training  # noqa: E402
from .convert import (  # noqa: E402
    disable_adapter,
    explain,
    get_peft_model,
    merge,
    merge_and_unload,
    print_trainable_parameters,
    unmerge,
)
from .dispatch import StrictError, set_backend, set_strict  # noqa: E402
from .estimate import estimate  # noqa: E402
from .factors import Factors, NotMergeableError  # noqa: E402
from .io import AdapterFormatError, load_adapter, load_config, save_pretrained  # noqa: E402
from .linear import PeftLinear  # noqa: E402
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
from .mpc import mpc_penalty, orthogonality_penalty  # noqa: E402
from .prompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig  # noqa: E402
from .schedule import lora_plus_groups, on_step  # noqa: E402


def _bridge(what: str):
    """The file that works on Hugging Face PEFT's models; ImportError where PEFT is not there to import."""
    try:
        from .integrations import peft
    except ImportError as e:
        raise ImportError(
            f"fused_peft.{what} works on models of Hugging Face PEFT, which does not import here ({e}); pip install "
            '"fused_peft[peft]"'
        ) from e
    return peft


def accelerate(model):
    """An existing Hugging Face PEFT model on the fused call, in place; see ``fused_peft.integrations.peft``."""
    return _bridge("accelerate").accelerate(model)


def restore(model):
    """Undo ``accelerate``, in place."""
    return _bridge("restore").restore(model)


__all__ = [
    "accelerate",
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
    "check_training",
    "disable_adapter",
    "estimate",
    "explain",
    "get_peft_model",
    "load_adapter",
    "load_config",
    "lora_plus_groups",
    "merge",
    "merge_and_unload",
    "mpc_penalty",
    "on_step",
    "orthogonality_penalty",
    "print_trainable_parameters",
    "restore",
    "save_pretrained",
    "set_backend",
    "set_strict",
    "source_dir",
    "unmerge",
]
