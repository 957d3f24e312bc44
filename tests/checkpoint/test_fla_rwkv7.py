"""RWKV-7 checkpoints in flash-linear-attention's format, written here from its names and shapes."""

import json

import pytest
import torch
from fla_folders import write_folder

import statex
from common import distance, logits, tokens
from naive_models import rwkv7_logits

D, VOCABULARY, LAYERS, MLP = 32, 48, 3, 48
RANKS = {"decay_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 3, "gate_low_rank_dim": 7}
CONFIGURATIONS = {
    "4-heads": {},
    "by-heads": {"head_dim": None, "num_heads": 2},
    "earlier": {"num_heads": None, "value_dim": None},
    "wide-values": {"value_dim": [64] * LAYERS},
    "no-pre-norm": {"norm_first": False, "norm_bias": False},
    "tied": {"tie_word_embeddings": True},
    "default-mlp": {"intermediate_size": None, "hidden_ratio": 3.3},
}


def fla_config(**changes):
    """config.json of FLA's RWKV7ForCausalLM."""
    return {
        "architectures": ["RWKV7ForCausalLM"], "attn": None, "attn_mode": "chunk", "bos_token_id": 0,
        "eos_token_id": 0, "fuse_cross_entropy": True, "fuse_linear_cross_entropy": False, "fuse_norm": True,
        "head_dim": 8, "hidden_act": "sqrelu", "hidden_ratio": 4.0, "hidden_size": D, "initializer_range": 0.02,
        "intermediate_size": MLP, "max_position_embeddings": 2048, "model_type": "rwkv7", "norm_bias": True,
        "norm_eps": 1e-05, "norm_first": True, "num_heads": 4, "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.48.2",
        "use_cache": True, "use_l2warp": False, "value_dim": [D] * LAYERS, "vocab_size": VOCABULARY,
    } | RANKS | changes  # fmt: skip


def fla_shapes(config):
    """Names and shapes of the checkpoint's tensors."""
    heads = config["num_heads"] or D // config["head_dim"]
    values, mlp = (config["value_dim"] or [D])[0], config["intermediate_size"] or 128
    shapes = {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,), "model.norm.bias": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, D)
    low_ranks = {"w": (D, "decay"), "a": (D, "a"), "v": (values, "v"), "g": (values, "gate")}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("attn_norm", "ffn_norm", *(["pre_norm"] if i == 0 and config["norm_first"] else [])):
            shapes |= {f"{layer}.{norm}.{name}": (D,) for name in ("weight", "bias")}
        attention = {f"x_{letter}": (1, 1, D) for letter in "rwkvag"}
        attention |= {"k_k": (D,), "k_a": (D,), "r_k": (heads, D // heads)}
        attention |= {f"{letter}_proj.weight": (D, D) for letter in "rk"}
        attention |= {"v_proj.weight": (values, D), "o_proj.weight": (D, values)}
        attention |= {"g_norm.weight": (values,), "g_norm.bias": (values,)}
        for letter, (size, name) in low_ranks.items():
            if letter == "v" and i == 0:
                continue
            rank = config[f"{name}_low_rank_dim"]
            attention |= {f"{letter}_lora.lora.0.weight": (rank, D), f"{letter}_lora.lora.2.weight": (size, rank)}
            if letter != "g":
                attention[f"{letter}_lora.lora.2.bias"] = (size,)
        shapes |= {f"{layer}.attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.ffn.x_k": (D,), f"{layer}.ffn.key.weight": (mlp, D), f"{layer}.ffn.value.weight": (D, mlp)}
    if not config["norm_bias"]:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("norm.bias") or "g_norm" in name}
    return shapes


def write_fla(folder, **changes):
    config = fla_config(**changes)
    return config, write_folder(folder, config, fla_shapes(config))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_fla_checkpoint_is_its_definition(name, tmp_path):
    config, tensors = write_fla(tmp_path, **CONFIGURATIONS[name])
    model = statex.load(tmp_path).eval()
    loaded = model.state_dict()
    assert set(loaded) == set(tensors) | {"lm_head.weight"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    heads = config["num_heads"] or 4
    state = heads, D // heads, (config["value_dim"] or [D])[0] // heads
    ids = tokens(batch=2, length=70)  # more than a chunk
    config["head_dim"] = D // heads
    wanted = torch.stack([rwkv7_logits(tensors, config, row, [state] * LAYERS) for row in ids])
    assert distance(logits(model, ids), wanted) < 1e-5
    assert statex.inspect(tmp_path).state.total_elements == LAYERS * state[0] * state[1] * state[2]


def test_an_fla_checkpoint_is_expanded_and_saved_in_our_format(tmp_path):
    write_fla(tmp_path / "fla")
    model = statex.load(tmp_path / "fla").eval()
    before = logits(model, tokens())
    statex.expand(model, num_layers=1, init="preserve")
    assert distance(logits(model, tokens()), before) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "statex_rwkv7"
    assert torch.equal(logits(statex.load(tmp_path / "ours").eval(), tokens()), logits(model, tokens()))
    with pytest.raises(statex.UserError, match="is not a GLA"):
        statex.export_fla(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn": {"layers": [1], "num_heads": 4}}, "softmax attention"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 12}, "head_dim"),
        ({"num_heads": 3}, "num_heads"),
        ({"value_dim": [32, 32, 64]}, "value_dim"),
        ({"value_dim": [32]}, "value_dim"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim"),
        ({"a_low_rank_dim": 4}, r"a_lora\.lora\.0\.weight has shape \[5, 32\]"),
        ({"model_type": ["rwkv7"]}, "model_type"),
    ],
)
def test_what_cannot_be_loaded_says_why(changes, match, tmp_path):
    write_fla(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fla_config(**changes)))
    with pytest.raises(statex.UserError, match=match):
        statex.load(tmp_path)
