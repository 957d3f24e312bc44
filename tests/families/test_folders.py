"""A model folder of each family: described, expanded on the command line, read again; and folders of other models."""

import json
import re
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from typer.testing import CliRunner

import delta_models
import statex
from common import MAKERS, logits, make_hybrid, recurrent_layers, tokens
from statex.cli import app
from statex.evaluation.reader import Reader
from statex.expansion.plan import plan_expansion
from statex.families import ALL_FAMILIES, FAMILIES, NOT_EXPANDABLE, family_of
from statex.families.document import families_page
from test_readme import ROOT

LINEAR, FULL = "linear_attention", "full_attention"
FIVE_LAYERS = [LINEAR, FULL, LINEAR, LINEAR, FULL]


@pytest.fixture
def call(monkeypatch):
    """call("inspect", "x"): what a command, which must succeed, prints."""

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


@pytest.mark.parametrize("family", MAKERS)
def test_a_folder_of_each(family, tmp_path, call):
    maker, configurations = MAKERS[family]
    model = maker(**list(configurations.values())[-1])
    model.save_pretrained(tmp_path / "model")
    found = json.loads(call("inspect", tmp_path / "model", "--json"))
    possible = {each["init"]: each["problem"] for each in found["possible"]}
    init = "inherit" if family == "falcon_mamba" else "preserve"
    assert possible[init] is None
    assert (possible["preserve"] is None) == (family != "falcon_mamba")
    assert [layer["index"] for layer in found["state"]["layers"]] == recurrent_layers(model)

    options = ("--every", 2, "--factor", 2, "--init", init)
    call("expand", tmp_path / "model", tmp_path / "out", *options)
    plain, expanded = (statex.load(tmp_path / name).eval() for name in ("model", "out"))
    layers = [change.index for change in statex.expansion.stored.stored_plan(expanded.config).layers]
    assert layers == recurrent_layers(model)[::2]
    ids = tokens(length=41)
    with statex.statex_ops():
        wanted = logits(plain, ids)
        torch.testing.assert_close(wanted, logits(model, ids))
    if init == "preserve":
        torch.testing.assert_close(logits(expanded, ids), wanted, rtol=1e-4, atol=1e-4)

    nll = Reader(expanded, piece=16).next_token_nll(ids)
    logs = logits(expanded, ids).log_softmax(-1)[:, :-1]
    torch.testing.assert_close(nll, -logs.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*NOT_EXPANDABLE, "llama"])
