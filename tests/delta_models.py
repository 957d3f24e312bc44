"""Tiny models of the gated delta rule, or of lightning attention, among attention layers, their expansions, and their
mixers written out.

Shape letters: T time, D width of the residual stream, G key heads, H value heads, K key dim, V value dim.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import statex
from common import VOCABULARY, Case, settled
from naive_models import convolution, rms_norm

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_attention_heads": 2,
    "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "initializer_range": 0.2, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
DENSE = {"head_dim": 16, "num_experts": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 16}
MODELS = {  # whose key dimension grows
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig, DENSE),
    "qwen3_5_text": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {"head_dim": 16}),
    "olmo_hybrid": (OlmoHybridForCausalLM, OlmoHybridConfig, {}),
}
KIMI = {
    "linear_num_heads": 4, "linear_head_dim": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "num_key_value_heads": 2, "mlp_layer_types": ["dense"] * 3, "bos_token_id": None,
}  # fmt: skip
BAILING = {
    "head_dim": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "num_key_value_heads": 4, "num_attention_heads": 4, "mlp_layer_types": ["dense", "sparse", "dense"],
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "rope_theta": 10_000.0,
}  # fmt: skip
MINIMAX = {"num_attention_heads": 4, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "block_size": 16}
ALL_MODELS = MODELS | {
    "kimi_linear": (KimiLinearForCausalLM, KimiLinearConfig, KIMI),
    "minimax": (MiniMaxForCausalLM, MiniMaxConfig, MINIMAX),
}
if "bailing_hybrid" in statex.FAMILIES:  # older transformers have none
    from transformers import BailingHybridConfig, BailingHybridForCausalLM

    ALL_MODELS["bailing_hybrid"] = BailingHybridForCausalLM, BailingHybridConfig, BAILING
CONFIGURATIONS = {
    "grouped": {},
    "experts": EXPERTS,
    "equal-heads": {"linear_num_key_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "beta-to-1": {"linear_allow_neg_eigval": False},
    "no-rope": {"rope_parameters": None},
}


def make_delta(family, seed=0, **changes):
    """A model whose time scales and norms are those of no initialisation, and which forgets slowly."""
    torch.manual_seed(seed)
    model_class, config_class, own = ALL_MODELS[family]
    sizes = SIZES
    if family not in MODELS:
        sizes = {name: size for name, size in SIZES.items() if not name.startswith("linear_")}
    model = model_class(config_class(**sizes | own | changes))
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the others have no fp64
    if model.device.type != "meta":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter.fill_(-2.0)
    return settled(model, seed + 1)


@dataclass(frozen=True)
class DeltaCase(Case):
    """One model and one expansion of its layer 0; layer 1 stays, layer 2 is attention."""

    def model(self, **changes):
        return make_delta(self.family, **CONFIGURATIONS[self.configuration] | changes)


CASES = [
    DeltaCase("qwen3_next", "grouped", "inherit", factor=3),
    DeltaCase("qwen3_next", "equal-heads", "reinit", method="merge"),
    DeltaCase("qwen3_next", "experts", "preserve"),
    DeltaCase("qwen3_5_text", "grouped", "reinit"),
    DeltaCase("qwen3_5_text", "tied", "preserve", factor=2),
    DeltaCase("olmo_hybrid", "grouped", "inherit"),
    DeltaCase("olmo_hybrid", "beta-to-1", "reinit", factor=2, method="merge"),
    DeltaCase("olmo_hybrid", "no-rope", "preserve", factor=2),
    DeltaCase("kimi_linear", "grouped", "reinit"),
    DeltaCase("minimax", "grouped", "preserve", factor=3),
    DeltaCase("minimax", "tied", "reinit", method="merge"),
]
CASES += [DeltaCase("bailing_hybrid", "tied", "reinit", factor=2)] if "bailing_hybrid" in ALL_MODELS else []


def in_parts(tensors, x, sizes):
    """Queries, keys, values, gates [T, heads, ...], and what beta and the decay are made of [T, H], of x [T, D]."""
    G, H, K, V = sizes
    R = H // G
    if "in_proj_qkvz.weight" in tensors:  # head by head
        heads = (x @ tensors["in_proj_qkvz.weight"].T).unflatten(1, (G, -1))
        q, k, v, z = heads.split([K, K, R * V, R * V], dim=-1)
        b, a = (x @ tensors["in_proj_ba.weight"].T).unflatten(1, (G, -1)).chunk(2, dim=-1)
        b, a = b.flatten(1), a.flatten(1)
    else:
        names = ("q", "k", "v", "g", "b", "a")
        if "in_proj_qkv.weight" in tensors:
            q, k, v = (x @ tensors["in_proj_qkv.weight"].T).split([G * K, G * K, H * V], dim=1)
            z, b, a = (x @ tensors[f"in_proj_{name}.weight"].T for name in ("z", "b", "a"))
        else:
            q, k, v, z, b, a = (x @ tensors[f"{name}_proj.weight"].T for name in names)
    mixed = convolution(torch.cat([each.flatten(1) for each in (q, k, v)], dim=1), tensors["conv1d.weight"])
    q, k, v = mixed.split([G * K, G * K, H * V], dim=1)
    return q.view(-1, G, K), k.view(-1, G, K), v.view(-1, H, V), z.reshape(-1, H, V), b, a


def delta_mixer(tensors, x, config, state):
    """x [T, D] to [T, D], one token at a time; `state` is (H, K, V) of this layer."""
    tensors, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    H, K, V = state
    G = config.linear_num_key_heads * H // config.linear_num_value_heads
    old = config.linear_key_head_dim * V // config.linear_value_head_dim  # all channels of a merged head
    q, k, v, z, b, a = in_parts(tensors, x, (G, H, K, V))
    q = q / (q[..., :old].square().sum(-1, keepdim=True) + 1e-6).sqrt() / old**0.5
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    beta = b.sigmoid() * (2 if getattr(config, "linear_allow_neg_eigval", False) else 1)
    decay = (-tensors["A_log"].exp() * F.softplus(a + tensors["dt_bias"])).exp()
    norm, eps = ("o_norm", 1e-5) if "o_norm.weight" in tensors else ("norm", config.rms_norm_eps)
    S, outputs = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            key, query = k[t, h // (H // G)], q[t, h // (H // G)]
            S[h] *= decay[t, h]
            S[h] += beta[t, h] * torch.outer(key, v[t, h] - key @ S[h])
            heads.append(rms_norm(query @ S[h], tensors[f"{norm}.weight"], eps) * F.silu(z[t, h]))
        outputs.append(torch.cat(heads))
    output = torch.stack(outputs)
    return output @ tensors["o_proj.weight" if "o_proj.weight" in tensors else "out_proj.weight"].T


def kimi_mixer(tensors, x, config, state):
    """The same of Kimi Delta Attention, whose every channel has its own decay."""
    tensors, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    H, K, V = state

    def projected(*names):
        y = x
        for name in names:
            y = y @ tensors[f"{name}.weight"].T
        return y

    mixed = torch.cat([projected(f"{name}_proj") for name in "qkv"], dim=1)
    q, k, v = convolution(mixed, tensors["conv1d.weight"]).view(-1, 3, H, K).unbind(1)
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    is_low_rank = "g_a_proj.weight" in tensors  # Kimi's; in Bailing's, the decay has a lower bound
    forgets = ("forget_gate.f_a_proj", "forget_gate.f_b_proj") if is_low_rank else ("forget_gate.f_proj",)
    gate = (projected(*forgets) + tensors["forget_gate.dt_bias"]).view(-1, H, K)
    rate = tensors["forget_gate.A_log"].exp().view(H, 1)
    decay = -rate * F.softplus(gate) if is_low_rank else config.kda_lower_bound * (rate * gate).sigmoid()
    decay, gates = decay.exp(), ("g_a_proj", "g_b_proj") if is_low_rank else ("g_proj",)
    beta, z = projected("b_proj").sigmoid(), projected(*gates).view(-1, H, V).sigmoid()
    S, outputs = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            S[h] *= decay[t, h][:, None]
            S[h] += beta[t, h] * torch.outer(k[t, h], v[t, h] - k[t, h] @ S[h])
            heads.append(rms_norm(q[t, h] @ S[h] / K**0.5, tensors["o_norm.weight"], config.rms_norm_eps) * z[t, h])
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ tensors["o_proj.weight"].T


def lightning_mixer(tensors, x, config, state, layer_idx):
    """The same of MiniMax's lightning attention: a decay that is fixed, and one norm of all heads."""
    tensors, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    H, K, V = state
    q, k, v = F.silu(x @ tensors["qkv_proj.weight"].T).view(len(x), H, -1).split([K, K, V], dim=-1)
    slope = 2.0 ** (-8 / H * torch.arange(1, H + 1)) * (1 - layer_idx / (config.num_hidden_layers - 1 + 1e-5) + 1e-5)
    S, outputs = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        S = S * (-slope).exp()[:, None, None] + k[t, :, :, None] * v[t, :, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], S).flatten())
    output = rms_norm(torch.stack(outputs), tensors["norm.weight"], 1e-6)
    return (output * (x @ tensors["output_gate.weight"].T).sigmoid()) @ tensors["out_proj.weight"].T


@torch.no_grad()
def delta_logits(model, ids, states):
    """Logits of ids [T] with all mixers written out, and transformers' own code around them."""
    model = copy.deepcopy(model)
    family = statex.FAMILIES[getattr(model.config, "base_model_type", model.config.model_type)]
    for index, state in zip(family.recurrent_layers(model.config), states, strict=True):
        mixer = model.get_submodule(family.mixer_path.format(index))

        def forward(hidden_states, *, given, **kwargs):
            tensors, state, index = given
            if "qkv_proj.weight" in tensors:
                output = lightning_mixer(tensors, hidden_states[0], model.config, state, index)
                return output.to(hidden_states)[None], None
            written_out = kimi_mixer if "forget_gate.A_log" in tensors else delta_mixer
            return written_out(tensors, hidden_states[0], model.config, state).to(hidden_states)[None]

        mixer.forward = partial(forward, given=(mixer.state_dict(), state, index))
    return model(ids[None], use_cache=False).logits[0]
