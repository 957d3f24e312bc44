"""xLSTM as a Hugging Face model (arXiv 2503.13427), on statex's ops, on any device.

transformers' own takes no mask of padding, keeps no documents apart, and its cache has one size for all layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from statex.models.recurrent import RecurrentForCausalLM, RecurrentModel
from statex.models.xlstm.configuration import StatexXLSTMConfig
from statex.models.xlstm.mixer import MLSTM, FeedForward


class XLSTMBlock(GradientCheckpointingLayer):
    """Norm, token mixer, norm, channel mixer, each half with its residual."""

    def __init__(self, config: StatexXLSTMConfig, layer_idx: int):
        super().__init__()
        self.norm_mlstm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlstm_layer = MLSTM(config, layer_idx)
        self.norm_ffn = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.mlstm_layer(self.norm_mlstm(hidden_states), **kwargs)
        return hidden_states + self.ffn(self.norm_ffn(hidden_states))


class XLSTMPreTrainedModel(PreTrainedModel):
    config_class = StatexXLSTMConfig
    config: StatexXLSTMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["XLSTMBlock"]  # noqa: RUF012 (transformers' own form)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """As transformers' means to: gates closed at first, projections by the width, outputs also by the depth."""
        super()._init_weights(module)
        D, num_layers = self.config.hidden_size, self.config.num_hidden_layers
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=(2 / (5 * D)) ** 0.5)
        elif isinstance(module, MLSTM):
            init.normal_(module.out_proj.weight, std=2 / num_layers / D**0.5)
            for gate in (module.igate_preact, module.fgate_preact):
                init.zeros_(gate.weight)
            init.constant_(module.igate_preact.bias, -10.0)
            init.copy_(module.fgate_preact.bias, torch.linspace(3.0, 6.0, module.num_heads))
        elif isinstance(module, FeedForward):
            init.normal_(module.proj_down.weight, std=2 / num_layers / module.proj_down.weight.shape[1] ** 0.5)


class StatexXLSTMModel(RecurrentModel, XLSTMPreTrainedModel):
    """Embeddings, blocks and the last norm. A plan in `config.expansion` is replayed when the model is built."""

    def __init__(self, config: StatexXLSTMConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([XLSTMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.out_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.replay_expansion()
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The blocks, which transformers' checkpoints have under another name."""
        return self.blocks

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        """The last norm, likewise."""
        return self.out_norm


class StatexXLSTMForCausalLM(RecurrentForCausalLM, XLSTMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """xLSTM with its language-model head, whose logits are capped."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: StatexXLSTMConfig):
        super().__init__(config)
        self.backbone = StatexXLSTMModel(config)
        self.lm_head = CappedHead(config)
        self.post_init()

    @property
    def model(self) -> StatexXLSTMModel:  # type: ignore[override]
        """The base model, which transformers' checkpoints have under another name."""
        return self.backbone


class CappedHead(nn.Linear):
    """A projection to logits, [..., D] to [..., vocabulary] in fp32, none of them beyond `output_logit_soft_cap`."""

    def __init__(self, config: StatexXLSTMConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.cap = config.output_logit_soft_cap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.cap * torch.tanh(logits / self.cap)
