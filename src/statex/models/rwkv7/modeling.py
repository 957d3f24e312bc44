"""RWKV-7 as a Hugging Face model (arXiv 2503.14456), on statex's own recurrence, on any device.

Shape letters: B batch, T time, H heads, K key dim of a head, V value dim of a head, D width of the residual stream.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from statex.models.recurrent import RecurrentForCausalLM, RecurrentModel
from statex.models.rwkv7.configuration import RWKV7Config
from statex.models.rwkv7.mixer import LowRank, RWKV7Attention, RWKV7FeedForward


class RWKV7Block(GradientCheckpointingLayer):
    """Norm, token mixer, norm, channel mixer, each half with its residual; the first block norms the embeddings."""

    def __init__(self, config: RWKV7Config, layer_idx: int):
        super().__init__()
        if config.norm_first and layer_idx == 0:
            self.pre_norm = _layer_norm(config)
        self.attn_norm = _layer_norm(config)
        self.attn = RWKV7Attention(config, layer_idx)
        self.ffn_norm = _layer_norm(config)
        self.ffn = RWKV7FeedForward(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hasattr(self, "pre_norm"):
            hidden_states = self.pre_norm(hidden_states)
        given = {"attention_mask": attention_mask} | kwargs
        mixed, first_values = self.attn(self.attn_norm(hidden_states), first_values, cu_seqlens=cu_seqlens, **given)
        hidden_states = hidden_states + mixed
        return hidden_states + self.ffn(self.ffn_norm(hidden_states), **given), first_values


def _layer_norm(config: RWKV7Config) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class RWKV7PreTrainedModel(PreTrainedModel):
    config_class = RWKV7Config
    config: RWKV7Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RWKV7Block"]  # noqa: RUF012 (transformers' own form)
    _is_stateful = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As RWKV-7 is trained (github.com/BlinkDL/RWKV-LM, RWKV-v7), but for `o_proj`, which is FLA's: at 0, as there,
        nothing else of a mixer would learn at first."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif isinstance(module, LowRank):
            init.zeros_(module.lora[0].weight)
            _orthogonal(module.lora[2].weight, 0.1)
        elif isinstance(module, RWKV7Attention):
            _init_token_mixer(module, self.config.num_hidden_layers)
        elif isinstance(module, RWKV7FeedForward):
            D, layers_left = self.config.hidden_size, 1 - module.layer_idx / self.config.num_hidden_layers
            init.copy_(module.x_k, 1 - (torch.arange(D) / D) ** layers_left**4)
            _orthogonal(module.key.weight)
            init.zeros_(module.value.weight)
        elif module is getattr(self, "lm_head", None):
            _orthogonal(module.weight, 0.5)  # type: ignore[arg-type]


MIX_EXPONENTS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}


def _init_token_mixer(mixer: Any, num_layers: int) -> None:
    """Weights of a token mixer of any key dimension; some depend on the channel, some on its place in the head."""
    depth, layers_left = mixer.layer_idx / max(1, num_layers - 1), 1 - mixer.layer_idx / num_layers
    D = mixer.x_r.shape[-1]
    for name, exponent in MIX_EXPONENTS.items():
        init.copy_(getattr(mixer, name), 1 - (torch.arange(D) / D) ** (exponent * layers_left))
    rising = torch.arange(len(mixer.k_k)) / max(1, len(mixer.k_k) - 1)  # 0 to 1
    in_head = 2 * torch.arange(mixer.key_dim) / max(1, mixer.key_dim - 1) - 1  # -1 to 1
    in_head = (in_head * in_head.abs()).repeat(mixer.num_heads)
    init.copy_(mixer.k_k, 0.71 - 0.1 * (rising - 0.5))
    init.constant_(mixer.k_a, 1.02)
    init.constant_(mixer.r_k, -0.04)
    init.copy_(mixer.w_lora.lora[2].bias, -5.5 + 6 * rising ** (1 + depth**0.3) + 2.5 * in_head)
    init.copy_(mixer.a_lora.lora[2].bias, -0.19 + 0.3 * in_head + 0.4 * (rising - 0.5))
    if mixer.layer_idx > 0:
        bias = mixer.v_lora.lora[2].bias
        init.copy_(bias, 0.73 - 0.4 * (torch.arange(len(bias)) / max(1, len(bias) - 1) - 0.5))
    _orthogonal(mixer.r_proj.weight)
    _orthogonal(mixer.k_proj.weight, 0.1)
    _orthogonal(mixer.v_proj.weight)
    bound = (mixer.o_proj.weight.shape[1] * 2 * num_layers) ** -0.5
    init.uniform_(mixer.o_proj.weight, -bound, bound)
    init.constant_(mixer.g_norm.weight, ((mixer.layer_idx + 1) / num_layers) ** 0.7)


def _orthogonal(weight: torch.Tensor, gain: float = 1.0) -> None:
    """Rows of length `gain`, orthogonal as far as there is room for as many."""
    if getattr(weight, "_is_hf_initialized", False):  # loaded already; and orthogonalising takes long
        return
    gain *= math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
    fresh = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)  # half precision has no such algorithm
    init.copy_(weight, nn.init.orthogonal_(fresh, gain=gain))


class RWKV7Model(RecurrentModel, RWKV7PreTrainedModel):
    """Embeddings, blocks and the last norm. A plan in `config.expansion` is replayed when the model is built."""

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RWKV7Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = _layer_norm(config)
        self.gradient_checkpointing = False
        self.replay_expansion()
        self.post_init()


class RWKV7ForCausalLM(RecurrentForCausalLM, RWKV7PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """RWKV-7 with its language-model head."""

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
