"""Device, commit and versions; which versions statex says it was tested with, and its word outside them."""

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from statex.utils import environment

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_range_has_both_bounds():
    for extra in ([], *PROJECT["optional-dependencies"].values()):
        for line in extra:
            assert "<" in line or "==" in line or line.startswith(("triton", "einops")), line
    for line in PROJECT["dependencies"]:
        assert ">=" in line, line
        assert ",<" in line, line


def test_the_locked_versions_are_inside_the_ranges():
    lock = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    pins = (line.partition(";")[0].strip() for line in lock.splitlines() if line[:1] not in (" ", "#"))
    locked = dict(pin.split("==") for pin in pins)
    for name, specifier in environment.tested_ranges().items():
        assert specifier.contains(locked[name]), name


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(environment, "tested_ranges", lambda: {"transformers": SpecifierSet(">=4,<4.5")})


def test_outside_the_range_warns_once_and_names_version_and_range(newer):
    with pytest.warns(RuntimeWarning, match=r"transformers 5\.\S+ \(tested: <4\.5,>=4\)"):
        environment.warn_untested()


def test_inside_the_range_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not environment.untested_versions():
            environment.warn_untested()


def test_version_names_what_was_tested():
    done = subprocess.run([sys.executable, "-m", "statex", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("statex 0.")
    assert "transformers" in done.stdout
    assert "tested: " in done.stdout


def test_the_device_has_a_name_and_its_threads():
    name = environment.device_name("cpu")
    threads = torch.get_num_threads()
    assert name.endswith(f", {threads} thread" + ("s" if threads > 1 else ""))
    assert len(name) > len(", 1 thread")


def git(folder, *arguments):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_our_own_sources(tmp_path, monkeypatch, tracked):
    """Not that of a repository of the user's in which the package happens to be installed."""
    source = tmp_path / "site" / "statex" / "utils" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    (tmp_path / "other.txt").write_text("x")
    git(tmp_path, "init")
    git(tmp_path, "add", "." if tracked else "other.txt")
    git(tmp_path, "commit", "-m", "x")
    monkeypatch.setattr(environment, "__file__", str(source))
    found = environment.source_commit()
    if tracked:
        assert len(found) == 12
        source.write_text("x = 2\n")
        assert environment.source_commit() == found + "+changes"
    else:
        assert found == f"statex {environment.package_version('statex')}"


def test_without_git_the_version_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.source_commit() == f"statex {environment.package_version('statex')}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.source_commit() == f"statex {environment.package_version('statex')}"


def test_versions():
    versions = environment.versions()
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert environment.package_version("no-such-package") == "not installed"
    assert {"python", "statex", "torch", "transformers"} <= versions.keys()
