"""The names that `import statex` offers."""

import pickle

import pytest

import statex


def test_every_public_name_is_there_and_documented():
    assert sorted(statex.__all__) == sorted(statex._HOMES)
    for name in statex.__all__:
        assert getattr(statex, name) is not None
        assert name in dir(statex)
        if callable(getattr(statex, name)):
            assert getattr(statex, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'statex' has no attribute 'expnd'"):
        _ = statex.expnd


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert statex.__version__ == version("statex")


def test_user_errors():
    error = statex.UserError("factor", 1, "does not enlarge the state", "use 2 or more")
    assert str(error) == "factor = 1: does not enlarge the state; use 2 or more."
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.value) == (str(error), "factor", 1)
