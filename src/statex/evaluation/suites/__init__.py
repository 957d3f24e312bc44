"""Our suites, one file each: settings, items, scoring. None imports torch at its top, as a recipe reads them all."""

from importlib import import_module

from statex.errors import UserError
from statex.evaluation.suite import Suite
from statex.results.suites import SUITES, known_names


def find_suite(name: str) -> Suite:
    """The suite of this name, from the file of the same name.

    Raises:
        UserError: the table has no such suite; the known ones are listed.
    """
    if name not in SUITES:
        raise UserError("evaluation.suites", name, "is not a suite", known_names())
    return import_module(f"{__name__}.{name}").SUITE
