"""The table of our suites; `statex.results.suites` has their titles, and the groups of names that stand for them."""

from statex.errors import UserError
from statex.evaluation.context import Suite
from statex.evaluation.prompts import single_needle
from statex.evaluation.suites import (
    ar_hits,
    cost,
    mqar,
    niah_multikey,
    nll_by_position,
    passkey,
    symbol_icl,
    variable_tracking,
)
from statex.results.suites import known_names

SUITES: dict[str, Suite] = {
    "mqar": mqar.SUITE,
    "passkey": passkey.SUITE,
    "ar_hits": ar_hits.SUITE,
    "nll_by_position": nll_by_position.SUITE,
    "niah_single_1": single_needle.NIAH_SINGLE_1,
    "niah_single_2": single_needle.NIAH_SINGLE_2,
    "niah_single_3": single_needle.NIAH_SINGLE_3,
    "niah_multikey": niah_multikey.SUITE,
    "variable_tracking": variable_tracking.SUITE,
    "symbol_icl": symbol_icl.SUITE,
    "cost": cost.SUITE,
}


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        UserError: there is none; the known ones are listed.
    """
    if name not in SUITES:
        raise UserError("evaluation.suites", name, "is not a suite", known_names())
    return SUITES[name]
