"""Tiny models of flash-linear-attention, and its Triton kernels replaced by its own naive references and by PyTorch.

With them a model runs on a CPU as its layers say; the kernels themselves are tested by FLA.
"""

import importlib
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch.nn import functional as F

from common import VOCABULARY, settled
from statex.families import FAMILIES
from statex.models.dispatch import imported

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32,
    "initializer_range": 0.2, "norm_eps": 0.1, "fuse_cross_entropy": False, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
"""The large epsilon shows whatever is left of a factor that a norm takes out."""
CONFIGURATIONS = {
    "gla": {
        "plain": {"num_heads": 4, "expand_k": 1.0},
        "everything": {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "silu",
                       "clamp_min": -0.05, "fuse_norm": False, "tie_word_embeddings": True},
    },
    "gsa": {
        "plain": {"num_heads": 2, "num_slots": 8},
        "everything": {"num_heads": 4, "num_kv_heads": 2, "num_slots": None, "use_short_conv": True},
    },
    "hgrn2": {
        "plain": {"num_heads": None, "expand_ratio": 8},
        "everything": {"num_heads": 4, "expand_ratio": None, "use_short_conv": True, "use_lower_bound": False},
    },
    "retnet": {
        "plain": {"num_heads": 2},
        "everything": {"num_heads": 4, "num_kv_heads": 2, "feature_map": "gelu", "expand_v": 1.0,
                       "use_output_gate": False},
    },
    "delta_net": {
        "plain": {"num_heads": 2},
        "everything": {"num_heads": 4, "use_gate": True, "use_short_conv": False, "allow_neg_eigval": True,
                       "qk_norm": "sum", "qk_activation": "identity", "use_beta": False},
    },
    "gated_deltanet": {
        "plain": {"num_heads": 2, "head_dim": 8},
        "everything": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "use_short_conv": False,
                       "allow_neg_eigval": True, "use_gate": False},
    },
}  # fmt: skip
HYBRID = {"num_hidden_layers": 3, "attn": {"layers": [1], "num_heads": 2}}


def make_fla(model_type, configuration="plain", seed=0, **changes):
    """A model of FLA's own class."""
    torch.manual_seed(seed)
    family = FAMILIES[model_type]
    config = imported(family.config_class)(**SIZES | CONFIGURATIONS[model_type][configuration] | changes)
    return settled(imported(family.causal_lm_class)(config), seed + 1)


def over_documents(function, tokens, cu_seqlens, states):
    """function(*tokens, initial_state=...) document by document; tokens are [1, T, ...]."""
    borders = cu_seqlens.tolist()
    results = [
        function(*(x[:, a:b] for x in tokens), initial_state=None if states is None else _one(states, s))
        for s, (a, b) in enumerate(pairwise(borders))
    ]
    output = torch.cat([each for each, _ in results], dim=1)
    return output, _joined([state for _, state in results])


def _one(states, s):
    return tuple(each[s : s + 1] for each in states) if isinstance(states, tuple) else states[s : s + 1]


def _joined(states):
    if isinstance(states[0], tuple):
        return tuple(torch.cat(each) for each in zip(*states))
    return torch.cat(states)


def recurrence(naive, names, prepare=None):
    """A kernel of FLA's, called with keywords, by a naive reference of `names`' tokens."""

    def kernel(
        *, initial_state=None, output_final_state=False, cu_seqlens=None, scale=None, state_v_first=False, **given
    ):
        given = prepare(dict(given)) if prepare else given
        tokens = [given.pop(name) for name in names]
        options = {} if scale is None else {"scale": scale}
        assert all(value in (None, True, False) for value in given.values()), given.keys()
        run = partial(naive, output_final_state=True, **options)
        if state_v_first and initial_state is not None:
            initial_state = initial_state.mT
        if cu_seqlens is not None:
            output, state = over_documents(run, tokens, cu_seqlens, initial_state)
        else:
            output, state = run(*tokens, initial_state=initial_state)
        return output, (state.mT if state_v_first else state) if output_final_state else None

    return kernel


