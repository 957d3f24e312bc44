"""DeltaNet and Gated DeltaNet in flash-linear-attention's own classes.

Letters: H value heads, G key heads, K key dimension of a head.
"""

import math
from typing import Any, ClassVar

from torch import nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, Family, Fill, StateGeometry, TensorRows
from statex.families.fields import Share, Size
from statex.families.fla import FLAFamily, FLAFields, grown, shares_of
from statex.families.shared import INHERIT_NOISE, ONE_RATE, refuse_rank


class FLADeltaFamily(FLAFamily):
    """The delta rule in FLA's layers, on statex's recurrence, because FLA's takes no more than 256 keys.

    As in transformers' models (`gated_delta.py`): keys are divided by the length of all their channels, queries of an
    expanded layer by that of the old ones, so that new channels of the keys are 0 where the function is preserved, and
    the queries' are fresh.
    """

    recurrence = "fla_delta"
    runs_on = "statex's recurrence, FLA's other kernels"
    methods: ClassVar = {"reinit": (GROW, MERGE), "inherit": (GROW,), "preserve": (GROW,)}
    merging_needs = ONE_RATE
    grows = 'key dimension, or with `method = "merge"` heads are merged'
    factors = (
        "2 and more; 4 where none is given. Of merging: divisors of the number of key heads; 4, 3 or 2, whichever is "
        "one first"
    )

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        return self._rows(config, before, after, "copy", "copy", "copy", INHERIT_NOISE)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        return self._rows(config, before, after, "fresh", "zero", "fresh", 0.0)

    def _rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, filters: Fill,
        noise: float,
    ) -> dict[str, TensorRows]:  # fmt: skip
        num_heads = self.num_mergeable_heads(config, before)
        rows = {
            "q_proj.weight": grown(num_heads, before, after, queries, noise),
            "k_proj.weight": grown(num_heads, before, after, keys, noise),
        }
        if config.use_short_conv:
            rows |= dict.fromkeys(("q_conv1d.weight", "k_conv1d.weight"), grown(num_heads, before, after, filters))
        return rows


class DeltaNetFamily(FLADeltaFamily, model="DeltaNet"):
    """DeltaNet, arXiv 2406.06484."""

    model_type = "delta_net"
    mixer_class = "fla.layers.delta_net.DeltaNet"
    merging_needs = "would need one rate of writing in the place of several heads' own"

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        mixer: Any = mixer_class(
            mode=config.attn_mode,
            hidden_size=config.hidden_size,
            **shares_of(config, geometry),
            num_heads=geometry.num_heads,
            use_gate=config.use_gate,
            use_beta=config.use_beta,
            use_short_conv=config.use_short_conv,
            allow_neg_eigval=config.allow_neg_eigval,
            conv_size=config.conv_size,
            qk_norm=config.qk_norm,
            qk_activation=config.qk_activation,
            norm_eps=config.norm_eps,
            layer_idx=layer_idx,
        )
        mixer.query_channels = _old_channels(self, config, geometry)
        return mixer

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        if config.qk_activation not in ("silu", "identity"):
            problem = f"the activation {config.qk_activation!r} of its keys is not 0 at 0, or has no slope there"
            raise UserError("init", "preserve", problem, 'use init = "reinit" or "inherit"')
        return super().preserving_rows(config, before, after, rank)


class GatedDeltaNetFields(FLAFields):
    """Fields of a Gated DeltaNet configuration."""

    tensor_sizes: ClassVar = (*FLAFields.tensor_sizes, "head_dim", "num_heads")

    head_dim: Size
    num_heads: Size
    num_v_heads: Size | None
    expand_v: Share
    conv_size: Size


class GatedDeltaNetFamily(FLADeltaFamily, model="GatedDeltaNet"):
    """Gated DeltaNet, arXiv 2412.06464."""

    model_type = "gated_deltanet"
    fields = GatedDeltaNetFields
    mixer_class = "fla.layers.gated_deltanet.GatedDeltaNet"
    kept_by_reinit = ("dt_bias", "A_log")  # time scales, as Mamba2's

    def check(self, config: Any) -> None:
        H, G = config.num_v_heads or config.num_heads, config.num_heads
        if H % G:
            raise UserError("num_heads", G, f"does not divide num_v_heads = {H}", "use a divisor")

    def geometry(self, config: Any) -> StateGeometry:
        K = config.head_dim
        return StateGeometry(config.num_v_heads or config.num_heads, K, round(K * config.expand_v))

    def num_mergeable_heads(self, config: Any, before: StateGeometry) -> int:
        return config.num_heads * before.num_heads // (config.num_v_heads or config.num_heads)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        mixer: Any = mixer_class(
            hidden_size=config.hidden_size,
            expand_v=math.nextafter(geometry.value_dim / geometry.key_dim, math.inf),  # FLA rounds down
            head_dim=geometry.key_dim,
            num_heads=self.num_mergeable_heads(config, geometry),
            num_v_heads=geometry.num_heads,
            mode=config.attn_mode,
            use_gate=config.use_gate,
            use_short_conv=config.use_short_conv,
            allow_neg_eigval=config.allow_neg_eigval,
            conv_size=config.conv_size,
            layer_idx=layer_idx,
            norm_eps=config.norm_eps,
            output_gate_activation=config.output_gate_activation,
        )
        mixer.query_channels = _old_channels(self, config, geometry)
        return mixer


def _old_channels(family: Family, config: Any, geometry: StateGeometry) -> int:
    """Key channels of a head that no growth added; all of a merged head's are as old as one another."""
    original = family.geometry(config)
    return original.key_dim * geometry.value_dim // original.value_dim
