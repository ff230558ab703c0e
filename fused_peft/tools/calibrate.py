"""Which backend is right, and which is fastest, on the GPU at hand: self-tests, then times, kept as a record.

    fp.calibrate(model, rows=(256, 1024, 4096, 16384), seconds=30)
    python -m fused_peft calibrate

Every kind of call that the model makes is tested in each backend (``selftest``), and what passes is timed, forward and
backward with the host's time, on the model's own sizes; so are, of few rows, products with weights in parts
(``stored``). Both run in processes of their own (``isolated``): a kernel
that crashes the GPU's context is off, and the caller goes on.
"""

from __future__ import annotations

import datetime
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..backends import decode, replay
from ..core import dispatch, ops, records
from ..core.operands import Problem
from ..kernels import configs
from ..model.explain import explain
from . import isolated, selftest, stored, timing
from .isolated import Failure

log = logging.getLogger("fused_peft")

ROWS = (256, 1024, 4096, 16384)
TESTING = 0.6  # the share of the seconds that testing, and compiling for it, may take
EACH = 60.0  # seconds that one job may take
TESTERS = 4  # processes that test, and so compile, side by side
GAIN = 0.98  # another way to run the same kernel is kept below this multiple of the closed form's time
SAMPLED = 0.3  # seconds that a call is timed for, once compiled


@dataclass
class Calibration:
    """What ``calibrate`` found: the record, the file it is in (None where it could not be written), and what is left
    for the rate model, in words."""

    record: records.Record
    file: Path | None
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table: each call, its times in milliseconds, the fastest backend first."""
        lines = [f"{self.record.gpu}, driver {self.record.driver}, torch {self.record.torch}, {self.record.when}"]
        for call in self.record.calls:
            times = ", ".join(f"{n} {ms:.3f}" for n, ms in sorted(call["ms"].items(), key=lambda item: item[1]))
            at = f"{call['kind']:<16} {call['dtype']} {call['M']} x {call['K']} x {call['N']} r={call['r']}"
            lines.append(f"{at}: {times} ms")
        lines += [f"OFF: {variant}: {why}" for variant, why in self.record.failed.items()]
        return "\n".join(lines + [f"left to the rate model: {what}" for what in self.left])


def calibrate(
    model: nn.Module,
    rows: Sequence[int] = ROWS,
    seconds: float = 30.0,
    *,
    dtype: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    apart: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Test and time the backends on the GPU that the model is on, and keep the record (``core.records``).

    rows: numbers of tokens (batch times length) to measure for; others take the nearest, within a factor of four.
    seconds: about what it may take; what does not fit is left to the rate model, and named. dtype: of the activations,
    where autocast makes it another than the weights'. folder: where the record goes instead of the user's cache. apart:
    in processes of their own. progress(done, of): called after every job.

    One process at a time calibrates: another waits, and finds the record. Raises TypeError or ValueError for a model
    without adapted layers or not on a GPU, rows that are no positive integers, seconds that are not positive, and
    RuntimeError inside a CUDA graph's capture. A record that cannot be written is a UserWarning, and counts in this
    process.
    """
    device, problems = _asked(model, rows, seconds, dtype)
    identity = records.identity(device)
    with _alone(records.cache_dir()):
        records.forget()  # another process may just have made it
        todo = [p for p in problems if not _known(p)]
        if not todo:
            known = records.find(device)
            file = records.keep(known, Path(folder)) if folder else records.cache_dir() / known.name
            return Calibration(known, file)
        made = records.Record(**identity, when=datetime.date.today().isoformat())
        session = _Session(made, todo, device, seconds, progress or (lambda done, of: None))
        with isolated.Pool(min(TESTERS, os.cpu_count() or 1)) if apart else nullcontext(_Here()) as pool:
            session.run(pool)
        file = None
        try:
            file = records.keep(made, Path(folder) if folder else None)
        except OSError as e:
            warnings.warn(
                f"The record cannot be written ({e}): what was measured holds in this process alone. Make room, or set "
                "FUSED_PEFT_CACHE to another folder",
                stacklevel=2,
            )
    known = records.find(device) or made
    for variant, why in made.failed.items():
        warnings.warn(f"{variant} is off on this {identity['gpu']}: its self-test failed: {why}", stacklevel=2)
    return Calibration(known, file, session.left)


