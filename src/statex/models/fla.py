"""flash-linear-attention's models as families: their configurations and forwards, its delta rule on ours.

Shape letters: B batch, T time, G key heads, H value heads (a multiple of G), K key dim, V value dim.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.models.caches import one_cache
from statex.models.delta_rule import NO_PACKED_CACHE, for_each_value_head, normalised
from statex.models.keywords import by_name, check_keywords, check_no_attentions, with_arguments_of
from statex.ops import gated_delta, gated_delta_step
from statex.ops.segments import compute_dtype, cu_seqlens_of, one_seq_idx

L1_EPS = 1e-6
"""FLA's own least sum of a key's or query's absolute values."""


def with_plan(constructor: Callable) -> Callable:
    """The constructor of one of FLA's configuration classes, which are no dataclasses, with the field `expansion`."""

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, expansion: list | dict | None = None, **kwargs: Any) -> None:
        self.expansion = expansion
        constructor(self, *args, **kwargs)

    return construct


def as_fla_names_it(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward with the cache, which transformers calls otherwise since 5.24, by its earlier name."""
    if "cache" not in given:
        return given
    cache = one_cache(given.pop("cache"), given.get("past_key_values"))
    return given | {"past_key_values": cache}


def fla_model_forward(base: Any) -> Callable:
    """The forward of one of FLA's base models, which itself drops the keywords that nothing reads."""
    _, *names, _ = inspect.signature(base.forward).parameters

    @with_arguments_of(base.forward)
    def forward(
        self: Any,
        *args: Any,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As FLA's, but packed documents of several rows are kept apart, and unknown keywords are refused.

        Args:
            seq_idx: [B, T], which document of a packed row each token belongs to. Such a pass makes no cache.
            cu_seqlens: the same for a batch of 1, as FLA has it: [S + 1] int, the borders of the documents.
            output_attentions: of the Hugging Face interface; there are none.

        Raises:
            TypeError: an unknown keyword.
            ValueError: packed documents with padding, or with a cache.
        """
        kwargs = as_fla_names_it(kwargs)
        check_keywords(kwargs, names)
        given = by_name(names, args, kwargs)
        check_no_attentions(given.pop("output_attentions", None) or output_attentions)
        which = next((name for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if which is None or (seq_idx := one_seq_idx(seq_idx, cu_seqlens, given[which])) is None:
            return base.forward(self, **given)
        tokens, mask = given[which], given.pop("attention_mask", None)
        if mask is not None and not mask.all():
            raise ValueError("seq_idx: packed documents cannot be padded; leave attention_mask out")
        if given.get("use_cache") or given.get("past_key_values") is not None:
            raise ValueError(NO_PACKED_CACHE)
        asked = given.get("return_dict")
        given |= {"use_cache": False, which: tokens.flatten(0, 1)[None], "return_dict": True}
        output = base.forward(self, **given, cu_seqlens=cu_seqlens_of(seq_idx).to(tokens.device))
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = _in_rows(output[name], tokens)
        return output if (self.config.return_dict if asked is None else asked) else output.to_tuple()

    return forward


def _in_rows(states: Any, tokens: Tensor) -> Any:
    """Hidden states [1, B * T, D], or a tuple of such, as [B, T, D]."""
    if isinstance(states, tuple):
        return tuple(_in_rows(one, tokens) for one in states)
    return states.view(*tokens.shape[:2], -1)


def delta_rule_mixer(forward: Callable) -> Callable:
    """What takes the place of `forward` in FLA's DeltaNet and GatedDeltaNet: the same on statex's recurrence."""

    @functools.wraps(forward)
    def on_statex_ops(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        from fla.layers.utils import get_layer_cache, repad_hidden_states, unpad_hidden_states, update_layer_cache

        B, T, _ = hidden_states.shape
        last = get_layer_cache(self, past_key_values) or {}
        x, indices, borders = unpad_hidden_states(hidden_states, kwargs.get("cu_seqlens"), attention_mask, T)
        (q, k, v), inputs = _queries_keys_values(self, x, last.get("conv_state"), use_cache, borders)
        log_decay, beta = _rates(self, x)
        state = last.get("recurrent_state")
        if T == 1 and state is not None and borders is None:
            q, k, v, log_decay, beta = (each[:, 0] for each in (q, k, v, log_decay, beta))
            o = gated_delta_step(q, k, v, log_decay, beta, state, scale=_channels(self) ** -0.5)[:, None]
        else:
            o, state = gated_delta(
                q, k, v, log_decay, beta, scale=_channels(self) ** -0.5, initial_state=state,
                output_final_state=bool(use_cache), cu_seqlens=borders,
            )  # fmt: skip
        update_layer_cache(self, past_key_values, recurrent_state=state, conv_state=inputs, offset=T)
        o = o.to(v.dtype)
        o = self.o_norm(o, self.g_proj(x).view_as(o)) if self.use_gate else self.o_norm(o)
        return repad_hidden_states(self.o_proj(o.flatten(2)), indices, B, T), None, past_key_values

    return on_statex_ops


def _channels(mixer: Any) -> int:
    """The number of key channels before an expansion, which determine a query's length and scale."""
    return getattr(mixer, "query_channels", mixer.head_k_dim)


def _queries_keys_values(
    mixer: Any, x: Tensor, earlier: tuple | None, use_cache: bool | None, borders: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple | None]:
    """q and k [B, T, H, K], normalised, v [B, T, H, V], and the inputs that the convolutions keep."""
    activation = getattr(mixer, "qk_activation", "silu")
    projected = [getattr(mixer, f"{name}_proj")(x) for name in "qkv"]
    kept = None
    if mixer.use_short_conv:
        results = [
            getattr(mixer, f"{name}_conv1d")(
                x=each, cache=cache, output_final_state=bool(use_cache), cu_seqlens=borders
            )
            for name, each, cache in zip("qkv", projected, earlier or (None, None, None), strict=True)
        ]  # with SiLU, but for queries and keys with another activation
        (q, k, v), kept = zip(*results, strict=True)
    else:
        q, k = (F.silu(each) if activation == "silu" else each for each in projected[:2])
        v = F.silu(projected[2])
    q, k = (each.unflatten(-1, (-1, mixer.head_k_dim)) for each in (q, k))
    v = v.unflatten(-1, (-1, mixer.head_v_dim))
    if activation == "relu":
        q, k = q.relu(), k.relu()
    elif activation == "elu":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    norm = _sum_normalised if getattr(mixer, "qk_norm", "l2") == "sum" else normalised
    q, k = norm(q, _channels(mixer)), norm(k, mixer.head_k_dim)
    return (for_each_value_head(q, v), for_each_value_head(k, v), v), kept


def _sum_normalised(x: Tensor, num_channels: int) -> Tensor:
    """Vectors [..., K] divided by the sum of their first channels' absolute values."""
    x = x.to(compute_dtype(x))
    return x / x[..., :num_channels].abs().sum(-1, keepdim=True).clamp_min(L1_EPS)


def _rates(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the decay, and rates of writing, both [B, T, H]; DeltaNet has no decay."""
    if getattr(mixer, "use_beta", True):
        beta = mixer.b_proj(x).to(compute_dtype(x)).sigmoid()
    else:
        beta = torch.ones(*x.shape[:2], mixer.num_heads, dtype=compute_dtype(x), device=x.device)
    if mixer.allow_neg_eigval:
        beta = 2 * beta
    if not hasattr(mixer, "A_log"):
        return torch.zeros_like(beta), beta
    step = F.softplus(mixer.a_proj(x).to(beta) + mixer.dt_bias.to(beta))
    return -mixer.A_log.to(beta).exp() * step, beta
