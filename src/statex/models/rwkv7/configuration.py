"""Configuration of RWKV-7; its fields are those of flash-linear-attention's `RWKV7Config`."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.models.caches import CACHE_NAMES
from statex.models.shim import FoundThroughShim

LOW_RANKS = {  # of what the dimension defaults to: multiples of the square root of the width
    "decay_low_rank_dim": 2.5, "a_low_rank_dim": 2.5, "v_low_rank_dim": 1.7, "gate_low_rank_dim": 5.0,
}  # fmt: skip


@strict
class RWKV7Config(FoundThroughShim, PreTrainedConfig):
    """Configuration of an RWKV-7 model (arXiv 2503.14456).

    Args:
        hidden_size: width of the residual stream, and key dimension of all heads together.
        head_dim, num_heads: key dimension of a head, and heads; either follows from the other.
        value_dim: value dimension of all heads together, by default `hidden_size`; FLA writes a list with one for each
            layer, which must be alike, as the first layer's values are mixed into all others'.
        decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim: ranks of the projections for the decay,
            the rate of replacement, the share of the first layer's values, the output gate; None takes FLA's default.
        hidden_ratio, intermediate_size: the MLP is `intermediate_size` wide, by default `hidden_ratio * hidden_size`
            rounded up to a multiple of 32.
        hidden_act: of the MLP: the squared ReLU ("sqrelu" in FLA).
        norm_first: whether the embeddings are normed once, before the first block.
        norm_bias: whether the layer norms have biases.
        norm_eps: of the layer norms; the group norm behind the recurrence has `head_dim` times as much.
        expansion: the plan of a state expansion (statex.expansion.plan), replayed when the model is built.
        attn_mode, initializer_range, fuse_norm, fuse_cross_entropy, fuse_linear_cross_entropy, use_l2warp, attn: of
            FLA's format, without effect here; `attn` (layers of softmax attention) must be None.
    """

    model_type = "statex_rwkv7"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    head_dim: int | None = None
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    hidden_ratio: float | int | None = 4
    intermediate_size: int | None = None
    hidden_act: Literal["relu2"] = "relu2"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_norm: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    attn_mode: str = "chunk"
    attn: Any = None
    expansion: list | dict | None = None

    def __post_init__(self, **kwargs):
        D = self.hidden_size
        if self.head_dim is None:
            self.head_dim = D // self.num_heads if self.num_heads else 64
        if self.num_heads is None and self.head_dim > 0:
            self.num_heads = D // self.head_dim
        if self.value_dim is None:
            self.value_dim = D
        for name, multiple in LOW_RANKS.items():
            if getattr(self, name) is None:
                factor = 1 if name == "gate_low_rank_dim" else self.head_dim / 64
                setattr(self, name, max(32, round(multiple * D**0.5 * factor / 32) * 32))
        if self.intermediate_size is None:
            self.intermediate_size = 32 * ((int((self.hidden_ratio or 4) * D) + 31) // 32)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that the architecture cannot have; called by transformers whenever a configuration is made."""
        for name in ("head_dim", "num_heads", *LOW_RANKS):
            if (getattr(self, name) or 0) < 1:
                raise UserError(name, getattr(self, name), "is not a size", "use 1 or more")
        assert self.num_heads is not None
        assert self.head_dim is not None
        if self.num_heads * self.head_dim != self.hidden_size:
            problem = f"times num_heads = {self.num_heads} is not hidden_size = {self.hidden_size}"
            raise UserError("head_dim", self.head_dim, problem, "change one of them")
        sizes = self.value_dim if isinstance(self.value_dim, list) else [self.value_dim] * self.num_hidden_layers
        if len(sizes) != self.num_hidden_layers or len(set(sizes)) != 1:
            problem = f"is not one size for all of num_hidden_layers = {self.num_hidden_layers} layers"
            raise UserError("value_dim", self.value_dim, problem, "the first layer's values are mixed into all others'")
        if (size := sizes[0] or 0) < 1 or size % self.num_heads:
            problem = f"is not divisible by num_heads = {self.num_heads}"
            raise UserError("value_dim", self.value_dim, problem, "change one of them")
        if self.attn is not None:
            problem = "layers of softmax attention are not supported"
            raise UserError("attn", self.attn, problem, "use a purely recurrent RWKV-7 checkpoint")

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer: transformers' caches read it."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def num_values(self) -> int:
        """Value dimension of all heads together, of any layer."""
        sizes = self.value_dim if isinstance(self.value_dim, list) else [self.value_dim]
        assert sizes[0] is not None  # __post_init__ fills it in
        return sizes[0]
