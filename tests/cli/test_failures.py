"""Exit status and words where something fails or a signal comes: 1 failure, 2 the user's mistake."""

import signal
import sys

import pytest

from statex.cli import main

FULL = "statex: no space left in runs/x; free some space, then the same command resumes"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "runs"), 1, "statex: [Errno 13] Permission denied: 'runs'"),
        (FloatingPointError("the loss is nan"), 1, "statex: the loss is nan"),
        (KeyboardInterrupt(), 1, "statex: stopped; the same command resumes"),
        (OSError(28, "No space left on device", "runs/x"), 1, FULL),
        (OSError(28, "unexpected pos 12800 vs 12692", "runs/x"), 1, f"{FULL} (unexpected pos 12800 vs 12692)"),
    ],
)
def test_failures(call, recipe, monkeypatch, error, status, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("statex.run.run_recipe", fail)
    found, output, errors = call("run", recipe, "--json")
    assert (found, output) == (status, "")
    start, end = errors.splitlines()
    assert start.startswith("statex 0.")
    assert "tested: " in start
    assert end == message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_stops_as_the_keyboard_does(call, recipe, monkeypatch, number, rank):
    """Under torchrun one process says so."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("statex.run.run_recipe", lambda *args, **kwargs: signal.raise_signal(number))
    before = signal.getsignal(number)
    status, output, errors = call("run", recipe, "--json")
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1:] == (["statex: stopped; the same command resumes"] if rank == 0 else [])
    assert signal.getsignal(number) is before


def test_what_breaks_because_of_a_signal_is_not_our_error(call, recipe, monkeypatch):
    """The handler's exception may be lost where another, of a peer that stopped as well, is on its way."""

    def fail(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("Connection closed by peer") from None

    monkeypatch.setattr("statex.run.run_recipe", fail)
    status, _, errors = call("run", recipe)
    assert (status, errors.splitlines()[-1]) == (1, "statex: stopped; the same command resumes")


def test_a_signal_that_is_ignored_stays_so(call, recipe, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("statex.run.run_recipe", lambda *args, **kwargs: signal.raise_signal(signal.SIGHUP))
        status, _, errors = call("train", recipe)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopped" not in errors
    assert status == 0


def test_our_own_errors_are_not_hidden(recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("ours")

    monkeypatch.setattr("statex.run.run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["statex", "run", str(recipe)])
    with pytest.raises(AssertionError, match="ours"):
        main()
