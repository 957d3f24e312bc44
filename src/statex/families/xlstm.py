"""xLSTM: each head's key dimension grows, and with it the normaliser, which is a sum of keys.

Letters: H heads, K and V key and value dimension of a head, f factor.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from statex.families.base import Family, Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Share, Size
from statex.families.shared import INHERIT_NOISE, refuse_rank


class XLSTMFields(ConfigFields):
    """Fields of an xLSTM configuration."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "num_heads")
    initializer_range: float = 0.0

    num_heads: Size
    qk_dim_factor: Share
    v_dim_factor: Share
    ffn_proj_factor: Share
    ffn_round_up_to_multiple_of: Annotated[int, Field(ge=1, le=2**16)]
    gate_soft_cap: Annotated[float, Field(gt=0, le=40)]  # exp of it must be a number of fp32
    output_logit_soft_cap: PositiveFloat
    norm_eps: PositiveFloat
    eps: PositiveFloat


class XLSTMFamily(Family):
    """xLSTM, whose layers are mLSTMs, arXiv 2503.13427; expansion of a key dimension: arXiv 2509.22630, section 3.

    transformers' own model, of type `xlstm`, becomes ours when its folder is loaded by `statex.load`.
    """

    model_type = "statex_xlstm"
    fields = XLSTMFields
    mixer_path = "backbone.blocks.{}.mlstm_layer"
    norm_path = "backbone.blocks.{}.norm_mlstm"
    keys_last = False
    config_class = "statex.models.xlstm.configuration.StatexXLSTMConfig"
    model_class = "statex.models.xlstm.modeling.StatexXLSTMModel"
    causal_lm_class = "statex.models.xlstm.modeling.StatexXLSTMForCausalLM"
    holds_plan = True
    whole_sequences = "the mLSTM, whose state is not passed on yet"
    kept_by_reinit = ("igate_preact.weight", "igate_preact.bias", "fgate_preact.weight", "fgate_preact.bias")
    measured = "logits of transformers' model to 1e-5 ([test](../tests/expansion/test_xlstm_family.py))"

    def recurrent_layers(self, config: Any) -> list[int]:
        return list(range(config.num_hidden_layers))

    def geometry(self, config: Any) -> StateGeometry:
        H = config.num_heads
        return StateGeometry(H, config.num_keys // H, config.num_values // H)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        return mixer_class(config, layer_idx, key_dim=geometry.key_dim)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # Values and normaliser are read f times over; the bound on the normaliser is not, so the queries carry 1 / f
        return _rows(before, after, "copy", "copy", noise=INHERIT_NOISE, scale=before.key_dim / after.key_dim)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        # New keys write, into the normaliser too; new queries are 0 and read neither yet. The scale stays what it was
        return _rows(before, after, "zero", "fresh")


def _rows(
    before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float = 0.0, scale: float = 1.0
) -> dict[str, TensorRows]:
    sizes = before.num_heads, before.key_dim, after.key_dim
    return {
        "q.weight": TensorRows((Segment("q", *sizes, fill=queries, noise=noise, scale=scale),)),
        "k.weight": TensorRows((Segment("k", *sizes, fill=keys, noise=noise),)),
    }
