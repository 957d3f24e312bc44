"""A recipe: one typed TOML file that describes a whole run. Unknown keys and bad values fail at once."""

from statex.recipe.reading import apply_override, evaluation_sections, load_recipe, merged, parse_recipe
from statex.recipe.schema import (
    Arm,
    Evaluation,
    EvaluationSections,
    HarnessTasks,
    Model,
    Recipe,
    Training,
    Weights,
)

__all__ = [
    "Arm",
    "Evaluation",
    "EvaluationSections",
    "HarnessTasks",
    "Model",
    "Recipe",
    "Training",
    "Weights",
    "apply_override",
    "evaluation_sections",
    "load_recipe",
    "merged",
    "parse_recipe",
]
