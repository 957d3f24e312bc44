"""Models of flash-linear-attention (FLA), their own layers enlarged in place.

FLA is imported when one of these models is first asked for. Its kernels need a GPU; planning and surgery do not. Its
GLA is here for models that FLA itself made; a folder of one is loaded as statex's own (`statex_gla`).

Letters: H heads of queries, K and V key and value dimension of a head.
"""

from typing import Any, ClassVar

from torch import Tensor

from statex.families.base import Family, Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Share, Size

NOT_PASSED = "a recurrence of flash-linear-attention, whose state is not passed on"


class FLAFields(ConfigFields):
    """Fields that the configurations of FLA's models share."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "intermediate_size")

    hidden_ratio: Share | None
    intermediate_size: Size | None
    norm_eps: PositiveFloat
    attn: dict[str, Any] | list[dict[str, Any]] | None


class HeadFields(FLAFields):
    """Fields of those whose sizes of keys and values are shares of the model's."""

    num_heads: Size
    expand_k: Share
    expand_v: Share


class FLAFamily(Family):
    """One of FLA's models: blocks of a mixer and an MLP, a few with softmax attention in the mixer's place.

    FLA's kernels multiply what is read by K^-0.5, of the grown K. The norm of each head behind them takes that out
    again where its epsilon is in proportion to 1 / K, and so it is in a mixer that is built here.
    """

    library = "fla"
    fields: type[ConfigFields] = HeadFields
    mixer_path = "model.layers.{}.attn"
    norm_path = "model.layers.{}.attn_norm"
    keys_last = False
    runs_on = "FLA's kernels"
    whole_sequences = NOT_PASSED
    measured = "nothing yet; tested on a GPU ([test](../tests/gpu/test_fla_modules.py))"

    def __init_subclass__(cls, model: str = "") -> None:
        """Name a family's classes, which FLA keeps in a package that is called as the model type: `model` and more."""
        if model:
            package, name = f"fla.models.{cls.model_type}", cls.model_type
            cls.config_class = f"{package}.configuration_{name}.{model}Config"
            cls.model_class = f"{package}.modeling_{name}.{model}Model"
            cls.causal_lm_class = f"{package}.modeling_{name}.{model}ForCausalLM"

    def recurrent_layers(self, config: Any) -> list[int]:
        attention = [config.attn] if isinstance(config.attn, dict) else config.attn or []
        others = {index for one in attention for index in one["layers"]}
        return [index for index in range(config.num_hidden_layers) if index not in others]

    def geometry(self, config: Any) -> StateGeometry:
        H, D = config.num_heads, config.hidden_size
        return StateGeometry(H, round(D * config.expand_k) // H, round(D * config.expand_v) // H)

    def cached_state(self, cache: Any, index: int) -> Tensor:
        return cache[index]["recurrent_state"]

    def norm_eps(self, config: Any, geometry: StateGeometry) -> float:
        """The epsilon of the norm of each head, as above."""
        return config.norm_eps * self.geometry(config).key_dim / geometry.key_dim

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        raise AssertionError("expanded_geometry refuses to preserve")


def shares_of(config: Any, geometry: StateGeometry) -> dict[str, float]:
    """The sizes of a mixer as FLA's constructors take them."""
    sizes = {"expand_k": geometry.key_dim, "expand_v": geometry.value_dim}
    return {name: geometry.num_heads * size / config.hidden_size for name, size in sizes.items()}


def num_kv_heads(config: Any, geometry: StateGeometry) -> int:
    """Heads of keys and values of a layer: of a merged one as many fewer as it has fewer queries."""
    return (config.num_kv_heads or config.num_heads) * geometry.num_heads // config.num_heads


def grown(num_heads: int, before: StateGeometry, after: StateGeometry, fill: Fill, noise: float = 0.0) -> TensorRows:
    """Rows of queries or keys, or of their filters: each head's grow."""
    return TensorRows((Segment("keys", num_heads, before.key_dim, after.key_dim, fill=fill, noise=noise),))
