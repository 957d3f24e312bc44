"""From a TOML file, what it extends and `section.key=value` overrides to a checked recipe."""

import copy
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from statex.errors import UserError, explained
from statex.expansion.config import user_error
from statex.recipe.schema import EvaluationSections, Recipe
from statex.settings import check_plain


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file and apply `section.key=value` overrides, whose values are TOML.

    A recipe that `extends` another, named by its path relative to this one, lists its changes to it: tables are
    merged, key by key; everything else is replaced.

    Raises:
        UserError: no such file, invalid TOML, recipes that extend one another, an unknown key, or a value of the
            wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("recipe", str(path), "there is no such file", "give the path of a TOML recipe")
    values = _read_values(path, ())
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, relative_to=path.parent)


def _read_values(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the recipe that it extends, with the paths of both made absolute."""
    with explained("recipe", str(path), "is not valid TOML", "correct that line"):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    check_plain(values)
    make_paths_absolute(values, path.parent)
    if "extends" not in values:
        return values
    other, chain = values.pop("extends"), (*extended_by, path.resolve())
    if not isinstance(other, str):
        raise UserError("extends", other, "is not a path", "give the path of another recipe, relative to this one")
    base = path.parent / other
    if not os.path.isfile(base):  # unlike Path.is_file, also False where no file can have that name
        raise UserError("extends", other, f"there is no such file beside {path}", "give the path of another recipe")
    if base.resolve() in chain:
        names = " -> ".join(each.name for each in (*chain, base))
        raise UserError("extends", other, f"leads back to itself ({names})", "remove one of them from the chain")
    return merged(_read_values(base, chain), values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Both tables merged, at any depth; other values come from `changes` where it has them."""
    both = base | changes
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = merged(base[key], changes[key])
    return both


def parse_recipe(values: dict[str, Any], relative_to: Path | None = None) -> Recipe:
    """Check the values of a recipe; paths of data become absolute, relative ones being looked up from `relative_to`."""
    check_plain(values)
    values = copy.deepcopy(values)
    if relative_to is not None:
        make_paths_absolute(values, relative_to)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise user_error(error) from None


def make_paths_absolute(values: dict[str, Any], folder: Path) -> None:
    """Make relative paths of data absolute, looked up from `folder`."""
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("tokens"), str):
        data["tokens"] = str(folder.resolve() / data["tokens"])
    for section in (data, values.get("evaluation")):
        source = section.get("text") if isinstance(section, dict) else None
        if isinstance(source, dict) and isinstance(source.get("files"), list):
            source["files"] = [str(folder.resolve() / str(pattern)) for pattern in source["files"]]
    harness = values["evaluation"].get("harness") if isinstance(values.get("evaluation"), dict) else None
    if isinstance(harness, dict) and isinstance(harness.get("data"), str):
        harness["data"] = str(folder.resolve() / harness["data"])


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key, `section.key=value`; a value that is not TOML is taken as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError("--set", override, "is not of the form section.key=value", "write for example seeds=[0,1,2]")
    value = _value_of_override(override, text)
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError("--set", override, f"{section} is not a section", "name a key inside a section")
    target[last] = value


def _value_of_override(override: str, text: str) -> Any:
    """The value after `=`: TOML, or else the text itself, never only a part of it."""
    with explained("--set", override, "has a value that is not valid TOML", "correct the value"):
        try:
            document = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            document = {"value": text}
    if len(document) > 1 or ("\n" in text and document["value"] == text):
        raise UserError("--set", override, "has more than one line", "give --set once for each key")
    return document["value"]


def evaluation_sections(overrides: Sequence[str], suites: list[str]) -> EvaluationSections:
    """The evaluation of one model outside a recipe: the defaults with `section.key=value` overrides.

    Raises:
        UserError: an unknown key, or a value of the wrong type or range.
    """
    values: dict[str, Any] = {"evaluation": {"suites": suites}}
    for override in overrides:
        apply_override(values, override)
    try:
        return EvaluationSections.model_validate(values)
    except ValidationError as error:
        raise user_error(error) from None
