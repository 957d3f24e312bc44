"""RetNet in flash-linear-attention's own classes.

Letters: B batch, T time, H heads of queries, K key dimension of a head, f factor.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, Fill, StateGeometry, TensorRows
from statex.families.fla import FLAFamily, grown, num_kv_heads, shares_of
from statex.families.gla import PRESERVABLE_FEATURE_MAPS
from statex.families.shared import INHERIT_NOISE, refuse_rank


class RetNetFamily(FLAFamily, model="RetNet"):
    """RetNet, arXiv 2307.08621: each head decays at a rate that follows from its place among the layer's heads.

    FLA's rotation of queries and keys takes no head above 256 channels, which is the size that its models have. A head
    that has grown is rotated in parts of the old size, all alike, so that the old channels turn as they did.
    """

    model_type = "retnet"
    methods: ClassVar = {"reinit": (GROW, MERGE), "inherit": (GROW,), "preserve": (GROW,)}
    merging_needs = "would need one decay rate in the place of several heads' own"
    grows = 'key dimension, or with `method = "merge"` heads are merged'
    factors = (
        "2 and more; 4 where none is given. Of merging: divisors of the number of key heads; 4, 3 or 2, whichever is "
        "one first"
    )

    def num_mergeable_heads(self, config: Any, before: StateGeometry) -> int:
        return num_kv_heads(config, before)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        H, K, old = geometry.num_heads, geometry.key_dim, self.geometry(config).key_dim
        shares = shares_of(config, StateGeometry(H, old, geometry.value_dim))
        mixer: Any = mixer_class(
            mode=config.attn_mode,
            hidden_size=config.hidden_size,
            **shares,
            num_heads=H,
            num_kv_heads=num_kv_heads(config, geometry),
            feature_map=config.feature_map,
            use_output_gate=config.use_output_gate,
            gate_fn=config.hidden_act,
            elementwise_affine=config.elementwise_affine,
            norm_eps=self.norm_eps(config, geometry),
            fuse_norm=config.fuse_norm,
            layer_idx=layer_idx,
        )
        if old != K:
            mixer.key_dim, mixer.head_k_dim = H * K, K
            mixer.key_dim_per_group = mixer.num_kv_heads * K
            mixer.q_proj = nn.Linear(config.hidden_size, mixer.key_dim, bias=False)
            mixer.k_proj = nn.Linear(config.hidden_size, mixer.key_dim_per_group, bias=False)
            mixer.rotary = RotaryInParts(mixer.rotary)
        return mixer

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # What is read grows by f in all channels of a head alike, which its norm takes out
        return _queries_and_keys(config, before, after, "copy", "copy", INHERIT_NOISE)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        if config.feature_map not in PRESERVABLE_FEATURE_MAPS:
            problem = f"the feature map {config.feature_map!r} is not 0 at 0, or has no slope there"
            raise UserError("init", "preserve", problem, 'use init = "reinit" or "inherit"')
        # New keys write, with the decay of their head; new queries are 0 and read nothing yet
        return _queries_and_keys(config, before, after, "zero", "fresh", 0.0)


def _queries_and_keys(
    config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float
) -> dict[str, TensorRows]:
    return {
        "q_proj.weight": grown(before.num_heads, before, after, queries, noise),
        "k_proj.weight": grown(num_kv_heads(config, before), before, after, keys, noise),
    }


class RotaryInParts(nn.Module):
    """FLA's rotation of heads that are several times as large as it knows: part by part, each as an un-grown head."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, q: Tensor, k: Tensor, **positions: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, T, heads, K]."""
        size: int = self.rotary.dim  # type: ignore[assignment]
        parts = (x.unflatten(-1, (-1, size)).flatten(2, 3) for x in (q, k))
        rotated_q, rotated_k = self.rotary(*parts, **positions)
        return rotated_q.reshape(q.shape), rotated_k.reshape(k.shape)
