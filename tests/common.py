"""Tiny models of every family, and the expansions that the behaviour matrix runs over.

The weights are those of no initialisation (`settled`): no bias is 0, no norm 1, so that a misplaced row shows.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import statex
from statex.families import family_of
from statex.models.caches import cache_of
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.models.rwkv7.configuration import RWKV7Config
from statex.models.rwkv7.modeling import RWKV7ForCausalLM
from statex.models.xlstm.configuration import StatexXLSTMConfig
from statex.models.xlstm.modeling import StatexXLSTMForCausalLM

VOCABULARY = 48
EXPANDED = 0
UNTOUCHED = 1

GLA = {
    "1-head": {"num_heads": 1},
    "2-heads": {"num_heads": 2},
    "4-heads": {"num_heads": 4},
    "8-heads": {"num_heads": 8},
    "kv-heads": {"num_heads": 8, "num_kv_heads": 4},
    "conv": {"use_short_conv": True},
    "conv-kv-heads": {"use_short_conv": True, "conv_size": 3, "num_heads": 4, "num_kv_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "clamped": {"clamp_min": -0.05},
    "feature-map": {"feature_map": "silu"},
    "g-norm": {"fuse_norm": False},
    "no-gate": {"use_output_gate": False},
    "no-affine": {"elementwise_affine": False},
    "wide-keys": {"expand_k": 1.0, "expand_v": 2.0},
    "everything": {
        "num_heads": 8, "num_kv_heads": 2, "use_short_conv": True, "tie_word_embeddings": True, "clamp_min": -0.05,
        "feature_map": "silu", "fuse_norm": False,
    },
}  # fmt: skip

MAMBA2 = {
    "1-group": {"n_groups": 1},
    "2-groups": {"n_groups": 2},
    "bias": {"n_groups": 2, "use_bias": True},
    "no-conv-bias": {"n_groups": 2, "use_conv_bias": False},
    "tied": {"n_groups": 1, "tie_word_embeddings": True},
    "rescaled": {"n_groups": 2, "rescale_prenorm_residual": True},
}

BAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16,
    "mamba_n_groups": 2, "num_key_value_heads": 1,
}  # fmt: skip
RWKV7 = {
    "plain": {},
    "1-head": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True, "value_dim": [64, 64]},
    "no-pre-norm": {"norm_first": False, "norm_bias": False, "value_dim": 16},
}
XLSTM = {"plain": {}, "tied": {"tie_word_embeddings": True, "v_dim_factor": 2.0}}
LINEAR, FULL = "linear_attention", "full_attention"
MULTIPLIERS = {
    "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3], "ssm_in_multiplier": 0.8, "attention_in_multiplier": 1.2,
    "lm_head_multiplier": 0.9,
}  # fmt: skip
HYBRIDS = {  # by model type: what all its configurations have, and each
    "bamba": (
        BAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
        {"2-groups": {}, "bias": {"mamba_proj_bias": True, "mamba_n_groups": 1},
         "no-conv-bias": {"mamba_conv_bias": False}},
    ),
    "granitemoehybrid": (
        BAMBA
        | {"num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR], "shared_intermediate_size": 32,
           "logits_scaling": 2.0, "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3,
           "num_experts_per_tok": 1},
        {"experts": {"num_local_experts": 2, "position_embedding_type": "rope"}, "dense": {"num_local_experts": 0}},
    ),
    "zamba2": (
        {"n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 16, "num_hidden_layers": 4,
         "num_attention_heads": 2},
        {"shared": {"layers_block_type": ["hybrid", LINEAR, LINEAR, "hybrid"]},
         "bias": {"layers_block_type": [LINEAR, "hybrid", "hybrid", LINEAR], "add_bias_linear": True,
                  "use_mem_rope": True, "num_mem_blocks": 2}},
    ),
    "nemotron_h": (
        {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16,
         "num_key_value_heads": 1, "head_dim": 16, "n_routed_experts": 3, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "time_step_min": 0.001},
        {"experts": {"layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR]},
         "bias": {"layers_block_type": [LINEAR, "mlp", FULL], "use_bias": True, "rescale_prenorm_residual": False}},
    ),
    "falcon_h1": (
        BAMBA | MULTIPLIERS | {"num_hidden_layers": 2, "mamba_d_ssm": 64},
        {"norm": {"mamba_rms_norm": True}, "norm-last": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
         "bias": {"mamba_proj_bias": True, "projectors_bias": True}},
    ),
    "mamba": (
        {"state_size": 8, "num_hidden_layers": 2},
        {"tied": {}, "untied": {"tie_word_embeddings": False, "use_bias": True}},
    ),
    "falcon_mamba": ({"state_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}, {"untied": {}}),
    "jamba": (
        {"mamba_d_state": 8, "num_hidden_layers": 3, "num_key_value_heads": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts_per_tok": 2},
        {"experts": {"num_experts": 3}, "dense": {"num_experts": 1, "mamba_dt_rank": 3}},
    ),
}  # fmt: skip


def settled(model, seed=1):
    """Move every parameter that an initialisation leaves constant; model, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "conv1d.bias" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def make_gla(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32,
        "initializer_range": 0.2,
    }  # fmt: skip
    return settled(GLAForCausalLM(GLAConfig(**config | changes)), seed + 1)


