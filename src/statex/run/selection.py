"""Which part of a recipe one call works on, so that the jobs of a cluster can share a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from statex.errors import UserError
from statex.recipe import Recipe

Key = TypeVar("Key", str, int)


@dataclass(frozen=True)
class Selection:
    """Some of a recipe's models, arms and seeds; where none are named, all."""

    models: Sequence[str] = ()
    arms: Sequence[str] = ()
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Chain:
    """One model with one seed, and the arms that are run on it: what one process does, stage after stage.

    Args:
        arms: none: the model is pre-trained.
        is_part: of what is done of this model and seed at the same time.
    """

    model: str
    seed: int
    arms: tuple[str, ...]
    is_part: bool = False

    def __str__(self) -> str:
        return " ".join([f"{self.model} seed {self.seed}", *(self.arms if self.is_part else ())])

    def parts(self) -> tuple["Chain", list["Chain"]]:
        """What all of its arms start from, and the arms, which several processes can share."""
        return replace(self, arms=()), [replace(self, arms=(arm,), is_part=True) for arm in self.arms]


def chains_of(recipe: Recipe, selection: Selection | None = None) -> list[Chain]:
    """The chains of a recipe, or of a part of it, in the recipe's order.

    Raises:
        UserError: a model, arm or seed that the recipe does not have, or an arm of none of the selected models.
    """
    selection = selection or Selection()
    models = _chosen("--model", selection.models, recipe.models)
    arms = _chosen("--arm", selection.arms, recipe.arms)
    seeds = _chosen("--seed", selection.seeds, recipe.seeds)
    of_model = {model: tuple(arm for arm in recipe.arms_of(model) if arm in arms) for model in models}
    for arm in selection.arms:
        if not any(arm in of_one for of_one in of_model.values()):
            known = f"it is for {', '.join(recipe.arms[arm].models or [])}"
            raise UserError("--arm", arm, f"is not run on {', '.join(models)}", known)
    return [
        Chain(model, seed, of_one)
        for model, of_one in of_model.items()
        for seed in seeds
        if of_one or not selection.arms
    ]


def _chosen(option: str, asked: Sequence[Key], known: Iterable[Key]) -> list[Key]:
    """What of `known` was asked for, all where nothing was."""
    known = list(known)
    for name in asked:
        if name not in known:
            problem = "is not one of this recipe"
            raise UserError(option, name, problem, f"known: {', '.join(map(str, known))}")
    return [name for name in known if name in asked] if asked else known
