"""Backends compute the expression of ``factors``; they never name a method."""

from .. import dispatch
from .cuda import Cuda
from .eager import Eager
from .triton import Triton

dispatch.register(Eager())
dispatch.register(Triton(), ("cuda",))
dispatch.register(Cuda(), ("cuda",))  # before Triton
dispatch.set_backend_from_environment()
