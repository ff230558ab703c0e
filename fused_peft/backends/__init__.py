"""Backends compute the expression of ``core.factors``; they never name a method. Eager, the definition, is in core."""

from ..core import dispatch
from .cuda import Cuda
from .triton import Triton

dispatch.register(Triton(), ("cuda",))
dispatch.register(Cuda(), ("cuda",))  # before Triton
dispatch.set_backend_from_environment()
