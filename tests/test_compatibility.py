"""Which versions statex says it was tested with, and its word outside them."""

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from statex import compatibility

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_range_has_both_bounds():
    for extra in ([], *PROJECT["optional-dependencies"].values()):
        for line in extra:
            assert "<" in line or "==" in line or line.startswith(("triton", "einops")), line
    for line in PROJECT["dependencies"]:
        assert ">=" in line, line
        assert ",<" in line, line


def test_the_locked_versions_are_inside_the_ranges():
    lock = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    pins = (line.partition(";")[0].strip() for line in lock.splitlines() if line[:1] not in (" ", "#"))
    locked = dict(pin.split("==") for pin in pins)
    for name, specifier in compatibility.tested_ranges().items():
        assert specifier.contains(locked[name]), name


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(compatibility, "tested_ranges", lambda: {"transformers": SpecifierSet(">=4,<4.5")})


def test_outside_the_range_warns_once_and_names_version_and_range(newer):
    with pytest.warns(RuntimeWarning, match=r"transformers 5\.\S+ \(tested: <4\.5,>=4\)"):
        compatibility.warn_untested()


def test_inside_the_range_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not compatibility.untested_versions():
            compatibility.warn_untested()


def test_version_names_what_was_tested():
    done = subprocess.run([sys.executable, "-m", "statex", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("statex 0.")
    assert "transformers" in done.stdout
    assert "tested: " in done.stdout
