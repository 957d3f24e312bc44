"""GLA: heads are merged (reinit, inherit), or each head's key dimension grows (preserve).

Letters: H heads, K and V key and value dimension of a head, f factor.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, Family, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Share, Size
from statex.families.shared import ZERO_AT_ZERO

PRESERVABLE_FEATURE_MAPS = (None, *ZERO_AT_ZERO)
"""Zero query rows then add nothing at step 0 and still learn."""


class GLAFields(ConfigFields):
    """Fields of a GLA configuration."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "num_heads", "num_kv_heads", "conv_size", "intermediate_size")

    num_heads: Size
    num_kv_heads: Size | None
    expand_k: Share
    expand_v: Share
    conv_size: Size
    hidden_ratio: Size | None
    intermediate_size: Size | None
    norm_eps: PositiveFloat
    clamp_min: Annotated[float, Field(le=0)] | None


class GLAFamily(Family):
    """Gated linear attention, arXiv 2312.06635; merging: arXiv 2509.22630, section 3."""

    model_type = "statex_gla"
    fields = GLAFields
    mixer_path = "model.layers.{}.attn"
    norm_path = "model.layers.{}.attn_norm"
    keys_last = False
    config_class = "statex.models.gla.configuration.GLAConfig"
    model_class = "statex.models.gla.modeling.GLAModel"
    causal_lm_class = "statex.models.gla.modeling.GLAForCausalLM"
    holds_plan = True
    methods: ClassVar = {"reinit": (MERGE,), "inherit": (MERGE,), "preserve": (GROW,)}
    merging_needs = "would need queries that read no other head's keys"
    grows = "heads are merged; with `preserve`, the key dimension"
    factors = "divisors of the number of heads, all heads where none is given; with `preserve`, 2 and more"
    measured = (
        "recall, text and cost ([CPU study](results/cpu-study/report.md)), "
        "[generation](results/generation.md) and [kernels](results/kernels.md) on an H200"
    )
    blocks_compile = True
    compiled_by_default = True

    def recurrent_layers(self, config: Any) -> list[int]:
        return list(range(config.num_hidden_layers))

    def geometry(self, config: Any) -> StateGeometry:
        H = config.num_heads
        return StateGeometry(H, config.key_dim // H, config.value_dim // H)

    def default_factor(self, config: Any, before: StateGeometry, method: str = MERGE) -> int:
        return num_kv_heads(config, before)

    def merged_geometry(self, config: Any, before: StateGeometry, factor: int) -> StateGeometry:
        heads = "num_heads" if config.num_kv_heads == config.num_heads else "num_kv_heads"
        H_kv = num_kv_heads(config, before)
        if H_kv == 1:
            raise UserError(heads, 1, "leaves no heads to merge", 'use init = "preserve" with a factor')
        if factor < 2 or H_kv % factor:
            divisors = [n for n in range(2, H_kv + 1) if H_kv % n == 0]
            problem = f"does not divide {heads} = {H_kv}"
            raise UserError("factor", factor, problem, f"use one of {divisors}")
        return StateGeometry(before.num_heads // factor, factor * before.key_dim, factor * before.value_dim)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        return mixer_class(
            config,
            layer_idx,
            num_heads=geometry.num_heads,
            num_kv_heads=num_kv_heads(config, geometry),
            key_dim=geometry.key_dim,
            rank=rank,
        )

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        H, K, V = before.num_heads, before.key_dim, before.value_dim
        norm = Segment("output norm", 1, V, after.value_dim, fill="copy")
        rows = {"g_norm_swish_gate.weight": TensorRows((norm,)), "g_norm.weight": TensorRows((norm,))}
        order = merged_query_order(H, num_kv_heads(config, before), H // after.num_heads)
        if order != tuple(range(H)):
            queries = TensorRows((Segment("q", H, K, K, order=order),))
            values = Segment("output", H, V, V, order=order)
            rows |= {
                "q_proj.weight": queries,
                "q_conv1d.weight": queries,
                "g_proj.weight": TensorRows((values,)),
                "o_proj.weight": TensorRows((values,), dim=1),
            }
        return rows

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        if config.feature_map not in PRESERVABLE_FEATURE_MAPS:
            raise UserError(
                "init",
                "preserve",
                f"the feature map {config.feature_map!r} is not 0 at 0, or has no slope there",
                'use init = "reinit" or "inherit"',
            )
        H, H_kv, K = before.num_heads, num_kv_heads(config, before), before.key_dim
        if rank is not None and config.key_dim // H != K:
            problem = f"cannot grow keys that have grown before, from {config.key_dim // H} to {K} dimensions a head"
            raise UserError("rank", rank, problem, "leave rank out")
        new = after.key_dim - K
        decay = TensorRows((Segment("decay", H_kv, K, after.key_dim),))
        rows = {
            "gk_proj.1.weight": decay,
            "gk_proj.1.bias": decay,
            "q_conv1d.weight": TensorRows((Segment("q", H, K, after.key_dim),)),
            "k_conv1d.weight": TensorRows((Segment("k", H_kv, K, after.key_dim),)),
        }
        if rank is None:
            return rows | {
                "q_proj.weight": TensorRows((Segment("q", H, K, after.key_dim, fill="zero"),)),
                "k_proj.weight": TensorRows((Segment("k", H_kv, K, after.key_dim),)),
            }
        return rows | {
            "q_low_rank.0.weight": TensorRows((Segment("q", 1, 0, rank),)),
            "q_low_rank.1.weight": TensorRows((Segment("q", H, 0, new, fill="zero"),)),
            "k_low_rank.0.weight": TensorRows((Segment("k", 1, 0, rank),)),
            "k_low_rank.1.weight": TensorRows((Segment("k", H_kv, 0, new),)),
        }


def num_kv_heads(config: Any, geometry: StateGeometry) -> int:
    """Heads of keys and values of a layer: of a merged one as many fewer as it has fewer queries."""
    return config.num_kv_heads * geometry.num_heads // config.num_heads


def merged_query_order(num_heads: int, num_kv_heads: int, factor: int) -> tuple[int, ...]:
    """Which old query head comes where, so that in each merged head every query still faces its own key head.

    Query head h reads key head h // g with g = num_heads / num_kv_heads. Merging `factor` key heads into one gives g
    merged query heads for it, the r-th made of the r-th query head of each of those key heads.
    """
    g = num_heads // num_kv_heads
    return tuple(
        kv_head * g + r
        for first in range(0, num_kv_heads, factor)
        for r in range(g)
        for kv_head in range(first, first + factor)
    )