def test_what_cannot_be_expanded_says_why(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    reason = NOT_EXPANDABLE.get(family, "attention alone")
    attempts = [lambda: statex.inspect(tmp_path), lambda: statex.load(tmp_path)]
    if family in CONFIG_MAPPING:  # older transformers have no lfm3
        attempts.append(lambda: plan_expansion(AutoConfig.for_model(family), statex.ExpansionConfig()))
    for refused in attempts:
        with pytest.raises(statex.UserError) as caught:
            refused()
        assert f"model_type = '{family}': is not a family that statex can expand" in str(caught.value)
        assert reason in str(caught.value)


def test_every_counts_recurrent_layers():
    kinds = ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"] * 4
    plan = plan_expansion(make_hybrid("nemotron_h", layers_block_type=kinds).config, statex.ExpansionConfig(every=3))
    assert [layer.index for layer in plan.layers] == [0, 8, 15]


def test_a_norm_that_feeds_attention_too_is_not_reset():
    model = make_hybrid("falcon_h1")
    plan = statex.expand(model, layers=[0])
    assert not [name for name in plan.fresh_tensors if "layernorm" in name]
    assert family_of(model.config).norm_name(model.config, 0) is None


def test_the_page_of_families_is_not_stale():
    page = ROOT / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == families_page()
    links = re.findall(r"\]\(([^)]+)\)", families_page())
    assert links
    assert all((page.parent / link).exists() for link in links)


def test_a_nemotron_h_of_nvidia_s_form_is_described(tmp_path):
    """Layers by a pattern, earlier names of fields, heads for the prediction of several tokens that are left out."""
    model = make_hybrid("nemotron_h", layers_block_type=["linear_attention", "moe", "full_attention"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layers_block_type"]
    config |= {"hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "mamba_n_groups": config.pop("n_groups")}
    config |= {"mtp_hybrid_override_pattern": "*E"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("backbone.layers.1.mixer.experts.0.") for name in tensors)
    tensors["mtp.layers.0.norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert [layer.index for layer in statex.inspect(tmp_path).state.layers] == [0]
    loaded = statex.load(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hybrid_override_pattern": "MMM*"}))
    with pytest.raises(statex.UserError, match=r"num_hidden_layers = 4: the weights have 3 layers"):
        statex.inspect(tmp_path)


@pytest.mark.parametrize("family", delta_models.MODELS)
def test_a_folder_of_each_with_the_gated_delta_rule(family, tmp_path, call, monkeypatch):
    maker = partial(delta_models.make_delta, family), {"": {"num_hidden_layers": 5, "layer_types": FIVE_LAYERS}}
    monkeypatch.setitem(MAKERS, family, maker)
    test_a_folder_of_each(family, tmp_path, call)


def test_a_folder_of_kimi_linear(tmp_path, call):
    delta_models.make_delta("kimi_linear").save_pretrained(tmp_path / "model")
    found = json.loads(call("inspect", tmp_path / "model", "--json"))
    assert [each["init"] for each in found["possible"] if each["problem"] is None] == ["reinit"]
    call("expand", tmp_path / "model", tmp_path / "out", "--layers", 1, "--factor", 2)
    expanded = statex.load(tmp_path / "out").eval()
    ids = tokens(length=41)
    assert Reader(expanded, piece=16).next_token_nll(ids).isfinite().all()
    assert statex.state_report(expanded).layers[1].key_dim == 16


def test_a_kimi_linear_of_moonshot_s_form_is_described(tmp_path, call):
    """Sizes and kinds of layers, counted from 1, in an object of their own."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    model = delta_models.make_delta("kimi_linear", layer_types=kinds)
    model.save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    inner = {"kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": values.pop("linear_num_heads")}
    inner |= {"head_dim": values.pop("linear_head_dim"), "short_conv_kernel_size": values.pop("linear_conv_kernel_dim")}
    del values["layer_types"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | {"linear_attn_config": inner}))
    assert [layer.index for layer in statex.inspect(tmp_path / "model").state.layers] == [0, 2]
    torch.testing.assert_close(logits(statex.load(tmp_path / "model").eval(), tokens()), logits(model, tokens()))
    call("expand", tmp_path / "model", tmp_path / "out", "--layers", 2, "--factor", 2)
    assert statex.state_report(statex.load(tmp_path / "out")).layers[1].key_dim == 16


def test_the_language_model_of_a_qwen3_5_is_taken(tmp_path, call):
    """The hub's checkpoints of Qwen3.5 read images, too; their weights have other names, saved again as well."""
    text = delta_models.make_delta("qwen3_5_text", layer_types=[LINEAR, FULL], num_hidden_layers=2)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision))
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    ids = tokens(length=21)
    for name in ("whole", "again"):
        found = statex.inspect(tmp_path / name)
        assert found.model_type == "qwen3_5_text"
        assert found.num_parameters == text.num_parameters()
        torch.testing.assert_close(logits(statex.load(tmp_path / name).eval(), ids), logits(text, ids))
        call("expand", tmp_path / name, tmp_path / f"{name}-out", "--every", 1, "--init", "preserve")
        expanded = statex.load(tmp_path / f"{name}-out").eval()
        torch.testing.assert_close(logits(expanded, ids), logits(text, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(statex.UserError, match="its language model is of the family qwen3_5_text"):
        plan_expansion(whole.config, statex.ExpansionConfig())
    path = tmp_path / "whole" / "config.json"
    for damage in (None, 3):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": damage}))
        with pytest.raises(statex.UserError, match="text_config"):
            statex.inspect(tmp_path / "whole")


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_s_configuration_says_whether_a_qwen3_5_is_tied(tied, tmp_path):
    sizes = {"layer_types": [LINEAR], "num_hidden_layers": 1}
    text = delta_models.make_delta("qwen3_5_text", **sizes, tie_word_embeddings=tied)
    text.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    inner = json.loads(path.read_text()) | {"tie_word_embeddings": not tied}
    outer = {"model_type": "qwen3_5", "text_config": inner, "tie_word_embeddings": tied}
    path.write_text(json.dumps(outer))
    loaded = statex.load(tmp_path).eval()
    assert loaded.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(loaded, tokens()), logits(text, tokens()))
    path.write_text(json.dumps(outer | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(statex.UserError, match=r"quantization_config = .* is not supported"):
        statex.inspect(tmp_path)


def test_a_family_that_the_installed_transformers_lacks_says_so(tmp_path, monkeypatch):
    monkeypatch.delitem(FAMILIES, "minimax")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax"}))
    for refused in (statex.inspect, statex.load):
        with pytest.raises(statex.UserError, match=r"'minimax': is not in transformers .*; install a newer"):
            refused(tmp_path)


@pytest.mark.skipif("gsa" in FAMILIES, reason="flash-linear-attention is installed")
def test_a_folder_of_a_library_that_is_not_installed(tmp_path):
    for model_type in ("gsa", "statex_fla_gsa"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        wanted = f"'{model_type}': is flash-linear-attention's, which is not installed; install"
        for refused in (statex.inspect, statex.load):
            with pytest.raises(statex.UserError, match=wanted):
                refused(tmp_path)
    with pytest.raises(statex.UserError, match="which is not installed"):
        from statex.models.factory import StatexGSAConfig  # noqa: F401 (as the shim of such a folder does)


@pytest.mark.parametrize("holds_models", [False, True])
def test_fla_s_kernels_alone_have_no_models(holds_models, tmp_path, monkeypatch):
    """fla-core is a package of the same name."""
    (tmp_path / "fla" / ("models" if holds_models else "ops")).mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    assert ALL_FAMILIES["gsa"].is_available is holds_models


@pytest.mark.skipif("bailing_hybrid" not in FAMILIES, reason="older transformers have none")
@pytest.mark.parametrize(("num_layers", "is_whole"), [(1, True), (2, False)])
def test_layers_that_predict_further_tokens_are_left_out(num_layers, is_whole, tmp_path):
    """Ling's checkpoints have them behind the others; transformers does not load them."""
    model = delta_models.make_delta("bailing_hybrid")
    model.save_pretrained(tmp_path)
    file, first = tmp_path / "model.safetensors", model.config.num_hidden_layers
    further = {f"model.layers.{first + place}.enorm.weight": torch.ones(8) for place in range(num_layers)}
    save_file(load_file(file) | further, file, metadata={"format": "pt"})
    if is_whole:
        assert torch.equal(logits(statex.load(tmp_path).eval(), tokens()), logits(model.eval(), tokens()))
    else:
        with pytest.raises(statex.UserError, match="the weights have 5 layers"):
            statex.load(tmp_path)
