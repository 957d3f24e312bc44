"""The expanded Mamba2's model classes, under the name that saved folders know them by (see `factory`)."""

from statex.families import FAMILIES
from statex.models.factory import expanded_model_classes

StatexMamba2Model, StatexMamba2ForCausalLM = expanded_model_classes(FAMILIES["mamba2"])

__all__ = ["StatexMamba2ForCausalLM", "StatexMamba2Model"]
