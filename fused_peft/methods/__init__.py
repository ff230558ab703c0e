"""Every method of the library, one short file each."""

from .base import METHODS, Method, PeftConfig, method, method_of
from .bitfit import BitFitConfig
from .ia3 import IA3Config
from .lora import LoraConfig
from .subspace_scaling import SSBConfig, SSLConfig

__all__ = [
    "METHODS",
    "BitFitConfig",
    "IA3Config",
    "LoraConfig",
    "Method",
    "PeftConfig",
    "SSBConfig",
    "SSLConfig",
    "method",
    "method_of",
]
