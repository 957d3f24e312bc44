"""Checkpoints in flash-linear-attention's format, written here from its names and shapes (fla/layers/gla.py)."""

import json
from typing import get_args

import pytest
import torch
from fla_folders import write_folder
from safetensors.torch import load_file, save_file

import statex
from common import distance, logits, make_mamba2, tokens
from naive_models import gla_logits
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.mixer import FEATURE_MAPS

D, VOCABULARY, LAYERS, MLP = 32, 48, 2, 48

CONFIGURATIONS = {
    "1-head": {"num_heads": 1},
    "2-heads": {"num_heads": 2},
    "4-heads": {"num_heads": 4},
    "8-heads": {"num_heads": 8},
    "kv-heads": {"num_heads": 8, "num_kv_heads": 2},
    "conv": {"num_heads": 2, "use_short_conv": True},
    "conv-3-taps": {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "conv_size": 3},
    "tied": {"num_heads": 2, "tie_word_embeddings": True},
    "clamped": {"num_heads": 2, "clamp_min": -0.05},
    "g-norm": {"num_heads": 2, "fuse_norm": False},
    "no-gate": {"num_heads": 2, "use_output_gate": False},
    "wide-keys": {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0},
    "default-mlp": {"num_heads": 2, "intermediate_size": None},
    **{f"feature-map-{name}": {"num_heads": 2, "feature_map": name} for name in ("relu", "silu", "gelu", "sqrelu")},
}


def fla_config(**changes):
    """config.json of FLA's GLAForCausalLM."""
    return {
        "architectures": ["GLAForCausalLM"], "attn": None, "attn_mode": "chunk", "bos_token_id": 1, "clamp_min": None,
        "conv_size": 4, "elementwise_affine": True, "eos_token_id": 2, "expand_k": 0.5, "expand_v": 1,
        "feature_map": None, "fuse_cross_entropy": True, "fuse_linear_cross_entropy": False, "fuse_norm": True,
        "fuse_swiglu": True, "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": D, "initializer_range": 0.006,
        "intermediate_size": MLP, "max_position_embeddings": 2048, "model_type": "gla", "norm_eps": 1e-06,
        "num_heads": 4, "num_hidden_layers": LAYERS, "num_kv_heads": None, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.48.2", "use_cache": True, "use_gk": True, "use_gv": False,
        "use_l2warp": False, "use_output_gate": True, "use_short_conv": False, "vocab_size": VOCABULARY,
    } | changes  # fmt: skip


