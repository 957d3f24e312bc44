"""Two-layer random models on the CPU."""

import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM

VOCABULARY = 320


def make_gla(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    return GLAForCausalLM(GLAConfig(vocab_size=VOCABULARY, use_short_conv=True, **config | changes)).eval()


def make_mamba2(seed=0, **changes):
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, expand=2, head_dim=16, num_heads=4, state_size=8,
        n_groups=1, chunk_size=16, **changes,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def make_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=160,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_falcon_h1(seed=0, **changes):
    """Attention and Mamba2 side by side in every layer."""
    torch.manual_seed(seed)
    config = FalconH1Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8,
        mamba_chunk_size=16, max_position_embeddings=160, **changes,
    )  # fmt: skip
    return FalconH1ForCausalLM(config).eval()


MODELS = {"gla": make_gla, "mamba2": make_mamba2, "llama": make_llama, "falcon_h1": make_falcon_h1}
