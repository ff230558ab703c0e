"""Which backend computes a call: a frozen Problem meets a priority list, and each backend answers with reasons.

Nothing falls back silently: ``choose`` returns the refusals beside the winner, ``explain`` prints them, and strict mode
raises them in one message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from . import groups
from .operands import Operands, Problem


class Backend(Protocol):
    """The seam of the expression. ``need`` is aligned with Operands' tensors: which gradients are wanted."""

    name: str

    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot, or should not, compute the problem; empty when it can."""

    def slower(self, problem: Problem) -> str | None:
        """Why a later backend is the better choice for a problem that this one can compute; None when it is not."""

    def available(self) -> list[str]:
        """Why this backend cannot run on this machine at all; empty when it can."""

    def forward(self, o: Operands, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y (..., N); T (M, r), the pre-activation drop(x̂)Aᵀ + a, or None; z (M, N), y before d_out, if keep_z."""

    def backward(
        self, dy: Tensor, o: Operands, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients aligned with Operands' tensors, None where not needed."""

    def row_norm(self, W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """‖W + s·B A‖ per row (N,), in squared's dtype, from squared = ‖W‖² per row."""


@dataclass(frozen=True)
class Choice:
    backend: Backend
    refusals: tuple[tuple[str, tuple[str, ...]], ...]
    problem: Problem | None = None  # None where even the last backend refused

    def why(self) -> str:
        """The refusals, and what speaks for the backend: what was measured, or that it is predicted."""
        said = [f"{name}: {', '.join(reasons)}" for name, reasons in self.refusals]
        if self.problem is not None and hasattr(self.backend, "basis"):
            said.append(self.backend.basis(self.problem))
        return "; ".join(said) or "first choice for this device"


class StrictError(RuntimeError):
    """Strict mode: the preferred backend refused, and the message says why."""


_backends: dict[str, Backend] = {}
_priority: dict[str, list[str]] = {}
_forced: str | None = None
_strict = False
ON_CHANGE: list[Callable[[], object]] = []  # called when another backend may be chosen than before
ON_GPU: list[Callable[[], object]] = []  # called when a call on a GPU is judged


def changed() -> None:
    """Forget what was chosen."""
    choose.cache_clear()
    for forget in ON_CHANGE:
        forget()


def register(backend: Backend, devices: tuple[str, ...] = ()) -> None:
    """Add a backend, first choice for ``devices``. The eager backend is everywhere last."""
    _backends[backend.name] = backend
    for device in devices:
        _priority.setdefault(device, []).insert(0, backend.name)
    changed()


def unregister(name: str) -> None:
    """Remove a backend registered earlier; KeyError when there is none of that name."""
    del _backends[name]
    for device, names in list(_priority.items()):
        _priority[device] = [n for n in names if n != name]
        if not _priority[device]:
            del _priority[device]
    changed()


def backends() -> dict[str, Backend]:
    return dict(_backends)


def devices(name: str) -> str:
    """Where a backend stands in the order, in words."""
    first = [device for device, names in _priority.items() if name in names]
    return f"tried first on {', '.join(first)}" if first else "used where no other backend takes the call"


def set_backend(name: str | None) -> None:
    """Prefer one backend for every call, or None for the default order. FUSED_PEFT_BACKEND sets it at import.

    A call it cannot compute is explained and goes to those after it in the default order, or raises in strict mode.
    Raises ValueError for an unknown name.
    """
    global _forced
    if name is not None and name not in _backends:
        raise ValueError(f"backend={name!r} is unknown; choose one of {sorted(_backends)} or None")
    _forced = name
    changed()


def forced() -> str | None:
    """The backend that ``set_backend`` chose."""
    return _forced


@contextmanager
def forcing(name: str) -> Iterator[None]:
    """``set_backend(name)`` for a while."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def set_strict(strict: bool) -> None:
    """With True, a call that every preferred backend refuses raises StrictError with the reasons, instead of eager."""
    global _strict
    if not isinstance(strict, bool):
        raise TypeError(f"strict={strict!r} must be True or False")
    _strict = strict
    changed()


def _groups(backend: Backend, problem: Problem) -> list[str]:
    known = not problem.groups or hasattr(backend, "grouped_forward")
    return [] if known else ["it has no kernels for rows in groups (experts, several adapters in a batch)"]


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Choice:
    """The first backend that can compute the problem, less those that one after them beats. Strict mode does not count
    eager among those, and raises StrictError where only eager, or not the backend asked for, is left."""
    for prepare in ON_GPU if problem.device == "cuda" else ():
        prepare()
    names = _priority.get(problem.device, [])
    if _forced:
        names = [_forced, *names[names.index(_forced) + 1 :]] if _forced in names else [_forced]
    refusals = []
    for name in [*names, "eager"]:
        backend = _backends[name]
        reasons = tuple(backend.available() or _groups(backend, problem) or backend.reasons(problem))
        last = _strict and name in names[-1:]  # strict mode knows no eager one after it
        if not reasons and not last and name != _forced and (slower := backend.slower(problem)):
            reasons = (slower,)
        if not reasons:
            break
        refusals.append((name, reasons))
    choice = Choice(backend, tuple(refusals), None if reasons else problem)
    if reasons or (_strict and refusals and (name == "eager" or _forced)):
        raise StrictError(f"no preferred backend can compute {problem}: {choice.why()}")
    return choice


def is_eager(x: Tensor) -> bool:
    """Whether eager computes every call on x, without a look at the call."""
    return x.is_cpu and _forced is None and "cpu" not in _priority


def backend_for(o: Operands, problem: Callable[[Operands], Problem] = Problem.of) -> Backend:
    """The backend of a call; ``problem``: how it is judged."""
    if is_eager(o.x):
        return _backends["eager"]
    return choose(problem(o)).backend


def set_backend_from_environment() -> None:
    set_backend(os.environ.get("FUSED_PEFT_BACKEND") or None)


register(groups.EagerBackend())
