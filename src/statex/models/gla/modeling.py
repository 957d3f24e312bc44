"""GLA as a Hugging Face model (arXiv 2312.06635), on statex's own recurrences, on any device.

Shape letters: B batch, T time, H heads, K key dim of a head, V value dim of a head, D width of the residual stream.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from statex.models.caches import cache_field, cache_of, one_cache
from statex.models.gla.configuration import GLAConfig
from statex.models.replay import ReplayExpansion
from statex.ops import gated_rms_norm, gla, gla_step, short_convolution
from statex.ops.segments import compute_dtype, cu_seqlens_of

CACHE_NAME = cache_field(CausalLMOutputWithPast)  # what `generate` calls it, too
GATE_LOGIT_NORMALIZER = 16  # fixed in FLA's model, not part of its configuration
GATE_LOW_RANK_DIM = 16
FEATURE_MAPS: dict[str, Callable] = {  # by FLA's names, as FLA computes them
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "gelu": partial(F.gelu, approximate="tanh"),
}


class ShortConvolution(nn.Module):
    """The weight of a causal depthwise convolution, stored as torch's Conv1d does: [channels, 1, taps].

    Calling it returns the weight as [channels, taps]: hooks that bring a module's weights to its device see the call.
    """

    def __init__(self, num_channels: int, num_taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, num_taps))

    def forward(self) -> torch.Tensor:
        return self.weight.squeeze(1)


class OutputRMSNorm(nn.RMSNorm):
    """RMSNorm in fp32 (fp64 for fp64 inputs), whatever the dtype of its weight, then times the SiLU of a gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        assert self.eps is not None  # the configuration has one
        return gated_rms_norm(x, self.weight, gate, eps=self.eps)


