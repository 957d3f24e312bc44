"""The table of what can be measured: our suites, groups of them, and groups of lm-eval's tasks. It loads no suite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SuiteEntry:
    """A line of the table.

    Args:
        title: in a report.
        short_title: where space is short.
        section: the section of a report that shows it; "other": chosen by the keys that the suite is sliced by.
        groups: names for several suites at once, in recipes and on the command line.
    """

    title: str
    short_title: str
    section: Literal["recall", "text", "long contexts", "icl", "cost", "other"] = "other"
    groups: tuple[str, ...] = ("offline",)


SUITES: dict[str, SuiteEntry] = {
    "mqar": SuiteEntry("Recall (MQAR)", "MQAR", "recall"),
    "passkey": SuiteEntry("Passkey", "passkey", "long contexts"),
    "ar_hits": SuiteEntry("Text, AR-hits", "AR-hits", "text"),
    "nll_by_position": SuiteEntry("Text, NLL by position", "by position", "text"),
    "niah_single_1": SuiteEntry("Needle in repeated noise (S-NIAH-1)", "S-NIAH-1", "long contexts"),
    "niah_single_2": SuiteEntry("Needle in text, number (S-NIAH-2)", "S-NIAH-2", "long contexts"),
    "niah_single_3": SuiteEntry("Needle in text, UUID (S-NIAH-3)", "S-NIAH-3", "long contexts"),
    "niah_multikey": SuiteEntry("Needle among other keys", "several keys", "long contexts"),
    "variable_tracking": SuiteEntry("Variable tracking", "variable tracking", "long contexts"),
    "symbol_icl": SuiteEntry("In-context learning of symbols", "symbol ICL", "icl"),
    "recall_forms": SuiteEntry("Recall in words", "in words", "long contexts"),
    "cost": SuiteEntry("Cost", "cost", "cost"),
}
"""Our suites in the order they are run; the code and the settings of each are `evaluation/suites/<name>.py`."""

HARNESS_GROUPS: dict[str, tuple[str, ...]] = {
    "recall": ("swde", "fda", "squad_completion", "statex_triviaqa", "statex_nq", "statex_drop"),
    "common-sense": ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa"),
    "long-context": (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "ruler_vt", "ruler_cwe", "ruler_fwe",
    ),
    "icl": ("statex_trec_coarse", "statex_trec_fine", "statex_banking77", "statex_clinc150"),
    "generalisation": ("gsm8k", "humaneval", "mbpp", "statex_coqa"),
    "statex": (
        "statex_passkey", "statex_niah_single_1", "statex_niah_single_2", "statex_niah_single_3",
        "statex_niah_multikey", "statex_variable_tracking", "statex_symbol_icl",
    ),
}  # fmt: skip
"""Groups of lm-eval's tasks; those that begin with `statex_` are our own, written for lm-eval."""

LM_EVAL = "lm_eval_"
"""Prefix of lm-eval's tasks that share the name of one of our suites, as niah_single_1 does: a folder may hold both."""


def suite_groups() -> dict[str, tuple[str, ...]]:
    """The groups of our suites."""
    groups = dict.fromkeys(group for entry in SUITES.values() for group in entry.groups)
    return {group: tuple(name for name, entry in SUITES.items() if group in entry.groups) for group in groups}


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our suites and lm-eval's tasks among `names`, with groups expanded and without repetitions.

    A name that is neither a suite nor a group is taken for one of lm-eval's thousands of tasks.
    """
    groups, ours = suite_groups(), dict[str, None]()
    tasks: dict[str, None] = {}
    for name in names:
        if name in HARNESS_GROUPS:
            tasks |= dict.fromkeys(HARNESS_GROUPS[name])
        elif name in groups or name in SUITES:
            ours |= dict.fromkeys(groups.get(name, (name,)))
        else:
            tasks[task_name(name)] = None
    return list(ours), list(tasks)


def result_name(task: str) -> str:
    """The name of one of lm-eval's tasks in our results and files."""
    return f"{LM_EVAL}{task}" if task in SUITES else task


def task_name(name: str) -> str:
    """The opposite of `result_name`."""
    return name.removeprefix(LM_EVAL) if name.removeprefix(LM_EVAL) in SUITES else name


def known_names() -> str:
    """The known names, for an error message."""
    groups = ", ".join([*suite_groups(), *HARNESS_GROUPS])
    return f"known suites: {', '.join(SUITES)}; groups: {groups}; or a task of lm-eval, where it is installed"