def make_mamba2(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "expand": 2, "head_dim": 16,
        "num_heads": 4, "state_size": 8, "chunk_size": 16, "n_groups": 1, "initializer_range": 0.2,
    }  # fmt: skip
    return settled(Mamba2ForCausalLM(Mamba2Config(**config | changes)), seed + 1)


def make_rwkv7(seed=0, **changes):
    """A model whose low-rank projections, which begin at 0, do something, and whose layers have a say."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "value_dim": 64,
        "intermediate_size": 32, "decay_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 3,
        "gate_low_rank_dim": 7,
    }  # fmt: skip
    model = RWKV7ForCausalLM(RWKV7Config(**config | changes))
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return settled(model, seed + 1)


def make_xlstm(seed=0, **changes):
    """A model whose gates are open and differ from token to token; those of a fresh one are closed."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "ffn_proj_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    model = StatexXLSTMForCausalLM(StatexXLSTMConfig(**config | changes))
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
            elif "igate" in name:
                parameter.fill_(-3.0)  # larger ones are divided out again, and with them what gradients have in common
    return settled(model, seed + 1)


def make_hybrid(model_type, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.2}
    attention = {} if "mamba" in model_type else {"num_attention_heads": 2, "intermediate_size": 32}
    config = sizes | attention | HYBRIDS[model_type][0] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    return settled(with_eager_experts(model), seed + 1)


