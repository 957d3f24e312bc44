"""docs/families.md, made from the table of families: `python -m statex.families.document docs/families.md`."""

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.families import ALL_FAMILIES, NOT_EXPANDABLE, Family
from statex.families.base import GROW

HEAD = """# Families

Which models can be expanded, and how. Made from the table in `src/statex/families/__init__.py` by
`python -m statex.families.document docs/families.md`; `statex inspect MODEL` says the same of one model.

All families of statex and transformers are tested alike, on tiny models with random weights on a CPU, with the oldest
and the newest transformers that statex supports (`tests/expansion`, `tests/families`): plan and model agree, saved and
loaded models are equal bit by bit, other layers stay as they were, every new row learns within two steps, `preserve`
keeps the logits, generation with a cache equals generation without, left padding, gradient checkpointing, a second
expansion.
What was measured on models of some size is in the last column.

The last families are flash-linear-attention's own classes (tested: 0.6.0), as `fla.models` makes them. Their plan,
surgery and folders need no GPU, and are tested on a CPU with references in the place of FLA's kernels; to compute
anything they need one. A folder of its `gla` or `rwkv7` becomes statex's own model when `statex.load` reads it, which
runs on a CPU too. The others are loaded, and expanded ones saved, under a model type of their own (`statex_fla_gsa`,
...), of a class derived from FLA's, which keeps packed documents apart; loading such a folder needs statex and FLA.
"""
WHOSE_OPS = """
A family that runs on statex's ops has the same kernels as GLA and Mamba2, but for RWKV-7 and the first Mamba's families
(Mamba, Falcon-Mamba, Jamba), whose recurrences are in chunks in PyTorch on every device; and it keeps packed documents
apart, in its attention layers too.
"""


def families_page() -> str:
    """The text of docs/families.md."""
    header = ("model_type", "what it is", "what grows", "factors", "initialisations", "runs on", "measured")
    rows = [header, ("---",) * len(header), *map(_row, ALL_FAMILIES.values())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    refused = [
        f"- `{name}`, `{init}` with `{method}`: {problem}."
        for name, family in ALL_FAMILIES.items()
        for init, method, problem in _refused(family)
    ]
    cannot = [f"- `{name}`: {reason}." for name, reason in NOT_EXPANDABLE.items()]
    lacking = ["## Initialisations that a family lacks", "", *refused, ""]
    left_out = [f"- `{name}`: {family.left_out}." for name, family in ALL_FAMILIES.items() if family.left_out]
    others = [
        "## Weights that are left out",
        "",
        "transformers does not load them where a checkpoint has them, and so an expanded folder has none.",
        "",
        *left_out,
        "",
        "## What cannot be expanded",
        "",
        *cannot,
        "- Models of attention alone: they have no recurrent state.",
        "",
    ]
    return "\n".join([HEAD, table, WHOSE_OPS, *lacking, *others])


def _row(family: Family) -> tuple[str, ...]:
    what = (inspect.getdoc(type(family)) or "").partition("\n")[0].removesuffix(".")
    refused = {(init, method) for init, method, _ in _refused(family)}
    methods = {init: [one for one in methods if (init, one) not in refused] for init, methods in family.methods.items()}
    inits = ", ".join(f"`{init}`" for init, left in methods.items() if left)
    return f"`{family.model_type}`", what, family.grows, family.factors, inits, family.runs_on, family.measured


def _refused(family: Family) -> list[tuple[str, str, str]]:
    """The initialisations that the family has not, by the method that it has them not with, and why not."""
    problems = []
    for init in ("inherit", "preserve"):
        for method in sorted({each for methods in family.methods.values() for each in methods}):
            try:
                family.method_of(init, method)
                if method == GROW and init == "preserve" and family.library == "transformers":
                    _preserve(family)
            except UserError as error:
                if error.field == "init":
                    problems.append((init, method, error.problem))
    return problems


def _preserve(family: Family) -> None:
    """What `preserve` makes of a model as its configuration's defaults make it."""
    module, _, name = family.config_class.rpartition(".")
    config: Any = getattr(import_module(module), name)()
    before = family.geometry(config)
    family.preserving_rows(config, before, family.expanded_geometry(config, before, 4, "preserve"), None)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(families_page(), encoding="utf-8")
