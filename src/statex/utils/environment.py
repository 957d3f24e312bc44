"""Where a result was computed: device, commit, versions, and which versions this release was tested with.

Torch is imported only where a device is needed, so that `statex --help` does without it.
"""

import os
import platform
import subprocess
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    import torch

DECIDING = ("torch", "transformers")
"""The packages that --version names: their releases can change results."""
NOT_INSTALLED = "not installed"


def default_device() -> "torch.device":
    """The GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: "torch.device | str") -> str:
    """The device's own name, for example "NVIDIA H200" or "AMD EPYC, 2 cores"."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = torch.get_num_threads()
    return f"{_processor_name()}, {cores} thread{'s' if cores != 1 else ''}"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_commit() -> str:
    """The commit of the running source tree, marked if there are uncommitted changes; else the package's version."""
    folder = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if tracked.returncode == 0:
            changed = subprocess.run([*git, "status", "--porcelain", "--", str(folder)], capture_output=True, text=True)
            return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"statex {package_version('statex')}"


def package_version(name: str) -> str:
    """The installed version of a package, `NOT_INSTALLED` without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    names = ("statex", "torch", "transformers", "triton", "tokenizers", "datasets")
    return {"python": platform.python_version()} | {name: package_version(name) for name in names}


def host_memory() -> int:
    """Bytes of memory that this process can have: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


@cache
def tested_ranges() -> dict[str, SpecifierSet]:
    """The range of each package that statex needs, without extras; empty where statex itself is not installed."""
    try:
        requirements = [Requirement(line) for line in requires("statex") or []]
    except PackageNotFoundError:
        return {}
    return {one.name: one.specifier for one in requirements if one.marker is None}


def describe_versions() -> str:
    """The installed and the tested versions of the packages that can change results, on one line."""
    parts = [f"{name} {package_version(name)} (tested: {tested_ranges().get(name, 'unknown')})" for name in DECIDING]
    return ", ".join(parts)


def untested_versions() -> list[str]:
    """Each package whose installed version is outside the tested range, with both."""
    found = {name: package_version(name) for name in tested_ranges()}
    return [
        f"{name} {found[name]} (tested: {specifier})"
        for name, specifier in tested_ranges().items()
        if found[name] != NOT_INSTALLED and not specifier.contains(found[name], prereleases=True)
    ]


def warn_untested() -> None:
    """Warn once per process where a version is outside the tested range."""
    if untested := untested_versions():
        message = f"statex was not tested with {', '.join(untested)}; make test-newest runs its tests on new releases"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
