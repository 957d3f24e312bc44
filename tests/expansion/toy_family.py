"""A family in one file, as CONTRIBUTING says; the architecture is Mamba2 under another name.

The classes at the top stand for what transformers would have of it.
"""

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model

from statex.families.mamba2 import Mamba2Family


@strict
class ToyMamba2Config(Mamba2Config):
    model_type = "toy_mamba2"


class ToyMamba2Model(Mamba2Model):
    config_class = ToyMamba2Config


class ToyMamba2ForCausalLM(Mamba2ForCausalLM):
    config_class = ToyMamba2Config

    def __init__(self, config):
        super().__init__(config)
        self.backbone = ToyMamba2Model(config)
        self.post_init()


class ToyFamily(Mamba2Family):
    model_type = "toy_mamba2"
    config_class = f"{__name__}.ToyMamba2Config"
    model_class = f"{__name__}.ToyMamba2Model"
    causal_lm_class = f"{__name__}.ToyMamba2ForCausalLM"