def with_eager_experts(model):
    """Model, its experts computed one by one: other ways have no fp64, or sum in another order."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


MAKERS = {
    "gla": (make_gla, GLA),
    "mamba2": (make_mamba2, MAMBA2),
    "rwkv7": (make_rwkv7, RWKV7),
    "xlstm": (make_xlstm, XLSTM),
} | {name: (partial(make_hybrid, name), configurations) for name, (_, configurations) in HYBRIDS.items()}


@dataclass(frozen=True)
class Case:
    """One model and one expansion of its layer 0; layer 1 stays."""

    family: str
    configuration: str
    init: str
    factor: int | None = None
    rank: int | None = None
    method: str | None = None

    def __str__(self):
        rank = f"-rank{self.rank}" if self.rank else ""
        method = f"-{self.method}" if self.method else ""
        return f"{self.family}-{self.configuration}-{self.init}{rank}{method}"

    def model(self, **changes):
        maker, configurations = MAKERS[self.family]
        return maker(**configurations[self.configuration] | changes)

    def expand(self, model):
        return statex.expand(model, self.expansion)

    def expanded(self, **changes):
        model = self.model(**changes)
        self.expand(model)
        return model

    @property
    def expansion(self):
        return statex.ExpansionConfig(
            layers=[EXPANDED], factor=self.factor, method=self.method, init=self.init, rank=self.rank, seed=3
        )


def _gla_cases():
    for name, changes in GLA.items():
        if changes.get("num_heads") != 1:
            partial = 2 if changes.get("num_heads", 2) == 8 else None
            yield Case("gla", name, "reinit")
            yield Case("gla", name, "inherit", factor=partial)
        yield Case("gla", name, "preserve", factor=3)
        yield Case("gla", name, "preserve", factor=2, rank=3)


def _mamba2_cases():
    for name in MAMBA2:
        yield Case("mamba2", name, "reinit")
        yield Case("mamba2", name, "inherit", factor=3 if name == "2-groups" else None)
        yield Case("mamba2", name, "preserve", factor=3 if name == "2-groups" else None)


RWKV7_CASES = [
    Case("rwkv7", "plain", "reinit"),
    Case("rwkv7", "plain", "inherit"),
    Case("rwkv7", "plain", "preserve", factor=3),
    Case("rwkv7", "1-head", "preserve", factor=2),
    Case("rwkv7", "1-head", "inherit", factor=3),
    Case("rwkv7", "tied", "preserve"),
    Case("rwkv7", "no-pre-norm", "inherit", factor=2),
]
XLSTM_CASES = [
    Case("xlstm", "plain", "reinit"),
    Case("xlstm", "plain", "inherit"),
    Case("xlstm", "tied", "preserve", factor=3),
]
DEFINED = [*_gla_cases(), *_mamba2_cases(), *RWKV7_CASES, *XLSTM_CASES]
"""Cases whose whole model is written out in naive_models.py."""
INITS = ("reinit", "inherit", "preserve")
HYBRID_CASES = [
    Case(family, name, init, factor=3 if init == "preserve" else None)
    for family, (_, configurations) in HYBRIDS.items()
    for place, name in enumerate(configurations)
    for init in (INITS if place == 0 else INITS[place : place + 1])
    if (family, init) != ("falcon_mamba", "preserve")  # which is refused
]
"""The first configuration of a family with each initialisation, the others with one: what is special in them (biases,
norms) is Mamba2's, too, which has all of them."""
CASES = DEFINED + HYBRID_CASES
SAME_MIXERS = ("tied", "dense")
"""Configurations whose recurrent layers run as another one's of their family do."""
GENERATING = [
    Case("gla", "2-heads", "inherit"),
    Case("gla", "conv-kv-heads", "preserve", factor=2, rank=3),
    Case("gla", "everything", "preserve", factor=3),
    Case("gla", "everything", "inherit"),
    Case("mamba2", "1-group", "reinit"),
    Case("mamba2", "2-groups", "inherit"),
    Case("mamba2", "no-conv-bias", "preserve"),
    Case("mamba2", "bias", "inherit"),
    Case("rwkv7", "plain", "inherit"),
    Case("rwkv7", "plain", "preserve", factor=3),
    Case("xlstm", "plain", "inherit"),
    *(case for case in HYBRID_CASES if case.init == "inherit" and case.configuration not in SAME_MIXERS),
]
"""Cases that are run token by token, generate and train: a few of each family."""


def _spread():
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        groups.setdefault((case.family, case.configuration), []).append(case)
    return [cases[place % len(cases)] for place, cases in enumerate(groups.values())]


SPREAD = _spread()
"""Each configuration with one of its initialisations, in turn."""
UNEXPANDED = [(family, name) for family in ("gla", "mamba2", "rwkv7", "xlstm") for name in MAKERS[family][1]]


def mixer(model, index=EXPANDED):
    return model.get_submodule(family_of(model.config).mixer_name(model.config, index))


def base_type(model):
    """The family's name in statex.FAMILIES, expanded or not."""
    return getattr(model.config, "base_model_type", model.config.model_type)


def tokens(batch=2, length=20, seed=0):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def distance(a, b):
    """||a - b|| / ||b||, 0 where both are zero."""
    return float((a - b).norm() / b.norm()) if bool(b.any()) else float(a.norm())


def state_after(model, ids):
    """Elements of each layer's recurrent state for one sequence, as the model's own cache holds it."""
    with torch.no_grad(), statex.statex_ops():  # transformers' own cache of MiniMax has no such layers
        cache = cache_of(model(ids[:1], use_cache=True))
    return [cache.layers[index].recurrent_states[0].numel() for index in recurrent_layers(model)]


def recurrent_layers(model):
    return family_of(model.config).recurrent_layers(model.config)
