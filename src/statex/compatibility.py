"""The versions of other packages that this release was tested with: the ranges of pyproject.toml, as installed."""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DECIDING = ("torch", "transformers")
"""What --version names: a release of theirs is what changes results."""


@cache
def tested_ranges() -> dict[str, SpecifierSet]:
    """The range of each package that statex needs, without extras; empty where statex itself is not installed."""
    try:
        requirements = [Requirement(line) for line in requires("statex") or []]
    except PackageNotFoundError:
        return {}
    return {one.name: one.specifier for one in requirements if one.marker is None}


def describe_versions() -> str:
    """One line: the versions at hand of what decides, and what was tested."""
    parts = [
        f"{name} {_installed(name) or 'not installed'} (tested: {tested_ranges().get(name, 'unknown')})"
        for name in DECIDING
    ]
    return ", ".join(parts)


def untested_versions() -> list[str]:
    """Each package whose installed version is outside the tested range, with both."""
    found = {name: _installed(name) for name in tested_ranges()}
    return [
        f"{name} {found[name]} (tested: {specifier})"
        for name, specifier in tested_ranges().items()
        if found[name] is not None and not specifier.contains(found[name] or "", prereleases=True)
    ]


def warn_untested() -> None:
    """Warn once in a process where a version is outside the tested range."""
    if untested := untested_versions():
        message = f"statex was not tested with {', '.join(untested)}; make test-newest runs its tests on new releases"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
