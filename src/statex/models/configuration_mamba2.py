"""The expanded Mamba2's configuration, under the name that saved folders know it by (see `factory`)."""

from statex.families import FAMILIES
from statex.models.factory import expanded_config_class

StatexMamba2Config = expanded_config_class(FAMILIES["mamba2"])

__all__ = ["StatexMamba2Config"]
