"""What a trained folder says of itself: as its source said, and in its dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import statex
from statex.checkpoint import base_name, save_with_companions, stored_dtype
from statex.recipe import parse_recipe
from statex.run import run_recipe
from statex.training.trainer import train
from tiny_recipe import EVALUATION, TRAINING, data_values, write_text


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_is_saved_in_the_dtype_of_its_source_and_configured_as_before(
    make, family, settings, data, tokenizer, tmp_path, use_cache
):
    model = make(family, use_cache=use_cache)
    statex.expand(model, layers=[0], factor=2)
    train(
        model, tokenizer, data, settings(steps=1, warmup_steps=0), tmp_path, base="lab/model", dtype=torch.bfloat16
    )  # fmt: skip
    folder = tmp_path / "trained"
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["use_cache"]) == ("bfloat16", use_cache)
    assert config["expansion"]["kind"] == "expand"
    saved = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in saved, "tied weights are stored once"
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in saved.items())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.dtype, type(loaded)) == (torch.bfloat16, type(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "what was trained is left alone"
    card = (folder / "README.md").read_text()
    assert "base_model: lab/model" in card
    assert "| learning rate | 0.01 |" in card
    assert "not been trained" not in card


def test_a_model_from_scratch_stays_in_fp32_and_its_card_says_so(make, settings, data, tokenizer, tmp_path):
    train(make("mamba2"), tokenizer, data, settings(steps=1, warmup_steps=0), tmp_path)
    folder = tmp_path / "trained"
    assert (json.loads((folder / "config.json").read_text())["dtype"], stored_dtype(folder)) == (
        "float32", torch.float32,
    )  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "a model made from scratch" in card
    assert "base_model" not in card


def in_the_hub_s_cache(tmp_path, commit="0" * 40):
    return tmp_path / "hub" / "models--state-spaces--mamba2-2.7b" / "snapshots" / commit


def test_a_checkpoint_of_the_hub_is_called_by_its_name(make, tmp_path):
    source = in_the_hub_s_cache(tmp_path)
    model = make("mamba2").to(torch.bfloat16)
    model.save_pretrained(source)
    assert base_name(source) == base_name("state-spaces/mamba2-2.7b") == "state-spaces/mamba2-2.7b"
    assert stored_dtype(source) == torch.bfloat16
    statex.expand(model, layers=[0])
    save_with_companions(model, source, tmp_path / "run" / "expanded")
    card = (tmp_path / "run" / "expanded" / "README.md").read_text()
    assert "base_model: state-spaces/mamba2-2.7b" in card
    assert "0000000" not in card
    assert base_name(tmp_path / "run" / "expanded") == "run"


def test_arms_of_a_checkpoint_in_bf16(make, tokenizer, tmp_path):
    source = in_the_hub_s_cache(tmp_path)
    make("mamba2").to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    values = {
        "name": "run", "output": str(tmp_path), "models": {"mamba2": {"checkpoint": str(source)}},
        "arms": {"lpt": {"kind": "lpt"}, "reinit": {"kind": "statex", "expansion": {"every": 1}}},
        "training": TRAINING | {"steps": 1, "warmup_steps": 0}, "data": data_values(write_text(tmp_path / "text")),
        "evaluation": EVALUATION,
    }  # fmt: skip
    run = run_recipe(parse_recipe(values), evaluation=False)
    for arm in ("lpt", "reinit"):
        folder = run / "mamba2" / f"{arm}-seed0" / "trained"
        assert stored_dtype(folder) == torch.bfloat16
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
        assert "base_model: state-spaces/mamba2-2.7b" in (folder / "README.md").read_text()
