"""Every method of the library, one short file each."""

from .adalora import AdaLoraConfig
from .adapters import BottleneckConfig, ParallelAdapterConfig, bottleneck
from .base import METHODS, Init, Method, PeftConfig, method, method_of
from .bitfit import BitFitConfig
from .delora import DeloraConfig
from .diff_pruning import DiffPruningConfig
from .dora import DoraConfig
from .flora import FloraConfig, MosLoraConfig
from .ia3 import IA3Config
from .kasa import KasaConfig
from .liera import LieraConfig
from .lora import LoraConfig, MiloraConfig, OloraConfig, PissaConfig
from .lora_dash import LoraDashConfig
from .lora_xs import LoraXsConfig
from .spectral_adapter import SpectralAdapterConfig
from .subspace_scaling import SSBConfig, SSLConfig
from .svd import SamParserConfig, SVDiffConfig
from .trilora import TriLoraConfig
from .vera import VeraConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "DeloraConfig",
    "DiffPruningConfig",
    "DoraConfig",
    "FloraConfig",
    "IA3Config",
    "Init",
    "KasaConfig",
    "LieraConfig",
    "LoraConfig",
    "LoraDashConfig",
    "LoraXsConfig",
    "Method",
    "MiloraConfig",
    "MosLoraConfig",
    "OloraConfig",
    "ParallelAdapterConfig",
    "PeftConfig",
    "PissaConfig",
    "SSBConfig",
    "SSLConfig",
    "SVDiffConfig",
    "SamParserConfig",
    "SpectralAdapterConfig",
    "TriLoraConfig",
    "VeraConfig",
    "bottleneck",
    "method",
    "method_of",
]
