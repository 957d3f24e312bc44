"""Arguments and options that verbs share, and what they mean."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from statex.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Put the result, alone, on standard output as JSON.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
OfModels = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME", help="Only this model of the recipe; may be repeated.")
]
OfArms = Annotated[
    list[str] | None, typer.Option("--arm", metavar="NAME", help="Only this arm of the recipe; may be repeated.")
]
OfSeeds = Annotated[
    list[int] | None, typer.Option("--seed", metavar="SEED", help="Only this seed of the recipe; may be repeated.")
]
Suites = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A suite, a group or a task of lm-eval; may be repeated. Default: offline."),
]
OutOfScores = Annotated[Path | None, typer.Option(help="Folder of scores. Default: runs/eval/ and the model's name.")]
Limit = Annotated[
    int | None, typer.Option(help="Items of each task of lm-eval, and of each of its lengths. Default: all.")
]
PromptLengths = Annotated[
    str | None, typer.Option(help="Tokens of prompts, for example 1024,4096, wherever lengths can be chosen.")
]
BatchSize = Annotated[int | None, typer.Option(help="Prompts read at once.")]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder of data sets that lm-eval's tasks read instead of the hub's.")
]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see the folder recipes/.")]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a name on the Hugging Face hub.")]


def expansion_config(preset: str | None, fields: dict[str, Any]) -> Any:
    """The expansion that the options of `expand` describe."""
    from statex.expansion.config import PRESETS, ExpansionConfig

    if preset is None:
        return ExpansionConfig(**fields)
    if preset not in PRESETS:
        raise UserError("--preset", preset, "is unknown", f"known presets: {', '.join(PRESETS)}")
    if fields:
        raise UserError("--preset", preset, f"excludes {', '.join(fields)}", "give the preset or the options, not both")
    return PRESETS[preset]


def parse_numbers(option: str, text: str | None) -> list[int] | None:
    """ "0,6,12,18" as [0, 6, 12, 18]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, text, "is not a list of numbers", "write for example 0,6,12,18") from None


def evaluation_overrides(
    limit: int | None, lengths: str | None, batch_size: int | None, data: Path | None = None
) -> list[str]:
    """The options of `eval` as changes of a recipe's keys; `lengths` apply to every suite that has lengths."""
    from statex.recipe import Evaluation

    changes = []
    if limit is not None:
        changes.append(f"evaluation.harness.limit={limit}")
    if batch_size is not None:
        changes.append(f"evaluation.batch_size={batch_size}")
    if data is not None:
        changes.append(f"evaluation.harness.data={json.dumps(str(data), ensure_ascii=False)}")
    if numbers := parse_numbers("--lengths", lengths):
        with_lengths = [name for name, section in Evaluation() if hasattr(section, "lengths")]
        changes += [f"evaluation.{name}.lengths={numbers}" for name in with_lengths]
    return changes


def model_name(model: str) -> str:
    """A name for a model's scores: its folder's, with its parents' where a run gives all its models the same."""
    parts = Path(model).resolve().parts
    return "-".join(parts[-4:]) if parts[-1] in ("trained", "expanded") else parts[-1]
