"""RWKV-7: each head's key dimension grows, with everything that has a number for each key channel.

Letters: H heads, K and V key and value dimension of a head.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from statex.families.base import Family, Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.shared import INHERIT_NOISE, refuse_rank


class RWKV7Fields(ConfigFields):
    """Fields of an RWKV-7 configuration."""

    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "num_heads", "head_dim", "intermediate_size", "decay_low_rank_dim",
        "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim",
    )  # fmt: skip

    head_dim: Size | None
    num_heads: Size | None
    value_dim: Size | list[Size] | None
    decay_low_rank_dim: Size | None
    a_low_rank_dim: Size | None
    v_low_rank_dim: Size | None
    gate_low_rank_dim: Size | None
    hidden_ratio: Annotated[float, Field(gt=0, le=1024)] | None
    intermediate_size: Size | None
    norm_eps: PositiveFloat


class RWKV7Family(Family):
    """RWKV-7, arXiv 2503.14456; expansion of a key dimension: arXiv 2509.22630, section 3."""

    model_type = "statex_rwkv7"
    fields = RWKV7Fields
    mixer_path = "model.layers.{}.attn"
    norm_path = "model.layers.{}.attn_norm"
    keys_last = False
    config_class = "statex.models.rwkv7.configuration.RWKV7Config"
    model_class = "statex.models.rwkv7.modeling.RWKV7Model"
    causal_lm_class = "statex.models.rwkv7.modeling.RWKV7ForCausalLM"
    holds_plan = True
    whole_sequences = "a token shift, which does not see the last token of another part"
    measured = (
        "logits of the reference implementation's tiny model to 5e-7 ([test](../tests/models/test_rwkv7_reference.py))"
    )

    def recurrent_layers(self, config: Any) -> list[int]:
        return list(range(config.num_hidden_layers))

    def geometry(self, config: Any) -> StateGeometry:
        return StateGeometry(config.num_heads, config.head_dim, config.num_values // config.num_heads)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        return mixer_class(config, layer_idx, key_dim=geometry.key_dim)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # What removes is normalised, so f copies of it remove as one did. What is read, and the bonus, would be f times
        # as large: the keys that write carry no factor, and what reads them carries 1 / f. Copies differ by the noise
        # of the projections.
        scale = before.key_dim / after.key_dim
        return _rows(before, after, r="copy", k="copy", k_k="copy", noise=INHERIT_NOISE, scale=scale)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        # New channels of what removes must be 0, or the old ones' share of its length would change; k_k makes them so,
        # while the keys that write are fresh. What reads is 0. Both get a gradient at once, and the rest a step later.
        refuse_rank(rank)
        return _rows(before, after, r="zero", k="fresh", k_k="zero")


def _rows(
    before: StateGeometry,
    after: StateGeometry,
    *,
    r: Fill,
    k: Fill,
    k_k: Fill,
    noise: float = 0.0,
    scale: float = 1.0,
) -> dict[str, TensorRows]:
    """All tensors with a row for each key channel. Decays, rates and the like of new channels are those of old ones."""
    sizes = before.num_heads, before.key_dim, after.key_dim

    def rows(name: str, fill: Fill = "copy", **more: float) -> TensorRows:
        return TensorRows((Segment(name, *sizes, fill=fill, **more),))  # type: ignore[arg-type]

    decay, rate = rows("decay"), rows("rate")
    bonus = TensorRows((Segment("bonus", 1, before.key_dim, after.key_dim, fill="copy"),), dim=1)
    return {
        "r_proj.weight": rows("r", r, noise=noise if r == "copy" else 0.0, scale=scale),
        "k_proj.weight": rows("k", k, noise=noise if k == "copy" else 0.0),
        "k_k": rows("k_k", k_k),
        "k_a": rows("k_a"),
        "r_k": bonus,
        "w_lora.lora.2.weight": decay,
        "w_lora.lora.2.bias": decay,
        "a_lora.lora.2.weight": rate,
        "a_lora.lora.2.bias": rate,
    }
