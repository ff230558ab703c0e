"""The versions of other packages that the test suite was run on, and a warning for any outside of them."""

from __future__ import annotations

import importlib.metadata
import re
import warnings

# package: (first release tried, first release not tried); pyproject.toml states the same
TRIED = {
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.10"),
    "transformers": ("5.20", "5.25"),
    "peft": ("0.21", "0.22"),
}

_RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", re.IGNORECASE)
_warned: set[str] = set()


def _key(version: str) -> tuple[tuple[int, ...], bool]:
    """What orders versions: the release's numbers without trailing zeros, and False for what came before the release.

    Local parts ("+cpu") and post-releases do not count. Raises ValueError when there is no number.
    """
    found = _RELEASE.match(version)
    if found is None:
        raise ValueError(f"version={version!r} does not start with a release number, such as 2.13.0")
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), found[2] is None


def inside(package: str, version: str) -> bool:
    """Whether a version of a package of ``TRIED`` is one that the suite was run on, or lies between two of them.

    A pre-release belongs to the release it leads to: 5.25.0.dev0 is as untried as 5.25.0. So is a version without a
    number. Raises KeyError for a package that is not in ``TRIED``.
    """
    first, end = TRIED[package]
    try:
        return _key(first) <= _key(version) < (_key(end)[0], False)
    except ValueError:
        return False


def warn_outside(package: str) -> None:
    """One UserWarning a process when the installed version of a package of ``TRIED`` is outside its range.

    Silent when the package is not installed. Reads its metadata and does not import it. Raises KeyError for a package
    that is not in ``TRIED``.
    """
    first, end = TRIED[package]
    if package in _warned:
        return
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return
    if inside(package, version):
        return
    _warned.add(package)
    warnings.warn(
        f"{package} {version} is outside the range that fused_peft was tested on, >={first},<{end}; "
        f'install one inside it (pip install "{package}>={first},<{end}"), or compare results with such a one',
        stacklevel=2,
    )
