"""Configuration of xLSTM: transformers' own, under our model type and with a plan."""

from huggingface_hub.dataclasses import strict
from transformers import xLSTMConfig

from statex.errors import UserError
from statex.models.caches import CACHE_NAMES
from statex.models.shim import FoundThroughShim


@strict
class StatexXLSTMConfig(FoundThroughShim, xLSTMConfig):
    """transformers' configuration of xLSTM (arXiv 2503.13427).

    Args:
        expansion: the plan of a state expansion (statex.expansion.plan), replayed when the model is built.

    Of transformers' fields, those that choose its kernels and their dtypes have no effect here.
    """

    model_type = "statex_xlstm"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012 (transformers' own form)

    expansion: list | dict | None = None

    def validate_architecture(self) -> None:
        """Refuse what the architecture here is not; called by transformers whenever a configuration is made."""
        if self.weight_mode != "single":
            problem = "joins projections that are apart here"
            raise UserError("weight_mode", self.weight_mode, problem, 'use a checkpoint with weight_mode = "single"')
        if self.use_bias:
            raise UserError("use_bias", True, "gives biases to projections that have none here", "use one without")
        if not self.add_out_norm:
            raise UserError(
                "add_out_norm", False, "leaves out the last norm, which is always there here", "use one with"
            )
        for name, size in (("qk_dim_factor", self.num_keys), ("v_dim_factor", self.num_values)):
            if size < 1 or size % self.num_heads:
                problem = f"makes {size} channels, which is no multiple of num_heads = {self.num_heads}"
                raise UserError(name, getattr(self, name), problem, "change one of them")

    @property
    def layer_types(self) -> list[str]:
        """One entry a layer: transformers' caches read it."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def num_keys(self) -> int:
        """Key dimension of all heads together, before an expansion; transformers' mixer does not round it either."""
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def num_values(self) -> int:
        """Value dimension of all heads together."""
        return int(self.hidden_size * self.v_dim_factor)
