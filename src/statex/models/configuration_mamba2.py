"""Configuration of an expanded Mamba2: transformers' own plus the plan."""

from huggingface_hub.dataclasses import strict
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config

from statex.models.registration import register_models
from statex.models.shim import FoundThroughShim


@strict
class StatexMamba2Config(FoundThroughShim, Mamba2Config):
    """transformers' Mamba2Config with a plan.

    Args:
        expansion: the plan of a state expansion (statex.expansion.plan), replayed when the model is built.
    """

    model_type = "statex_mamba2"
    base_model_type = "mamba2"

    expansion: list | dict | None = None

    def __post_init__(self, **kwargs):
        register_models()
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse what our mixer cannot compute; called by transformers whenever a configuration is made."""
        from statex.families.mamba2 import ACTIVATIONS

        super().validate_architecture()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act = {self.hidden_act!r}: statex's convolution has SiLU only; use one of "
                f"{', '.join(ACTIVATIONS)}."
            )
