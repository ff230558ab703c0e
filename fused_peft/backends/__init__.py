"""Backends compute the expression of ``core.factors``; they never name a method. Eager, the definition, is in core."""

from ..core import dispatch
from . import decode, rates, replay  # noqa: F401
from .cublas import Cublas
from .cuda import Cuda
from .gluon import Gluon
from .triton import Triton

for backend in (Cublas(), Triton(), Gluon(), Cuda()):  # each before those registered earlier
    dispatch.register(backend, ("cuda",))
dispatch.ON_GPU.append(replay.start)
rates.replayed = replay.expected
dispatch.set_backend_from_environment()
