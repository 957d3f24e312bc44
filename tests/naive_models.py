"""GLA, Mamba2, RWKV-7 and xLSTM written out from their papers, token by token, in fp64; nothing of statex or of
transformers.

Shape letters: T time, D width of the residual stream, H heads, K key dim, V value dim, N state size, P head dim,
G groups. Tensors come as a dictionary of names as in a checkpoint.
"""

import math

import torch
import torch.nn.functional as F

FEATURE_MAPS = {
    None: lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # as in flash-linear-attention
    "sqrelu": lambda x: F.relu(x) ** 2,
}


def rms_norm(x, weight, eps):
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def convolution(x, weight, bias=None):
    """silu(causal depthwise convolution) of x [T, channels] with weight [channels, 1, taps]."""
    num_taps = weight.shape[-1]
    outputs = []
    for t in range(len(x)):
        y = torch.zeros_like(x[0]) if bias is None else bias.clone()
        for w in range(num_taps):
            if t - w >= 0:
                y = y + weight[:, 0, num_taps - 1 - w] * x[t - w]
        outputs.append(F.silu(y))
    return torch.stack(outputs)


def under(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def gla_mixer(tensors, x, config, state, key_heads=None, scale=None):
    """x [T, D] to [T, D]; `state` is (H, K, V) of this layer, `key_heads[h]` the key head that query head h reads."""
    H, K, V = state
    T = len(x)
    num_key_heads = tensors["gk_proj.1.bias"].shape[0] // K
    if key_heads is None:
        key_heads = [h // (H // num_key_heads) for h in range(H)]
    if scale is None:
        scale = (config["hidden_size"] * config["expand_k"] / H) ** -0.5

    q, k, v = (x @ tensors[f"{name}_proj.weight"].T for name in "qkv")
    if "q_low_rank.0.weight" in tensors:
        more_q, more_k = (
            x @ tensors[f"{name}_low_rank.0.weight"].T @ tensors[f"{name}_low_rank.1.weight"].T for name in "qk"
        )
        q = torch.cat([q.view(T, H, -1), more_q.view(T, H, -1)], dim=-1).reshape(T, -1)
        k = torch.cat([k.view(T, num_key_heads, -1), more_k.view(T, num_key_heads, -1)], dim=-1).reshape(T, -1)
    if "q_conv1d.weight" in tensors:
        q, k, v = (convolution(y, tensors[f"{name}_conv1d.weight"]) for name, y in zip("qkv", (q, k, v)))
    feature_map = FEATURE_MAPS[config["feature_map"]]
    q, k = feature_map(q).view(T, H, K), feature_map(k).view(T, num_key_heads, K)
    v = v.view(T, num_key_heads, V)
    gate = x @ tensors["gk_proj.0.weight"].T @ tensors["gk_proj.1.weight"].T + tensors["gk_proj.1.bias"]
    log_decay = F.logsigmoid(gate) / 16
    if config["clamp_min"] is not None:
        log_decay = log_decay.clamp(min=config["clamp_min"])
    decay = log_decay.exp().view(T, num_key_heads, K)

    norm = tensors.get("g_norm_swish_gate.weight", tensors.get("g_norm.weight"))
    S = x.new_zeros(H, K, V)
    outputs = []
    for t in range(T):
        S = decay[t, key_heads][:, :, None] * S + k[t, key_heads][:, :, None] * v[t, key_heads][:, None, :]
        o = rms_norm(scale * torch.einsum("hk,hkv->hv", q[t], S), norm, config["norm_eps"]).flatten()
        if config["use_output_gate"]:
            o = o * F.silu(x[t] @ tensors["g_proj.weight"].T)
        outputs.append(o @ tensors["o_proj.weight"].T)
    return torch.stack(outputs)


@torch.no_grad()
def gla_logits(tensors, config, ids, states):
    """Logits [T, vocabulary] of ids [T]; `config` is the model's as a dictionary, `states[layer]` is (H, K, V)."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["model.embeddings.weight"][ids]
    for index, state in enumerate(states):
        layer = under(tensors, f"model.layers.{index}.")
        normed = rms_norm(x, layer["attn_norm.weight"], config["norm_eps"])
        x = x + gla_mixer(under(layer, "attn."), normed, config, state)
        normed = rms_norm(x, layer["mlp_norm.weight"], config["norm_eps"])
        hidden = F.silu(normed @ layer["mlp.gate_proj.weight"].T) * (normed @ layer["mlp.up_proj.weight"].T)
        x = x + hidden @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, tensors["model.norm.weight"], config["norm_eps"])
    return x @ tensors.get("lm_head.weight", tensors["model.embeddings.weight"]).T


def mamba2_mixer(tensors, x, config, state, norm_group_size):
    """x [T, D] to [T, D]; `state` is (H, N, P) of this layer."""
    H, N, P = state
    G, inner, T = config["n_groups"], H * P, len(x)
    bias = tensors.get("in_proj.bias", torch.zeros(()))
    z, xBC, dt = (x @ tensors["in_proj.weight"].T + bias).split([inner, inner + 2 * G * N, H], dim=-1)
    xBC = convolution(xBC, tensors["conv1d.weight"], tensors.get("conv1d.bias"))
    values, B, C = xBC.split([inner, G * N, G * N], dim=-1)
    values, B, C = values.view(T, H, P), B.view(T, G, N), C.view(T, G, N)
    dt, A = F.softplus(dt + tensors["dt_bias"]), -tensors["A_log"].exp()
    group = [h // (H // G) for h in range(H)]
    S = x.new_zeros(H, P, N)
    outputs = []
    for t in range(T):
        written = dt[t][:, None, None] * values[t][:, :, None] * B[t, group][:, None, :]
        S = (dt[t] * A).exp()[:, None, None] * S + written
        y = torch.einsum("hpn,hn->hp", S, C[t, group]) + tensors["D"][:, None] * values[t]
        y = (y.flatten() * F.silu(z[t])).view(-1, norm_group_size)
        y = rms_norm(y, None, config["layer_norm_epsilon"]).flatten() * tensors["norm.weight"]
        outputs.append(y @ tensors["out_proj.weight"].T + tensors.get("out_proj.bias", 0))
    return torch.stack(outputs)


@torch.no_grad()
def mamba2_logits(tensors, config, ids, states, norm_group_size):
    """As gla_logits; the gated norm works on groups of `norm_group_size` channels."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["backbone.embeddings.weight"][ids]
    for index, state in enumerate(states):
        layer = under(tensors, f"backbone.layers.{index}.")
        normed = rms_norm(x, layer["norm.weight"], config["layer_norm_epsilon"])
        x = x + mamba2_mixer(under(layer, "mixer."), normed, config, state, norm_group_size)
    x = rms_norm(x, tensors["backbone.norm_f.weight"], config["layer_norm_epsilon"])
    return x @ tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"]).T


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rwkv7_mixer(tensors, x, config, state, first_values):
    """x [T, D] to [T, D], and the first layer's values [T, H * V]; `state` is (H, K, V) of this layer."""
    H, K, V = state
    T, before = len(x), F.pad(x, (0, 0, 1, -1))

    def mixed(letter):
        return x + (before - x) * tensors[f"x_{letter}"].flatten()

    def low_rank(letter, activation):
        hidden = activation(mixed(letter) @ tensors[f"{letter}_lora.lora.0.weight"].T)
        return hidden @ tensors[f"{letter}_lora.lora.2.weight"].T + tensors.get(f"{letter}_lora.lora.2.bias", 0)

    r, k, v = (mixed(letter) @ tensors[f"{letter}_proj.weight"].T for letter in "rkv")
    if first_values is None:
        first_values = v
    else:
        v = v + (first_values - v) * low_rank("v", lambda y: y).sigmoid()
    decay = (-math.exp(-0.5) * low_rank("w", torch.tanh).sigmoid()).exp()
    rate, gate = low_rank("a", lambda y: y).sigmoid(), low_rank("g", torch.sigmoid)
    kk = (k * tensors["k_k"]).view(T, H, K)
    kk = kk / kk.norm(dim=-1, keepdim=True)
    k = k * (1 + (rate - 1) * tensors["k_a"])
    r, k, v, decay, rate = (y.view(T, H, -1) for y in (r, k, v, decay, rate))
    S, outputs = x.new_zeros(H, V, K), []
    for t in range(T):
        heads = []
        for h in range(H):
            removed = torch.outer(S[h] @ kk[t, h], kk[t, h] * rate[t, h])
            S[h] = S[h] * decay[t, h] - removed + torch.outer(v[t, h], k[t, h])
            o = S[h] @ r[t, h]
            o = (o - o.mean()) / (o.var(unbiased=False) + config["head_dim"] * config["norm_eps"]).sqrt()
            heads.append(o)
        o = torch.cat(heads) * tensors["g_norm.weight"] + tensors["g_norm.bias"]
        bonus = (r[t] * k[t] * tensors["r_k"]).sum(-1, keepdim=True) * v[t]
        outputs.append(((o + bonus.flatten()) * gate[t]) @ tensors["o_proj.weight"].T)
    return torch.stack(outputs), first_values


@torch.no_grad()
def rwkv7_logits(tensors, config, ids, states):
    """As gla_logits."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x, first_values = tensors["model.embeddings.weight"][ids], None

    def norm(name, y):
        return layer_norm(y, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), config["norm_eps"])

    for index, state in enumerate(states):
        path = f"model.layers.{index}"
        layer = under(tensors, f"{path}.")
        if "pre_norm.weight" in layer:
            x = norm(f"{path}.pre_norm", x)
        mixed, first_values = rwkv7_mixer(
            under(layer, "attn."), norm(f"{path}.attn_norm", x), config, state, first_values
        )
        x = x + mixed
        y = norm(f"{path}.ffn_norm", x)
        y = y + (F.pad(y, (0, 0, 1, -1)) - y) * layer["ffn.x_k"]
        x = x + F.relu(y @ layer["ffn.key.weight"].T) ** 2 @ layer["ffn.value.weight"].T
    return norm("model.norm", x) @ tensors.get("lm_head.weight", tensors["model.embeddings.weight"]).T


def mlstm_mixer(tensors, x, config, state):
    """x [T, D] to [T, D]; `state` is (H, K, V) of this layer. The gates and sums of the paper, stabilised by m."""
    H, K, V = state
    scale = int(config["hidden_size"] * config["qk_dim_factor"]) // H
    q, k, v = ((x @ tensors[f"{name}.weight"].T).view(len(x), H, -1) for name in "qkv")
    cap, eps = config["gate_soft_cap"], config["eps"]
    i, f = (x @ tensors[f"{name}gate_preact.weight"].T + tensors[f"{name}gate_preact.bias"] for name in "if")
    i, f = cap * (i / cap).tanh(), F.logsigmoid(cap * (f / cap).tanh())
    S, n, m, outputs = x.new_zeros(H, V, K), x.new_zeros(H, K), x.new_zeros(H), []
    for t in range(len(x)):
        largest = torch.maximum(f[t] + m, i[t])
        keep, write, m = (f[t] + m - largest).exp(), (i[t] - largest).exp(), largest
        S = keep[:, None, None] * S + write[:, None, None] * v[t, :, :, None] * k[t, :, None, :]
        n = keep[:, None] * n + write[:, None] * k[t]
        query = q[t] / scale**0.5
        normaliser = torch.maximum((n * query).sum(-1).abs(), (-m).exp()) + eps
        h = torch.einsum("hvk,hk->hv", S, query) / normaliser[:, None]
        outputs.append(layer_norm(h, None, None, config["norm_eps"]).flatten() * tensors["multihead_norm.weight"])
    gate = (x @ tensors["ogate_preact.weight"].T).sigmoid()
    return (gate * torch.stack(outputs)) @ tensors["out_proj.weight"].T


@torch.no_grad()
def xlstm_logits(tensors, config, ids, states):
    """As gla_logits."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["backbone.embeddings.weight"][ids]
    for index, state in enumerate(states):
        layer = under(tensors, f"backbone.blocks.{index}.")
        normed = rms_norm(x, layer["norm_mlstm.weight"], config["norm_eps"])
        x = x + mlstm_mixer(under(layer, "mlstm_layer."), normed, config, state)
        y = rms_norm(x, layer["norm_ffn.weight"], config["norm_eps"])
        y = F.silu(y @ layer["ffn.proj_up_gate.weight"].T) * (y @ layer["ffn.proj_up.weight"].T)
        x = x + y @ layer["ffn.proj_down.weight"].T
    x = rms_norm(x, tensors["backbone.out_norm.weight"], config["norm_eps"])
    logits = x @ tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"]).T
    return config["output_logit_soft_cap"] * (logits / config["output_logit_soft_cap"]).tanh()


def naive_logits(model, ids, states):
    """The same of a transformers model, by its family; ids [T]."""
    config, tensors = model.config.to_dict(), model.state_dict()
    if config["model_type"] == "statex_gla":
        return gla_logits(tensors, config, ids, states)
    if config["model_type"] == "statex_rwkv7":
        return rwkv7_logits(tensors, config, ids, states)
    if config["model_type"] == "statex_xlstm":
        return xlstm_logits(tensors, config, ids, states)
    if {"linear_key_head_dim", "linear_head_dim", "block_size"} & set(config):
        from delta_models import delta_logits

        return delta_logits(model, ids, states)
    norm = model.backbone.layers[0].mixer.norm  # older transformers norm all channels together
    group_size = getattr(norm, "group_size", norm.weight.shape[0])
    return mamba2_logits(tensors, config, ids, states, group_size)
