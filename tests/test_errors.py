"""One shape for the user's mistakes, whatever the value; a library's words kept, our own faults not hidden."""

import errno

import pytest

from statex.errors import LONGEST, UserError, explained


@pytest.mark.parametrize(
    "value", [10**5000, "x" * 10_000, "\ud800", "a\nb\x1b[31m\0"], ids=["digits", "long", "half", "line"]
)
def test_any_value_makes_one_short_line(value):
    error = UserError("field", value, f"is bad \x1b {str(value)[:20] if isinstance(value, str) else ''}", "change it")
    assert str(error).isprintable()
    assert len(str(error)) < LONGEST + 100
    str(error).encode()
    assert error.value == value


def explain(error, cause=None):
    with explained("config.json", "folder", "is refused", "correct it"):
        raise error from cause


def test_a_library_s_words_are_kept():
    """Raised as from a library: by code whose module is not ours."""
    for error in (KeyError("a"), TypeError("no\n   such"), Exception("bare"), RuntimeError(), OSError("no JSON")):
        with pytest.raises(UserError, match=r"config.json = 'folder': is refused \(.*\); correct it") as caught:
            explain(error)
        assert " ".join(str(error).split()) in caught.value.problem
        assert caught.value.__cause__ is error
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(UserError, match="index out of bounds"):
        explain(panic("index out of bounds"))


def test_the_innermost_cause_is_reported():
    with pytest.raises(UserError, match=r"is refused \(the real reason\)"):
        explain(RuntimeError("outer"), ValueError("the real reason"))
    inner = UserError("a", 1, "is wrong", "use 2")
    with pytest.raises(UserError) as caught:
        explain(RuntimeError("outer"), inner)
    assert caught.value is inner


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError(), OSError(errno.ENOSPC, "full")])
def test_what_is_nobody_s_mistake_passes(error):
    with pytest.raises(type(error)) as caught:
        explain(error)
    assert caught.value is error


def test_our_own_faults_pass():
    ours: dict = {"__name__": "statex.somewhere"}
    exec("def fault(error):\n    raise error", ours)
    for error in (AttributeError("a"), TypeError("b"), KeyError("c"), AssertionError()):
        with pytest.raises(type(error)), explained("config.json", "folder", "is refused", "correct it"):
            ours["fault"](error)
    with pytest.raises(UserError, match="num_heads must be"), explained("config.json", "x", "is refused", "correct it"):
        ours["fault"](ValueError("num_heads must be 1 or more"))  # a check of ours, in a library's terms
