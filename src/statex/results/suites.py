"""The names of what can be measured: our suites, groups of them, and groups of lm-eval's tasks. No suite is loaded."""

from collections.abc import Sequence

SUITE_TITLES: dict[str, tuple[str, str]] = {
    "mqar": ("Recall (MQAR)", "MQAR"),
    "passkey": ("Passkey", "passkey"),
    "ar_hits": ("Text, AR-hits", "AR-hits"),
    "nll_by_position": ("Text, NLL by position", "by position"),
    "niah_single_1": ("Needle in repeated noise (S-NIAH-1)", "S-NIAH-1"),
    "niah_single_2": ("Needle in text, number (S-NIAH-2)", "S-NIAH-2"),
    "niah_single_3": ("Needle in text, UUID (S-NIAH-3)", "S-NIAH-3"),
    "niah_multikey": ("Needle among other keys", "several keys"),
    "variable_tracking": ("Variable tracking", "variable tracking"),
    "symbol_icl": ("In-context learning of symbols", "symbol ICL"),
    "cost": ("Cost", "cost"),
}
"""Our suites in the order they are run, each with its title in a report, in full and in short."""

SUITE_GROUPS: dict[str, tuple[str, ...]] = {"offline": tuple(SUITE_TITLES)}
"""Names that stand for several of our suites."""

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
"""Names that stand for several of lm-eval's tasks; those in `statex_` are ours, in its form."""

LM_EVAL = "lm_eval_"
"""Begins the name of a task of lm-eval that one of our suites shares, as niah_single_1: both may be in one folder."""


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The suites of ours and the tasks of lm-eval that names stand for, none twice; groups become what is in them.

    What is neither a suite nor a group is taken for a task of lm-eval, which alone knows its thousands.
    """
    ours: dict[str, None] = {}
    tasks: dict[str, None] = {}
    for name in names:
        if name in HARNESS_GROUPS:
            tasks |= dict.fromkeys(HARNESS_GROUPS[name])
        elif name in SUITE_GROUPS or name in SUITE_TITLES:
            ours |= dict.fromkeys(SUITE_GROUPS.get(name, (name,)))
        else:
            tasks[task_name(name)] = None
    return list(ours), list(tasks)


def result_name(task: str) -> str:
    """How the figures and items of one of lm-eval's tasks are called here."""
    return f"{LM_EVAL}{task}" if task in SUITE_TITLES else task


def task_name(name: str) -> str:
    """The opposite of `result_name`."""
    return name.removeprefix(LM_EVAL) if name.removeprefix(LM_EVAL) in SUITE_TITLES else name


def known_names() -> str:
    """What may be asked for, as a message says it."""
    groups = ", ".join([*SUITE_GROUPS, *HARNESS_GROUPS])
    return f"known suites: {', '.join(SUITE_TITLES)}; groups: {groups}; or a task of lm-eval, where it is installed"
