"""What compilers made, kept on disk: in ``TORCH_EXTENSIONS_DIR``, else PyTorch's cache folder for extensions.

A file carries the hash of its contents at its end. One that was cut short or written by something else is not read but
made anew, by one process at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

DIGEST = 32  # bytes of a hash


class BuildError(RuntimeError):
    """csrc/ did not compile or load; the message says why and what to do."""


def root() -> Path:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home)


def path() -> str:
    """The PATH, this Python's own commands first: ninja may be in an environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def read(file: Path) -> bytes | None:
    """What was kept in a file; None where there is none, or its hash does not hold."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    contents, digest = data[:-DIGEST], data[-DIGEST:]
    return contents if contents and hashlib.sha256(contents).digest() == digest else None


def kept(file: Path, make: Callable[[], bytes]) -> bytes:
    """The contents of the file, made and written first where need be. Raises BuildError where it cannot be written, and
    what ``make`` raises."""
    found = read(file)
    if found is None:
        with alone(file.parent, f"{file.name}.lock"):
            found = read(file)  # perhaps of a process that was here first
            if found is None:
                found = make()
                _write(file, found + hashlib.sha256(found).digest())
    return found


def _write(file: Path, data: bytes) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as e:
        raise BuildError(f"{file} cannot be written: {e} (set TORCH_EXTENSIONS_DIR to a folder that can)") from e
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, lock: str) -> Iterator[None]:
    """One process at a time. What a killed process left is no obstacle."""
    import fcntl

    with ExitStack() as stack:
        with suppress(OSError):  # the build reports a folder that cannot be written; not every file system can lock
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((folder / lock).open("w")), fcntl.LOCK_EX)
        yield


def load(name: str, sources: list[str], folder: Path, **options):
    """What PyTorch's extension loader makes of the sources in a folder; by one process at a time, which takes away the
    lock that a killed one left there, for which PyTorch would wait for ever. Within ``alone``."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        (folder / "lock").unlink(missing_ok=True)
    before, os.environ["PATH"] = os.environ.get("PATH", ""), path()
    try:
        return cpp_extension.load(name, sources, build_directory=str(folder), **options)
    finally:
        os.environ["PATH"] = before


def first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    told = text.splitlines() or ["the compiler did not say why"]
    return next((line for line in told if re.search(r"error:|fatal", line)), told[0])


def write(file: Path, text: str) -> str:
    """Its name, the file written unless it says so already."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(file)
