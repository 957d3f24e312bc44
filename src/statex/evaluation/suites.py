"""The table of suites."""

from statex.errors import UserError
from statex.evaluation import (
    ar_hits,
    cost,
    mqar,
    niah_multikey,
    niah_single,
    nll_by_position,
    passkey,
    symbol_icl,
    variable_tracking,
)
from statex.evaluation.context import Suite

SUITES: dict[str, Suite] = {
    "mqar": mqar.SUITE,
    "passkey": passkey.SUITE,
    "ar_hits": ar_hits.SUITE,
    "nll_by_position": nll_by_position.SUITE,
    "niah_single_1": niah_single.NIAH_SINGLE_1,
    "niah_single_2": niah_single.NIAH_SINGLE_2,
    "niah_single_3": niah_single.NIAH_SINGLE_3,
    "niah_multikey": niah_multikey.SUITE,
    "variable_tracking": variable_tracking.SUITE,
    "symbol_icl": symbol_icl.SUITE,
    "cost": cost.SUITE,
}

SUITE_GROUPS: dict[str, list[str]] = {"offline": list(SUITES)}
"""Names that stand for several suites."""


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        UserError: there is none; the known ones are listed.
    """
    if name not in SUITES:
        known = f"known suites: {', '.join(SUITES)}; groups: {', '.join(SUITE_GROUPS)}"
        raise UserError("evaluation.suites", name, "is not a suite", known)
    return SUITES[name]


def expand_names(names: list[str]) -> list[str]:
    """Names with every group's replaced by those of its suites, none twice."""
    return list(dict.fromkeys(suite for name in names for suite in SUITE_GROUPS.get(name, [name])))
