"""Backends compute the expression of ``factors``; they never name a method."""

from .. import dispatch
from .eager import Eager

dispatch.register(Eager())
dispatch.set_backend_from_environment()
