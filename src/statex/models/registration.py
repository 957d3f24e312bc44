"""Make our names known to transformers' Auto classes: configurations at import, models when a configuration is built.

Importing the model classes takes seconds; importing their configurations takes milliseconds beyond transformers' own.
"""


def register_configurations() -> None:
    """Add statex_gla and statex_mamba2 to transformers' AutoConfig; no other name is touched."""
    from transformers import AutoConfig

    from statex.models.configuration_mamba2 import StatexMamba2Config
    from statex.models.gla.configuration import GLAConfig

    for config_class in (GLAConfig, StatexMamba2Config):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Add the model classes of those configurations to AutoModel and AutoModelForCausalLM."""
    from transformers import AutoModel, AutoModelForCausalLM

    from statex.models.configuration_mamba2 import StatexMamba2Config
    from statex.models.gla.configuration import GLAConfig
    from statex.models.gla.modeling import GLAForCausalLM, GLAModel
    from statex.models.mamba2 import StatexMamba2ForCausalLM, StatexMamba2Model

    AutoModel.register(GLAConfig, GLAModel, exist_ok=True)
    AutoModel.register(StatexMamba2Config, StatexMamba2Model, exist_ok=True)
    AutoModelForCausalLM.register(GLAConfig, GLAForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(StatexMamba2Config, StatexMamba2ForCausalLM, exist_ok=True)
