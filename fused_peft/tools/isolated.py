"""Jobs in processes of their own: a crash or a hang costs one job and no more.

The processes are begun as commands, so that nothing of the caller's script runs in them, and talk in pickles.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import selectors
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..core.paths import PACKAGE

START = 120.0  # seconds that a process may take to import what it needs


@dataclass(frozen=True)
class Failure:
    """Instead of a result: what the job raised, or how its process ended. ``fatal``: the job ended its process, or
    never came back; not where the deadline cut it short, or no process could be begun."""

    why: str
    fatal: bool = False


LATE = Failure("out of time")  # the deadline cut the job short


class Pool:
    """Processes that are kept from one ``run`` to the next; a context that ends them."""

    def __init__(self, workers: int = 1):
        self.workers, self.idle = max(1, workers), []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        while self.idle:
            self.idle.pop().kill()

    def run(
        self,
        function: str,
        jobs: Sequence[tuple],
        seconds: float,
        deadline: float = float("inf"),
        workers: int | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(number of the job, result or Failure) of ``function(*job)`` as they come, ``workers`` at a time, no more
        than the pool's.

        function: "package.module:name". seconds: what one job may take. deadline (time.time()): no job begins after
        it, and none is given more time than is left then, plus a tenth of ``seconds``; jobs that did not begin yield
        nothing.
        """
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for job in enumerate(jobs):
            waiting.put(job)
        done: queue.SimpleQueue = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._drive, args=(function, waiting, done, seconds, deadline), daemon=True)
            for _ in range(min(self.workers, workers or self.workers, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        ended = 0
        while ended < len(threads):
            item = done.get()
            if item is None:
                ended += 1
            else:
                yield item

    def _drive(self, function: str, waiting, done, seconds: float, deadline: float) -> None:
        """One process after another, until no job is left."""
        process = None
        try:
            while time.time() < deadline:
                try:
                    number, job = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    left = lambda: max(1.0, deadline - time.time()) + seconds / 10  # noqa: E731
                    process = process or (self.idle.pop() if self.idle else _Process(min(START, left())))
                    short = left() < seconds
                    result = process.ask((function, job), min(seconds, left()), short)
                except Exception as e:  # whatever starting a process, or pickling, raises
                    result = Failure(f"{type(e).__name__}: {e}")
                if process and process.over:
                    process.kill()
                    process = None
                done.put((number, result))
        finally:
            if process:
                self.idle.append(process)
            done.put(None)


def run(
    function: str, jobs: Sequence[tuple], seconds: float, deadline: float = float("inf"), workers: int = 1
) -> Iterator[tuple[int, Any]]:
    """``Pool.run`` in processes that end with it."""
    with Pool(workers) as pool:
        yield from pool.run(function, jobs, seconds, deadline)


class _Process:
    def __init__(self, seconds: float):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        here = os.pathsep.join(dict.fromkeys([str(PACKAGE.parent), *(p for p in sys.path if p)]))
        self.running = subprocess.Popen(
            [sys.executable, "-c", "from fused_peft.tools import isolated; isolated.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, "PYTHONPATH": here}, bufsize=0,
        )  # fmt: skip
        self.over, self.silent = False, False  # to be ended; has closed its end of the pipe
        if self._answer(time.monotonic() + seconds) is None:
            how = self._how()
            self.kill()
            raise RuntimeError(f"a process could not be begun: it {how}")

    def ask(self, job: tuple, seconds: float, short: bool) -> Any:
        """The job's answer; short: the deadline leaves it less time than it may take."""
        message = pickle.dumps(job)
        with suppress(BrokenPipeError):  # told below, by how it ended
            self.running.stdin.write(struct.pack("<Q", len(message)) + message)
        end = time.monotonic() + seconds
        body = self._answer(end)
        if body is not None:
            answer = pickle.loads(body)
            self.over = isinstance(answer, Failure) and answer.fatal
            return answer
        self.over = True
        if short and not self.silent:
            return LATE
        return Failure(f"its process {self._how()}", fatal=True)

    def _answer(self, end: float) -> bytes | None:
        size = self._read(8, end)
        return None if size is None else self._read(struct.unpack("<Q", size)[0], end)

    def _how(self) -> str:
        """How it ended, or that it did not."""
        with suppress(subprocess.TimeoutExpired):
            code = self.running.wait(30 if self.silent else 0)
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
            return ended + self._said()
        return "took too long"

    def _read(self, size: int, end: float) -> bytes | None:
        """So many bytes; None when the process ends, or time does."""
        found = b""
        with selectors.DefaultSelector() as ready:
            ready.register(self.running.stdout, selectors.EVENT_READ)
            while len(found) < size:
                if not ready.select(max(0.0, end - time.monotonic())):
                    return None
                if not (more := os.read(self.running.stdout.fileno(), size - len(found))):
                    self.silent = True
                    return None
                found += more
        return found

    def _said(self) -> str:
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4000))
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = [line for line in lines if line.strip()][-1:]
        return f": {last[0][:300]}" if last else ""

    def kill(self) -> None:
        self.running.kill()
        self.running.wait()
        for file in (self.running.stdin, self.running.stdout, self.errors):
            with suppress(OSError):
                file.close()


def serve() -> None:
    """The other end: read a job, answer with its result, until the pipe closes."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(message: bytes) -> None:
        out.write(struct.pack("<Q", len(message)) + message)
        out.flush()

    say(b"ready")
    while size := sys.stdin.buffer.read(8):
        message = sys.stdin.buffer.read(struct.unpack("<Q", size)[0])
        try:
            function, job = pickle.loads(message)
            module, _, name = function.partition(":")
            answer = getattr(importlib.import_module(module), name)(*job)
        except Exception as e:
            traceback.print_exc()
            answer = Failure(f"{type(e).__name__}: {e}"[:500], fatal="CUDA error" in str(e))
        say(pickle.dumps(answer))