def fla_shapes(config):
    """Names and shapes of the checkpoint's tensors."""
    groups = config["num_heads"] // (config["num_kv_heads"] or config["num_heads"])
    keys, values = int(D * config["expand_k"]), int(D * config["expand_v"])
    mlp = config["intermediate_size"] or 256
    shapes = {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, D)
    attention = {
        "q_proj.weight": (keys, D), "k_proj.weight": (keys // groups, D), "v_proj.weight": (values // groups, D),
        "gk_proj.0.weight": (16, D), "gk_proj.1.weight": (keys // groups, 16), "gk_proj.1.bias": (keys // groups,),
        "o_proj.weight": (D, values),
    }  # fmt: skip
    if config["use_output_gate"]:
        attention["g_proj.weight"] = (values, D)
    norm = "g_norm_swish_gate" if config["fuse_norm"] and config["use_output_gate"] else "g_norm"
    attention[f"{norm}.weight"] = (values // config["num_heads"],)
    if config["use_short_conv"]:
        for name in "qkv":
            attention[f"{name}_conv1d.weight"] = (attention[f"{name}_proj.weight"][0], 1, config["conv_size"])
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.{norm}.weight": (D,) for norm in ("attn_norm", "mlp_norm")}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (mlp, D) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (D, mlp)
    return shapes


def write_fla(folder, **changes):
    config = fla_config(**changes)
    return config, write_folder(folder, config, fla_shapes(config))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_fla_checkpoint_is_its_definition(name, tmp_path):
    config, tensors = write_fla(tmp_path, **CONFIGURATIONS[name])
    model = statex.load(tmp_path)
    loaded = model.state_dict()
    assert set(loaded) == set(tensors) | {"lm_head.weight"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    H = config["num_heads"]
    state = (H, int(D * config["expand_k"]) // H, int(D * config["expand_v"]) // H)
    ids = tokens(batch=2, length=70)  # more than a chunk
    wanted = torch.stack([gla_logits(tensors, config, row, [state] * LAYERS) for row in ids])
    assert distance(logits(model, ids), wanted) < 1e-5
    torch.testing.assert_close(logits(model, ids).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_export_is_what_was_loaded(name, tmp_path):
    config, tensors = write_fla(tmp_path / "fla", **CONFIGURATIONS[name])
    model = statex.load(tmp_path / "fla")
    statex.export_fla(model, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    exported = json.loads((tmp_path / "back" / "config.json").read_text())
    follows = {"num_kv_heads": config["num_heads"], "intermediate_size": 256}  # what FLA works out itself
    for field, value in config.items():
        if field not in ("torch_dtype", "transformers_version"):
            assert exported[field] == (follows[field] if value is None and field in follows else value), field
    assert not {"expansion", "auto_map", "layer_types"} & exported.keys()
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    again = statex.load(tmp_path / "back")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    _, tensors = write_fla(tmp_path, torch_dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = statex.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert statex.load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_inspect_reads_an_fla_folder(tmp_path):
    write_fla(tmp_path, num_heads=4)
    found = statex.inspect(tmp_path)
    assert found.model_type == "statex_gla"
    assert found.state.total_elements == 2 * 4 * 4 * 8
    assert found.expansion is None


def test_an_fla_checkpoint_is_expanded_and_saved_in_our_format(tmp_path):
    write_fla(tmp_path / "fla", num_heads=8, num_kv_heads=2, use_short_conv=True)
    model = statex.load(tmp_path / "fla")
    statex.expand(model, num_layers=1, init="inherit")
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "statex_gla"
    assert torch.equal(logits(statex.load(tmp_path / "ours"), tokens()), logits(model, tokens()))


def test_an_expanded_model_cannot_be_exported(tmp_path):
    write_fla(tmp_path / "fla", num_heads=4)
    model = statex.load(tmp_path / "fla")
    statex.expand(model, layers=[0])
    with pytest.raises(statex.UserError, match=r"is expanded, which FLA's format cannot express"):
        statex.export_fla(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fla"]


def test_a_reinitialised_model_can_be_exported(tmp_path):
    _, tensors = write_fla(tmp_path / "fla", num_heads=4)
    model = statex.load(tmp_path / "fla")
    statex.reinitialize(model, [0])
    statex.export_fla(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_export_refuses_a_folder_that_exists_and_another_family(tmp_path):
    write_fla(tmp_path / "fla")
    model = statex.load(tmp_path / "fla")
    with pytest.raises(statex.UserError, match=r"OUT = .* exists already"):
        statex.export_fla(model, tmp_path / "fla")
    with pytest.raises(statex.UserError, match="is not a GLA"):
        statex.export_fla(make_mamba2(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fla"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn": {"layers": [1], "num_heads": 4}}, "softmax attention"),
        ({"attnres_block_size": 2}, "attention residuals"),
        ({"feature_map": "cosine"}, "feature_map"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_cannot_be_loaded_says_why(changes, match, tmp_path):
    write_fla(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fla_config(**changes)))
    with pytest.raises(statex.UserError, match=match):
        statex.load(tmp_path)


def test_the_feature_maps_of_the_configuration_exist():
    names, none = get_args(GLAConfig.__annotations__["feature_map"])
    assert none is type(None)
    assert set(get_args(names)) == set(FEATURE_MAPS)
