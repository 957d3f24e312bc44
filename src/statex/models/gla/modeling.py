"""GLA as a Hugging Face model (arXiv 2312.06635), on statex's own recurrences, on any device."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from statex.models.gla.configuration import GLAConfig
from statex.models.gla.mixer import GatedLinearAttention, ShortConvolution
from statex.models.recurrent import RecurrentForCausalLM, RecurrentModel


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


def _normed(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """In the dtype of the norm's weight: a training may have the residual stream in a narrower one."""
    return norm(x.to(norm.weight.dtype))


class GLABlock(GradientCheckpointingLayer):
    """Norm, token mixer, norm, MLP, each half with its residual."""

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GatedLinearAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GLAMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(_normed(self.attn_norm, hidden_states), **kwargs)
        return hidden_states + self.mlp(_normed(self.mlp_norm, hidden_states))


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


class GLAModel(RecurrentModel, GLAPreTrainedModel):
    """Embeddings, blocks and the last norm. A plan in `config.expansion` is replayed when the model is built."""

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        # Without padding_idx, which FLA sets: where the pad is the eos, that token would be 0 and never trained
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GLABlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.replay_expansion()
        self.post_init()


class GLAForCausalLM(RecurrentForCausalLM, GLAPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """GLA with its language-model head."""

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        self.model = GLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
