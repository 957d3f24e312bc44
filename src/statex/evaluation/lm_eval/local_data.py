"""Data sets of the hub from a local folder, for machines without a network."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex.data.files import COMPRESSIONS, TABLES, format_of
from statex.errors import UserError

if TYPE_CHECKING:
    import datasets

FIELD = "evaluation.harness.data"
NAMES = "data_sets.toml"
"""A file of the folder that says where a data set is: `"allenai/ai2_arc:ARC-Easy" = "arc_easy"`."""

USUAL_NAMES = {
    "allenai/ai2_arc:ARC-Easy": "arc_easy",
    "allenai/ai2_arc:ARC-Challenge": "arc_challenge",
    "allenai/winogrande:winogrande_xl": "winogrande",
    "clinc/clinc_oos:plus": "clinc150",
    "EleutherAI/lambada_openai": "lambada",
    "lighteval/siqa": "social_iqa",
    "mteb/banking77": "banking77",
    "nyu-mll/glue:sst2": "sst2",
    "openai/openai_humaneval": "humaneval",
    "SetFit/TREC-QC": "trec",
}
"""Usual folder names of public sets, where they are not the end of the hub's name."""
ONLY_CONFIGURATIONS = (None, "default", "main")
SPLITS = ("train", "validation", "test")
BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def check_folder(folder: Path) -> None:
    """Raise UserError where there is no such folder, or its list of names is invalid."""
    if not folder.is_dir():
        raise UserError(FIELD, str(folder), "is not a folder", "give one with a folder for each data set")
    names_of(folder)


def names_of(folder: Path) -> dict[str, str]:
    """Data sets, with their configuration after a colon, and where they are in the folder."""
    path = folder / NAMES
    if not path.exists():
        return USUAL_NAMES
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(FIELD, str(path), f"is not valid TOML ({error})", "correct that line") from None
    for name, place in own.items():
        if not isinstance(place, str) or not (folder / place).is_dir():
            problem = f"has {place!r} for {name}, which is not a folder in {folder}"
            raise UserError(FIELD, str(path), problem, "correct or remove that line")
    return USUAL_NAMES | own


@contextmanager
def local_data(folder: Path | None) -> Iterator[None]:
    """Inside this context, `datasets.load_dataset` looks in a folder first; None changes nothing."""
    import datasets

    if folder is None:
        yield
        return
    names, original = names_of(folder), datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, split: Any = None, **options: Any) -> Any:
        parts = find_parts(folder, names, path, name)
        if not parts:
            return original(path, name, *args, split=split, **options)
        read = _read(parts, original)
        return read if split is None else read[str(split)]

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def find_parts(folder: Path, names: dict[str, str], path: str, name: str | None) -> dict[str, Path]:
    """The files of a data set by their split; none where the folder does not have it.

    A set is looked for by the name that `names` gives it, by its name on the hub, and by the last part of that; one
    with several configurations has a folder for each, or a file that is its split "train".
    """
    known = names.get(path if name in ONLY_CONFIGURATIONS else f"{path}:{name}") or names.get(f"{path}:{name}")
    places = [folder / known] if known is not None else []
    for place in (folder / path, folder / path.rpartition("/")[2]):
        if name in ONLY_CONFIGURATIONS:
            places.append(place)
        if name is not None:
            places.append(place / name)
            if name in (single := _tables(place)):
                return {"train": single[name]}
    return next((parts for place in places if (parts := _tables(place))), {})


def _tables(folder: Path) -> dict[str, Path]:
    """The tables in a folder, by file name without ending."""
    endings = tuple(ending + packed for ending in TABLES for packed in ("", *COMPRESSIONS))
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name.partition(".")[0]: path for path in paths if path.name.lower().endswith(endings)}


def _read(parts: dict[str, Path], load_dataset: Callable[..., Any]) -> "datasets.DatasetDict":
    """All parts of a data set; a usual split that is missing becomes empty.

    lm-eval opens the split of few-shot examples even where it shows none.
    """
    import datasets

    read = datasets.DatasetDict()
    for split, path in parts.items():
        kind, _ = format_of(path, None, FIELD)
        options = {"sep": "\t"} if kind == "tsv" else {}
        try:
            read[split] = load_dataset(BUILDERS[kind], data_files=str(path), split="train", **options)
        except datasets.exceptions.DatasetsError as error:
            cause = str(error.__cause__ or error).partition("\n")[0]
            raise UserError(FIELD, str(path), f"cannot be read ({cause})", "repair the file or leave it out") from error
    some = next(iter(read.values()))
    for split in SPLITS:
        if split not in read:
            read[split] = some.select([])
    return read