class GatedLinearAttention(nn.Module):
    """The token mixer: S_t = diag(a_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, with a_t = sigmoid(W2 W1 x_t + b)^(1/16).

    Args:
        config: the model's configuration.
        layer_idx: which layer this is.
        num_heads, num_kv_heads, key_dim: of this layer, where they differ from the configuration's; `key_dim` is one
            head's.
        rank: the key dimensions beyond the configuration's come from low-rank projections of this rank.
    """

    def __init__(
        self,
        config: GLAConfig,
        layer_idx: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        rank: int | None = None,
    ):
        super().__init__()
        assert config.num_kv_heads is not None  # the configuration fills it in
        self.layer_idx = layer_idx
        self.num_heads = num_heads or config.num_heads
        self.num_kv_heads = num_kv_heads or config.num_kv_heads
        base_key_dim = config.key_dim // self.num_heads
        self.key_dim = key_dim or base_key_dim
        self.value_dim = config.value_dim // self.num_heads
        self.scale = base_key_dim**-0.5  # a grown head keeps its scale, so that it computes the same function
        self.clamp_min = config.clamp_min
        self.feature_map = FEATURE_MAPS[config.feature_map] if config.feature_map is not None else None
        self.use_short_conv = config.use_short_conv
        self.use_output_gate = config.use_output_gate

        D, H, H_kv = config.hidden_size, self.num_heads, self.num_kv_heads
        projected_key_dim = base_key_dim if rank else self.key_dim
        self.q_proj = nn.Linear(D, H * projected_key_dim, bias=False)
        self.k_proj = nn.Linear(D, H_kv * projected_key_dim, bias=False)
        self.v_proj = nn.Linear(D, H_kv * self.value_dim, bias=False)
        self.rank = rank
        if rank:
            self.q_low_rank = _low_rank(D, rank, H * (self.key_dim - base_key_dim))
            self.k_low_rank = _low_rank(D, rank, H_kv * (self.key_dim - base_key_dim))
        if config.use_output_gate:
            self.g_proj = nn.Linear(D, config.value_dim, bias=False)
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(H * self.key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(H_kv * self.key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(H_kv * self.value_dim, config.conv_size)
        self.gk_proj = nn.Sequential(
            nn.Linear(D, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, H_kv * self.key_dim)
        )
        self.o_proj = nn.Linear(config.value_dim, D, bias=False)
        self.norm_name = "g_norm_swish_gate" if config.fuse_norm and config.use_output_gate else "g_norm"
        norm = OutputRMSNorm(self.value_dim, eps=config.norm_eps, elementwise_affine=bool(config.elementwise_affine))
        self.add_module(self.norm_name, norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix tokens: [B, T, D] to [B, T, D].

        `attention_mask` is [B, T], 0 at padding, which neither writes to the state nor lets it decay. `seq_idx`
        [B, T] with `cu_seqlens` start a fresh state at each document of a packed row.
        """
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        states = cache.layers[self.layer_idx] if cache is not None else None

        q, k, v = self._queries_keys_values(hidden_states, states, seq_idx)  # [B, T, H or H_kv, K or V]
        dtype = compute_dtype(hidden_states)
        log_decay = F.logsigmoid(self.gk_proj(hidden_states).to(dtype)) / GATE_LOGIT_NORMALIZER
        if self.clamp_min is not None:
            log_decay = log_decay.clamp_min(self.clamp_min)
        log_decay = log_decay.unflatten(-1, (self.num_kv_heads, self.key_dim))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        if attention_mask is not None:  # a convolution or feature map may have made something of padding's zeros
            mask = attention_mask[..., None, None]
            k, log_decay = k * mask.to(k.dtype), log_decay * mask.to(log_decay.dtype)
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k, v, log_decay = (x.repeat_interleave(groups, dim=2) for x in (k, v, log_decay))

        output = self._recurrence(q, k, v, log_decay, states, cu_seqlens)  # [B, T, H, V]
        gate = self.g_proj(hidden_states).view_as(output) if self.use_output_gate else None
        return self.o_proj(getattr(self, self.norm_name)(output, gate).flatten(2))

    def _queries_keys_values(self, hidden_states, states, seq_idx):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.rank:
            q = _join_heads(q, self.q_low_rank(hidden_states), self.num_heads)
            k = _join_heads(k, self.k_low_rank(hidden_states), self.num_kv_heads)
        if self.use_short_conv:
            sizes = [q.shape[-1], k.shape[-1], v.shape[-1]]
            weight = torch.cat([self.q_conv1d(), self.k_conv1d(), self.v_conv1d()])
            qkv = torch.cat([q, k, v], dim=-1)
            left_context = None
            if states is not None:
                left_context = _update_convolution_state(states, qkv, weight.shape[1])
            q, k, v = short_convolution(qkv, weight, left_context=left_context, seq_idx=seq_idx).split(sizes, dim=-1)
        return (
            q.unflatten(-1, (self.num_heads, self.key_dim)),
            k.unflatten(-1, (self.num_kv_heads, self.key_dim)),
            v.unflatten(-1, (self.num_kv_heads, self.value_dim)),
        )

    def _recurrence(self, q, k, v, log_decay, states, cu_seqlens):
        if cu_seqlens is not None:
            B, T = q.shape[:2]
            packed = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, log_decay))
            return gla(*packed, scale=self.scale, cu_seqlens=cu_seqlens)[0].view(B, T, *v.shape[2:])
        if states is None:
            return gla(q, k, v, log_decay, scale=self.scale)[0]
        state = states.recurrent_states[0] if states.is_recurrent_states_initialized[0] else None
        if state is not None and q.shape[1] == 1:
            q, k, v, log_decay = (x.squeeze(1) for x in (q, k, v, log_decay))
            return gla_step(q, k, v, log_decay, state, scale=self.scale).unsqueeze(1)
        output, state = gla(q, k, v, log_decay, scale=self.scale, initial_state=state, output_final_state=True)
        states.update_recurrent_state(state)
        states.has_previous_state[0] = True  # set by the convolution's update, where there is one
        return output


def _low_rank(num_inputs: int, rank: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, rank, bias=False), nn.Linear(rank, num_outputs, bias=False))


def _join_heads(base: torch.Tensor, new: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Put each head's new channels behind its old ones: [..., H * K0] and [..., H * K1] to [..., H * (K0 + K1)]."""
    heads = [x.unflatten(-1, (num_heads, -1)) for x in (base, new)]
    return torch.cat(heads, dim=-1).flatten(-2)


def _update_convolution_state(states: Any, x: torch.Tensor, num_taps: int) -> torch.Tensor | None:
    """Keep the last `num_taps` inputs of x [B, T, channels]; return those kept before, None at the beginning.

    Transformers' caches hold them as [B, channels, taps], with zeros before the first.
    """
    if states.has_previous_state[0]:
        tail = x[:, -num_taps:].mT
        return states.update_conv_state(tail)[..., : -tail.shape[-1]].mT
    states.update_conv_state(F.pad(x, (0, 0, max(0, num_taps - x.shape[1]), 0))[:, -num_taps:].mT)
    return None


class GLAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GLAConfig):
        super().__init__()
        assert config.intermediate_size is not None  # the configuration fills it in
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GLABlock(GradientCheckpointingLayer):
    """Norm, token mixer, norm, MLP, each half with its residual."""

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GatedLinearAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GLAMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class GLAPreTrainedModel(PreTrainedModel):
    config_class = GLAConfig
    config: GLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLABlock"]  # noqa: RUF012 (transformers' own form)
    _is_stateful = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            # torch's own initialisation of a Conv1d: uniform within 1 / sqrt(taps)
            nn.init.uniform_(module.weight, -(module.weight.shape[-1] ** -0.5), module.weight.shape[-1] ** -0.5)


class GLAModel(ReplayExpansion, GLAPreTrainedModel):
    """Embeddings, blocks and the last norm. A plan in `config.expansion` is replayed when the model is built."""

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([GLABlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.replay_expansion()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Args:
        input_ids: [B, T], or `inputs_embeds` [B, T, D].
        attention_mask: [B, any >= T], 0 at padding; its last T columns are used.
        cache: the states of the tokens before, updated in place; `past_key_values` is its name before transformers
            5.24.
        seq_idx: [B, T], which document of a packed row each token belongs to; the state starts anew at each.
            It excludes a cache and padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        cache = one_cache(cache, past_key_values)
        if seq_idx is not None:
            if cache is not None:
                raise ValueError("seq_idx: packed documents cannot continue from a cache; leave one out")
            use_cache = False
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache = False  # the backward pass would write to it again
        if not use_cache:
            cache = None
        elif cache is None:
            cache = DynamicCache(config=self.config)

        T = hidden_states.shape[1]
        mask = attention_mask[:, -T:] if attention_mask is not None and T > 1 else None
        cu_seqlens = cu_seqlens_of(seq_idx) if seq_idx is not None else None
        all_hidden_states = [hidden_states] if output_hidden_states else None
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                cache=cache,
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens,
            )
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        if all_hidden_states is not None:
            all_hidden_states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if all_hidden_states is not None else None,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )


class StaticStates(StaticCache):
    """The cache for which generate compiles. The states of every cache stay where they are; its type decides."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0 as long as nothing was read; after that states do not know it, and transformers' own error says so."""
        return super().get_seq_length(layer_idx) if self.has_previous_state() else 0


class GLAForCausalLM(ReplayExpansion, GLAPreTrainedModel, GenerationMixin):
    """GLA with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        self.model = GLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embeddings = value

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """The first forward makes the cache; with `cache_implementation="static"` one for which generate compiles."""
        if model_kwargs.get(CACHE_NAME) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        elif generation_config.cache_implementation == "static":
            model_kwargs[CACHE_NAME] = StaticStates(self.config, max_cache_len=0)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *,
        inputs_embeds: torch.Tensor | None = None,  # named, or generate takes it that the model has no use for it
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict:
        """As transformers', without the mask once the prompt is read: it grows, which compiled code must not see.

        Raises:
            ValueError: a cache that has read tokens beside ids that are not marked as what follows them, by a mask of
                all tokens. transformers would cut off those read, but a state does not say how many they are.
        """
        cache = kwargs.get(CACHE_NAME)
        if is_first_iteration and cache is not None and cache.has_previous_state():
            if attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]:
                raise ValueError(
                    f"{CACHE_NAME}: it has read tokens, and these ids may contain them; give only the ids that follow, "
                    "and an attention_mask of all tokens"
                )
        elif kwargs.get("use_cache") and not is_first_iteration:
            attention_mask = None
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """The padding mask as it is, [B, any]: a recurrence has no use for a causal one."""
        return attention_mask

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As GLAModel.forward; `labels` [B, T] are shifted inside, -100 is ignored; logits are [B, T, vocabulary]."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: cache_of(outputs)}
        )
