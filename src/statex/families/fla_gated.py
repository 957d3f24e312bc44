"""GLA, HGRN2 and gated slot attention in flash-linear-attention's own classes.

Letters: H heads of queries, K and V key and value dimension of a head, M slots.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, StateGeometry, TensorRows
from statex.families.fields import Share, Size
from statex.families.fla import FLAFamily, FLAFields, HeadFields, grown, num_kv_heads, shares_of
from statex.families.gla import GLAFamily, GLAFields
from statex.families.shared import INHERIT_NOISE, refuse_rank


class GLAOfFLAFamily(FLAFamily, GLAFamily, model="GLA"):
    """Gated linear attention, arXiv 2312.06635, a model of FLA's own class; its folders become `statex_gla`."""

    model_type = "gla"
    fields = GLAFields  # type: ignore[assignment]
    holds_plan = False
    keys_last = True
    measured = FLAFamily.measured
    blocks_compile = False
    compiled_by_default = False

    def default_factor(self, config: Any, before: StateGeometry, method: str = MERGE) -> int:
        return super().default_factor(_as_ours(config), before, method)

    def merged_geometry(self, config: Any, before: StateGeometry, factor: int) -> StateGeometry:
        return super().merged_geometry(_as_ours(config), before, factor)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        return mixer_class(
            mode=config.attn_mode,
            hidden_size=config.hidden_size,
            **shares_of(config, geometry),
            num_heads=geometry.num_heads,
            num_kv_heads=num_kv_heads(config, geometry),
            feature_map=config.feature_map,
            use_short_conv=config.use_short_conv,
            conv_size=config.conv_size,
            use_output_gate=config.use_output_gate,
            gate_fn=config.hidden_act,
            elementwise_affine=config.elementwise_affine,
            norm_eps=self.norm_eps(config, geometry),
            clamp_min=config.clamp_min,
            fuse_norm=config.fuse_norm,
            layer_idx=layer_idx,
        )

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        return GLAFamily.inherited_rows(self, _as_ours(config), before, after)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        return GLAFamily.preserving_rows(self, _as_ours(config), before, after, rank)


def _as_ours(config: Any) -> SimpleNamespace:
    """What the family of our own GLA reads of a configuration, from FLA's, which leaves the heads of keys out."""
    H = config.num_heads
    return SimpleNamespace(num_heads=H, num_kv_heads=config.num_kv_heads or H, feature_map=config.feature_map)


class HGRN2Fields(FLAFields):
    """Fields of an HGRN2 configuration."""

    num_heads: Size | None
    expand_ratio: Size | None


class HGRN2Family(FLAFamily, model="HGRN2"):
    """HGRN2, arXiv 2404.07904: heads are merged, as its authors enlarge its state.

    A head has as many keys as values, and the lower bounds of the forget gates, which the layers share, are as many as
    the model is wide: keys cannot be added to a head, and a merged layer has the tensors of the old one.
    """

    model_type = "hgrn2"
    fields = HGRN2Fields
    keys_last = True
    methods: ClassVar = {"reinit": (MERGE,), "inherit": (MERGE,)}
    merging_needs = "would need queries that read no other head's keys; and a head has no more keys than values"
    grows = "heads are merged"
    factors = "divisors of the number of heads; 4, 3 or 2, whichever is one first, where none is given"

    def geometry(self, config: Any) -> StateGeometry:
        K = config.expand_ratio or config.hidden_size // config.num_heads
        return StateGeometry(config.hidden_size // K, K, K)

    def check(self, config: Any) -> None:
        K = self.geometry(config).key_dim
        if config.hidden_size % K:
            raise UserError("expand_ratio", K, f"does not divide hidden_size = {config.hidden_size}", "use a divisor")

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        return mixer_class(
            mode=config.attn_mode,
            hidden_size=config.hidden_size,
            num_heads=geometry.num_heads,
            expand_ratio=geometry.key_dim,
            use_short_conv=config.use_short_conv,
            conv_size=config.conv_size,
            elementwise_affine=config.elementwise_affine,
            norm_eps=config.norm_eps,
            layer_idx=layer_idx,
        )

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        return {}


class GSAFields(HeadFields):
    """Fields of a configuration of gated slot attention; FLA's constructor misspells the shares of keys and values."""

    expand_k: Share = 1.0
    expand_v: Share = 1.0
    num_kv_heads: Size | None
    num_slots: Size | None
    gate_logit_normalizer: Size | None


class GSAFamily(FLAFamily, model="GSA"):
    """Gated slot attention, arXiv 2409.07146: a head has more slots, each of which holds a key and a value.

    Its state is M keys of K and M values of V numbers a head: M x (K + V). A softmax over the slots says how much of
    each is read.
    """

    model_type = "gsa"
    fields = GSAFields
    methods: ClassVar = {"reinit": (GROW,), "inherit": (GROW,)}
    lacks: ClassVar = {
        "preserve": (
            "would need new slots that the softmax over all of them leaves out: empty ones take part of what is read, "
            "and only exact copies of old ones do not, which would stay copies"
        )
    }
    grows = "slots"

    def geometry(self, config: Any) -> StateGeometry:
        whole = super().geometry(config)
        num_slots = config.num_slots if config.num_slots is not None else whole.key_dim
        return StateGeometry(whole.num_heads, num_slots, whole.key_dim + whole.value_dim)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        return mixer_class(
            hidden_size=config.hidden_size,
            expand_k=config.expand_k,
            expand_v=config.expand_v,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            num_slots=geometry.key_dim,
            use_short_conv=config.use_short_conv,
            conv_size=config.conv_size,
            feature_map=config.feature_map,
            use_output_gate=config.use_output_gate,
            use_norm=config.use_norm,
            gate_fn=config.hidden_act,
            gate_logit_normalizer=config.gate_logit_normalizer,
            elementwise_affine=config.elementwise_affine,
            norm_eps=config.norm_eps,
            fuse_norm=config.fuse_norm,
            layer_idx=layer_idx,
        )

    def cached_state(self, cache: Any, index: int) -> Tensor:
        keys, values = super().cached_state(cache, index)  # [B, H, K, M] and [B, H, M, V]
        return torch.cat([keys.mT, values], dim=-1)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # Copies of a slot share what was read of it
        num_heads = config.num_kv_heads or config.num_heads
        return {"f_proj.weight": grown(num_heads, before, after, "copy", INHERIT_NOISE)}
