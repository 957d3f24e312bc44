"""Configuration of GLA; its fields are those of flash-linear-attention's `GLAConfig`: either reads the other's."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.models.caches import CACHE_NAMES
from statex.models.shim import FoundThroughShim


@strict
class GLAConfig(FoundThroughShim, PreTrainedConfig):
    """Configuration of a gated linear attention model (arXiv 2312.06635).

    Args:
        hidden_size: width of the residual stream.
        expand_k, expand_v: total key and value dimension of all heads, as a share of `hidden_size`.
        num_heads, num_kv_heads: heads, and heads of keys and values (each serves num_heads / num_kv_heads queries).
        feature_map: activation of queries and keys, by FLA's name (its "gelu" is the tanh approximation), or None.
        use_short_conv, conv_size: a causal depthwise convolution of `conv_size` taps with SiLU on q, k and v.
        use_output_gate: multiply the normed output by `swish(W_g x)`.
        hidden_act: of the output gate and the MLP; "swish", as in FLA.
        clamp_min: lower bound of the logarithm of the decay, or None.
        elementwise_affine: whether the norm of the output has weights.
        hidden_ratio, intermediate_size: the MLP is `intermediate_size` wide, by default 2/3 of
            `hidden_ratio * hidden_size` rounded up to a multiple of 256.
        fuse_norm: only names the output norm's tensor (g_norm_swish_gate, or g_norm when False), as FLA does.
        expansion: the plan of a state expansion (statex.expansion.plan), replayed when the model is built.
        attn_mode, use_gk, use_gv, fuse_swiglu, fuse_cross_entropy, attn: of FLA's format, without effect here; `attn`
            (layers of softmax attention) must be None.
    """

    model_type = "statex_gla"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    expand_k: float | int = 0.5
    expand_v: float | int = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: Literal["relu", "sigmoid", "logsigmoid", "silu", "swish", "sqrelu", "gelu"] | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | int | None = None
    elementwise_affine: bool | None = True
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    hidden_act: Literal["swish"] = "swish"
    norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    attn_mode: str = "chunk"
    use_gk: bool = True
    use_gv: bool = False
    attn: Any = None
    expansion: list | dict | None = None

    def __post_init__(self, **kwargs):
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.intermediate_size is None:
            width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = 256 * ((width + 255) // 256)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that the architecture cannot have; called by transformers whenever a configuration is made."""
        assert self.num_kv_heads is not None
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "there must be heads", "use 1 or more")
        for name in ("expand_k", "expand_v"):
            size = self.hidden_size * getattr(self, name)
            if size != round(size) or round(size) % self.num_heads:
                problem = f"hidden_size * {name} = {size} is not divisible by num_heads = {self.num_heads}"
                raise UserError(name, getattr(self, name), problem, f"change {name} or num_heads")
        if self.num_heads % self.num_kv_heads:
            problem = f"does not divide num_heads = {self.num_heads}"
            raise UserError("num_kv_heads", self.num_kv_heads, problem, "use a divisor")
        if self.clamp_min is not None and not self.clamp_min <= 0:
            raise UserError("clamp_min", self.clamp_min, "is not a lower bound of a decay's logarithm", "use 0 or less")
        for name in ("attn", "attnres_block_size"):
            if getattr(self, name, None) is not None:
                problem = "layers of softmax attention and attention residuals are not supported"
                raise UserError(name, getattr(self, name), problem, "use a purely recurrent GLA checkpoint")

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer: transformers' caches read it."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def key_dim(self) -> int:
        """Key dimension of all heads together, before any expansion."""
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value dimension of all heads together."""
        return round(self.hidden_size * self.expand_v)