def _asked(model: nn.Module, rows, seconds, dtype) -> tuple[torch.device, list[Problem]]:
    """Arguments checked: the device, and the distinct calls that training makes on it."""
    rows = tuple(rows) if isinstance(rows, (tuple, list)) else (rows,)
    if not rows or any(not isinstance(M, int) or isinstance(M, bool) or M < 1 for M in rows):
        raise ValueError(f"rows={rows!r} must be positive integers: tokens a step, batch times length")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds={seconds!r} must be a positive number")
    with _training(model):
        asked = (row.problem for M in rows for row in explain(model, M, dtype))
        # rows in groups are computed in one way on each device
        problems = list(dict.fromkeys(p for p in asked if p is not None and not p.groups))
        problems += stored.problems(model, dtype)
    device = next((p.device for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"), None)
    triton = dispatch.backends()["triton"]
    if device is None:
        if triton.available() or not any(not triton.reasons(p) for p in problems):
            on = next((p.device for p in model.parameters()), "no device")
            raise ValueError(f"model is on {on}: calibrate measures a GPU; move the model with .to('cuda') first")
        device = torch.device("cpu")  # Triton's interpreter
    elif torch.cuda.is_current_stream_capturing():
        raise RuntimeError("calibrate cannot run while a CUDA graph is captured; call it before")
    return device, problems


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The calls that training makes, dropout among them, whatever mode the model is in."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = True
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _known(p: Problem) -> bool:
    """Whether the very call was measured."""
    found = records.nearest(p)
    return found is not None and records.distance(found[0], p) == 0


def _candidates(p: Problem) -> list[str]:
    """The backends that can compute a call, and have not failed on one like it, in dispatch's order."""
    if p.stored is not None:
        failed = records.failed(p, decode.NAME)
        return ["eager"] if failed else [decode.NAME, "eager"]
    found = []
    for name in records.ORDER:
        backend = dispatch.backends().get(name)
        if backend is not None and name != "eager":
            with dispatch.forcing(name):
                reasons = backend.available() or backend.reasons(p)
            if reasons:
                continue
        if backend is not None:
            found.append(name)
    return found


class _Session:
    """What one calibration runs and finds: tests, then times, into the record ``made``; ``left`` in words."""

    def __init__(self, made: records.Record, problems: list[Problem], device: torch.device, seconds: float, progress):
        self.made, self.device, self.seconds, self.left = made, device, seconds, []
        self.tests = [(name, p, device) for p in problems for name in _candidates(p) if name != "eager"]
        if device.type == "cuda" and replay.expected():
            self.tests += [("replay", p, device) for p in problems if p.stored is None]
        self.passing: dict[Problem, list[str]] = {p: [] for p in problems}
        self.begin, self.done, self.total = time.time(), 0, len(self.tests) + len(problems)
        self.progress = progress

    def run(self, pool) -> None:
        for _, answer in pool.run(f"{__name__}:usable", [(self.device,)] if self.tests else [], EACH):
            if isinstance(answer, Failure):
                raise RuntimeError(
                    f"a process of its own cannot use {self.device} ({answer.why}); apart=False measures in this one"
                )
        for (name, p, _), why in self._answers(pool, "test", self.tests, TESTING, TESTERS, "self-tests"):
            variant = records.variant(name, p)
            if why is None:
                self.passing[p] += [name] if name in records.ORDER else []
                self.made.passed.append(variant)
            elif isinstance(why, Failure) and not why.fatal:  # the test itself, memory most often
                self.left.append(f"{name} on {_sizes(p)}: {why.why}")
            else:
                self.made.failed[variant] = why.why if isinstance(why, Failure) else why
        self.made.passed = sorted({*self.made.passed} - self.made.failed.keys())
        good = lambda name, p: records.variant(name, p) not in self.made.failed  # noqa: E731  on any size
        all_ways = lambda names, p: [way for n in names if good(n, p) for way in ways(n, p) or [n]]  # noqa: E731
        jobs = [(p, [*all_ways(names, p), "eager"], self.device) for p, names in self.passing.items()]
        jobs = [job for job in jobs if len(job[1]) > 1]
        for (p, *_), times in self._answers(pool, "timed", jobs, 1.0, 1, "calls"):
            if isinstance(times, Failure):
                self.left.append(f"{_sizes(p)}: {times.why}")
            else:
                times = self._settled(p, {name: round(1e3 * took, 5) for name, took in times.items()})
                self.made.calls.append({**records.described(p), "ms": times})

    def _settled(self, p: Problem, times: dict[str, float]) -> dict[str, float]:
        """Times by backend: of its ways, the usual one's, or those of a faster one, which becomes the usual one."""
        for name in list(dict.fromkeys(way.split()[0] for way in times)):
            found = {way: times.pop(way) for way in ways(name, p) if way in times}
            if found:
                key, usual = dispatch.backends()[name].tiles(p)
                fields = {way: ways(name, p)[way] for way in found}
                best, own = min(found, key=found.get), next(w for w in found if replace(usual, **fields[w]) == usual)
                if found[best] >= GAIN * found[own]:
                    best = own
                else:
                    self.made.tiles[key] = list(astuple(replace(usual, **fields[best])))
                times[name] = found[best]
        return times

    def _answers(
        self, pool, function: str, jobs: list[tuple], share: float, workers: int, what: str
    ) -> Iterator[tuple]:
        """(job, answer) of those that begin within that share of the seconds."""
        answered, deadline = 0, self.begin + share * self.seconds
        for number, answer in pool.run(f"{__name__}:{function}", jobs, EACH, deadline, workers):
            answered, self.done = answered + 1, self.done + 1
            self.progress(self.done, self.total)
            yield jobs[number], answer
        if answered < len(jobs):
            self.left.append(
                f"{len(jobs) - answered} of {len(jobs)} {what}, for want of time (seconds={self.seconds:g})"
            )


def _sizes(p: Problem) -> str:
    return f"{records.kind(p)} {p.M} x {p.K} x {p.N}, r={p.r}"


class _Here:
    """In place of ``isolated.Pool``: the jobs in this process, one after another."""

    def run(self, function: str, jobs: list[tuple], seconds: float, deadline: float = float("inf"), workers: int = 1):
        for number, job in enumerate(jobs):
            if time.time() >= deadline:
                return
            try:
                yield number, globals()[function.partition(":")[2]](*job)
            except Exception as e:
                yield number, Failure(f"{type(e).__name__}: {e}")


def usable(device: torch.device) -> None:
    """Whether a process can allocate on the device, for which it raises what CUDA says; with calls replayed, if they
    can be."""
    torch.zeros(1, device=device)
    replay.ready()


def ways(name: str, p: Problem) -> dict[str, dict]:
    """A backend's ways to compute a call beside each other: fields of its GEMM's config by name; none for most."""
    return getattr(dispatch.backends().get(name), "ways", lambda p: {})(p)


def enter(way: str, p: Problem) -> None:
    """From now on that backend computes, and that way."""
    name = way.split()[0]
    for kind in dict.fromkeys(f"gemm_{n}" for n in records.ORDER if ways(n, p)):
        configs.insist(kind, **(ways(name, p).get(way, {}) if kind == f"gemm_{name}" else {}))
    dispatch.set_backend(name)


def test(name: str, p: Problem, device: torch.device) -> str | None:
    """``selftest.failure``, of all the backend's ways; leaves no memory behind."""
    replay.ready()
    try:
        if p.stored is not None:
            return stored.failure(p, device)
        for fields in ways(name, p).values() or [{}]:
            configs.insist(f"gemm_{name}", **fields)
            if wrong := selftest.failure(name, p, device):
                return wrong
        return None
    finally:
        configs.insist(f"gemm_{name}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def step_of(p: Problem, device: torch.device, seed: int) -> Callable[[], object]:
    """Forward and backward of the call through autograd, as a layer makes it."""
    if p.stored is not None:
        return stored.step_of(p, device)
    o, dy = selftest.draw(p, device, seed)
    names = selftest.trained(o)
    leaves = {n: getattr(o, n).requires_grad_() for n in names}
    f = o.factors()

    def run() -> object:
        y = ops.linear(o.x, o.w, f, o.bias, o.c)
        return torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)

    return run


def timed(p: Problem, names: list[str], device: torch.device) -> dict[str, float]:
    """{backend or way: seconds} of a call's forward and backward, the median of rounds in which each has its turn."""
    replay.ready()
    size = p.dtype.itemsize * (p.M * (p.K + p.N) + p.N * p.K) if p.stored is None else stored.nbytes(p)
    runs = [step_of(p, device, seed) for seed in range(timing.copies_of(size, device))]
    before = dispatch.forced()
    try:
        steps = dict.fromkeys(names, lambda i: runs[i % len(runs)]())
        found = timing.interleaved(steps, device, lambda way: enter(way, p), SAMPLED)
    finally:
        enter("eager", p)
        dispatch.set_backend(before)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; where files cannot be locked, each for itself."""
    with ExitStack() as stack:
        with suppress(OSError, ImportError):
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".calibrating").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process calibrates this machine's GPUs; waiting for its record")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def at_start(model: nn.Module, rows: Sequence[int] = ROWS, seconds: float = 30.0) -> Calibration | None:
    """``calibrate`` before training, where nothing is known of the GPU yet; one line in the log, and no error: what
    goes wrong is a UserWarning, and the rate model decides. FUSED_PEFT_CALIBRATE=0 turns it off."""
    on = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if on is None or os.environ.get("FUSED_PEFT_CALIBRATE", "1") == "0" or records.find(on) is not None:
        return None
    try:
        if all(row.problem is None for row in explain(model, 1)):
            return None
    except ValueError:  # no adapted layer, or a soft prompt
        return None
    except Exception as e:
        _not_done(e)
        return None
    log.warning(
        "fused_peft tests and times its kernels on this %s once, for about %g s; FUSED_PEFT_CALIBRATE=0 skips it",
        torch.cuda.get_device_name(on), seconds,
    )  # fmt: skip
    try:
        with _bar() as progress:
            return calibrate(model, rows, seconds, progress=progress)
    except Exception as e:
        _not_done(e)
        return None


def _not_done(e: Exception) -> None:
    warnings.warn(f"fused_peft did not calibrate ({type(e).__name__}: {e}); which GEMM runs is predicted", stacklevel=3)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar, on a terminal."""
    with tqdm(desc="fused_peft calibrates", unit="job", disable=None) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield progress