def _l2(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _delta_inputs(given):
    if given.pop("use_qk_l2norm_in_kernel", False):
        given |= {"q": _l2(given["q"]), "k": _l2(given["k"])}
    if given.pop("use_gate_in_kernel", False):
        step = F.softplus(given["g"].float() + given.pop("dt_bias"))
        given["g"] = -given.pop("A_log").float().exp() * step
    if given.pop("use_beta_sigmoid_in_kernel", False):
        given["beta"] = given["beta"].sigmoid() * (2 if given.pop("allow_neg_eigval", False) else 1)
    given.setdefault("g", torch.zeros_like(given["beta"]))
    repeats = given["v"].shape[2] // given["q"].shape[2]
    return given | {name: given[name].repeat_interleave(repeats, dim=2) for name in "qk"}


def _retention_inputs(given):
    H = given["q"].shape[2]
    decay = torch.log1p(-torch.pow(2.0, -5 - torch.arange(H, dtype=torch.float)))
    return given | {"g": decay.expand(given["q"].shape[:3])}


def _rms_norm(x, weight, bias=None, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    x = x if residual is None else x + residual
    y = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    y = (y if weight is None else y * weight).to(x.dtype)
    return (y, x) if prenorm else y


def _rms_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, eps=1e-5):
    return F.linear(_rms_norm(x, norm_weight, eps=eps), linear_weight, linear_bias)


def _rms_norm_gated(x, g, weight, bias, activation="swish", eps=1e-6, **options):
    return _rms_norm(x, weight, eps=eps) * (g.sigmoid() if activation == "sigmoid" else F.silu(g))


def _swiglu(x, y):
    return F.silu(x) * y


def _swiglu_linear(x, y, weight, bias):
    return F.linear(_swiglu(x, y), weight, bias)


def _convolution(
    x, weight, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, backend=None,
    cu_seqlens=None, chunk_indices=None,
):  # fmt: skip
    """x [B, T, D], weight [D, W], states [N, D, W]: the last W inputs."""
    W = weight.shape[1]

    def run(x, initial_state=None):
        before = x.new_zeros(len(x), W, x.shape[2]) if initial_state is None else initial_state.mT
        inputs = torch.cat([before, x], dim=1).mT
        y = F.conv1d(inputs[..., 1:], weight[:, None], bias, groups=len(weight)).mT
        return F.silu(y) if activation else y, inputs[..., -W:]

    if cu_seqlens is not None:
        y, state = over_documents(run, [x], cu_seqlens, initial_state)
    else:
        y, state = run(x, initial_state)
    return y, state if output_final_state else None


def _convolution_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    tokens = x.reshape(len(cache), 1, -1)  # a batch, or as many documents of one token
    y, state = _convolution(tokens, weight, bias, None, cache, True, activation)
    return y.view_as(x), cache.copy_(state)


def _rotary(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None):
    """x [B, T, H, D] by tables [positions, D / 2]."""
    places = torch.arange(x.shape[1]).expand(x.shape[:2])
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
        places = places - starts
        if torch.is_tensor(seqlen_offsets):
            seqlen_offsets = seqlen_offsets.repeat_interleave(cu_seqlens.diff().long())
    elif torch.is_tensor(seqlen_offsets):
        seqlen_offsets = seqlen_offsets[:, None]
    places = places + seqlen_offsets
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[places][:, :, None], sin[places][:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _replacements():
    """(module, name): function."""
    naive = importlib.import_module
    gla = recurrence(naive("fla.ops.gla.naive").naive_recurrent_gla, ("q", "k", "v", "gk"), lambda given: given | {
        "gk": given.pop("g", None) if "g" in given else given.get("gk")})  # fmt: skip
    retention = recurrence(
        naive("fla.ops.simple_gla.naive").naive_recurrent_simple_gla, ("q", "k", "v", "g"), _retention_inputs
    )
    gsa = recurrence(naive("fla.ops.gsa.naive").naive_recurrent_gsa, ("q", "k", "v", "s", "g"))
    delta = recurrence(
        naive("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule,
        ("q", "k", "v", "beta", "g"), _delta_inputs,
    )  # fmt: skip
    found = {
        ("fla.layers.gla", "chunk_gla"): gla,
        ("fla.layers.gla", "fused_recurrent_gla"): gla,
        ("fla.layers.hgrn2", "chunk_gla"): gla,
        ("fla.layers.hgrn2", "fused_recurrent_gla"): gla,
        ("fla.layers.gsa", "chunk_gsa"): gsa,
        ("fla.layers.gsa", "fused_recurrent_gsa"): gsa,
        ("fla.layers.multiscale_retention", "chunk_retention"): retention,
        ("fla.layers.multiscale_retention", "fused_recurrent_retention"): retention,
        ("fla.layers.delta_net", "chunk_delta_rule"): delta,
        ("fla.layers.delta_net", "fused_recurrent_delta_rule"): delta,
        ("fla.layers.gated_deltanet", "chunk_gated_delta_rule"): delta,
        ("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule"): delta,
        ("fla.layers.gated_deltanet", "causal_conv1d"): _convolution,
        ("fla.layers.gsa", "rms_norm_linear"): _rms_norm_linear,
        ("fla.layers.hgrn2", "rms_norm_linear"): _rms_norm_linear,
        ("fla.layers.hgrn2", "swish"): F.silu,
        ("fla.modules.feature_map", "swish"): F.silu,
        ("fla.modules.mlp", "swiglu"): _swiglu,
        ("fla.modules.mlp", "swiglu_linear"): _swiglu_linear,
        ("fla.modules.norm.layernorm", "rms_norm"): _rms_norm,
        ("fla.modules.norm.fused_norm_gate", "rms_norm_gated"): _rms_norm_gated,
        ("fla.modules.causal_conv1d.ops", "causal_conv1d"): _convolution,
        ("fla.modules.causal_conv1d.ops", "causal_conv1d_update"): _convolution_update,
        ("fla.modules.rotary.ops", "rotary_embedding"): _rotary,
    }
    return {(importlib.import_module(module), name): function for (module, name), function in found.items()}


@contextmanager
def on_the_cpu():
    """Inside this context FLA's models run on a CPU."""
    activations = importlib.import_module("fla.modules.activations").ACT2FN
    functions, before = _replacements(), dict(activations)
    originals = {(module, name): getattr(module, name) for module, name in functions}
    try:
        for (module, name), function in functions.items():
            setattr(module, name, function)
        activations.update(swish=F.silu, silu=F.silu)
        yield
    finally:
        activations.update(before)
        for (module, name), function in originals.items():
            setattr(module, name, function)
