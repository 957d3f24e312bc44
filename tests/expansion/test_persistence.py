"""Behaviour matrix, third part: an expanded model describes itself, saved and loaded in every way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import statex
from common import (
    EXPANDED,
    HYBRID_CASES,
    SPREAD,
    Case,
    base_type,
    logits,
    make_gla,
    make_mamba2,
    mixer,
    recurrent_layers,
    tokens,
    with_eager_experts,
)
from statex.checkpoint import inspect
from statex.expansion.edits import ExpansionPlan
from statex.expansion.stored import stored_plan

FEW = [
    Case("gla", "everything", "inherit"),
    Case("gla", "conv", "preserve", factor=2, rank=3),
    Case("mamba2", "2-groups", "preserve", factor=3),
    Case("mamba2", "rescaled", "reinit"),
    Case("mamba2", "tied", "inherit"),
    Case("rwkv7", "plain", "preserve", factor=3),
    Case("rwkv7", "tied", "preserve"),
    Case("xlstm", "tied", "preserve"),
    *(case for case in HYBRID_CASES if case.init == "preserve"),
]
few = pytest.mark.parametrize("case", FEW, ids=str)


def assert_same_model(loaded, model):
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    wanted = dict(model.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(wanted)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_a_loaded_model_is_bitwise_the_saved_one(case, tmp_path):
    model = case.expanded()
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model)
    assert_same_model(statex.load(tmp_path).eval(), model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert stored_plan(config) == stored_plan(model.config)
    assert statex.state_report(config).to_dict() == statex.state_report(model).to_dict()
    assert inspect(tmp_path).state.to_dict() == statex.state_report(model).to_dict()
    buffers = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
    assert inspect(tmp_path).num_parameters == model.num_parameters() + sum(buffer.numel() for buffer in buffers)


@few
def test_saving_twice_gives_the_same_folder(case, tmp_path):
    model = case.expanded()
    model.save_pretrained(tmp_path / "first")
    loaded = statex.load(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_statex.py",
    ]  # fmt: skip
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@few
def test_a_loaded_model_trains_and_generates_on(case, tmp_path):
    model = case.expanded()
    model.save_pretrained(tmp_path)
    loaded = with_eager_experts(AutoModelForCausalLM.from_pretrained(tmp_path))
    ids = tokens(length=7)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    for each in (model, loaded):
        each.train()
        each(ids, labels=ids).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(p.grad, q.grad), name


@few
def test_dtype_survives(case, tmp_path):
    model = case.expanded().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded, again = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), statex.load(tmp_path).eval()
    for each in (again, loaded):  # transformers keeps routers of experts in fp32
        assert {p.dtype for name, p in each.named_parameters() if ".gate." not in name} == {torch.bfloat16}
    assert torch.equal(logits(loaded, tokens()), logits(again, tokens()))
    if not hasattr(model.base_model, "rotary_emb"):  # whose frequencies a loaded model has in fp32
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert {p.dtype for p in statex.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert inspect(tmp_path).dtypes == ["BF16"]


@few
def test_the_configuration_survives(case, tmp_path):
    model = case.expanded()
    model.save_pretrained(tmp_path)
    for config in (statex.load(tmp_path).config, AutoModelForCausalLM.from_pretrained(tmp_path).config):
        ours, theirs = model.config.to_dict(), config.to_dict()
        ignored = ("_name_or_path", "architectures", "dtype")
        assert {k: v for k, v in ours.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }


@few
def test_a_model_made_from_the_configuration_alone(case):
    """Fresh weights, in the expanded shapes, from the model's own initialisation."""
    model = case.expanded()
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in fresh.named_parameters()} == shapes
    assert logits(fresh, tokens()).isfinite().all()
    for name, parameter in mixer(fresh).named_parameters():
        other = dict(mixer(fresh, recurrent_layers(fresh)[-1]).named_parameters()).get(name)
        if parameter.ndim > 1 and other is not None and other.std() > 1e-6:  # RWKV-7 begins with some constant ones
            assert 0.5 < parameter.std() / other.std() < 2, name
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_expansion_on_the_meta_device_gives_the_same_sizes(case):
    with torch.device("meta"):
        empty = case.model()
    model = case.model()
    assert statex.plan_expansion(model.config, case.expansion) == statex.plan_expansion(model, case.expansion)
    assert case.expand(empty) == case.expand(model)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert type(empty) is type(model)
    assert statex.state_report(empty).to_dict() == statex.state_report(model).to_dict()


def test_several_layers_of_a_deeper_model(tmp_path):
    for make in (make_gla, make_mamba2):
        model = make(num_hidden_layers=5)
        plan = statex.expand(model, every=2, factor=2, init="inherit")
        assert [layer.index for layer in plan.layers] == [0, 2, 4]
        report = statex.state_report(model)
        assert [layer.elements // layer.elements_before for layer in report.layers] == [2, 1, 2, 1, 2]
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").exists()
        assert_same_model(AutoModelForCausalLM.from_pretrained(folder).eval(), model)
        assert_same_model(statex.load(folder).eval(), model)


def test_the_plan_in_config_json_is_the_plan(tmp_path):
    model = make_gla()
    plan = statex.expand(model, layers=[EXPANDED], factor=2, init="preserve", rank=2, seed=5)
    model.save_pretrained(tmp_path)
    (stored,) = json.loads((tmp_path / "config.json").read_text())["expansion"]
    assert ExpansionPlan.from_dict(stored) == plan
    assert (plan.kind, plan.init, plan.factor, plan.rank, plan.seed) == ("expand", "preserve", 2, 2, 5)
    in_file = load_file(tmp_path / "model.safetensors")
    for layer in plan.layers:
        for edit in layer.tensors:
            assert list(in_file[edit.name].shape) == edit.after


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_the_control_is_reinitialised_and_not_enlarged(make, tmp_path):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = statex.state_report(model).total_elements
    plan = statex.reinitialize(model, [EXPANDED], seed=3)
    report = statex.state_report(model)
    assert report.total_elements == report.total_elements_before == state
    assert (plan.kind, plan.factor, [layer.index for layer in plan.layers]) == ("reinitialize", 1, [EXPANDED])
    after = dict(model.named_parameters())
    assert {name: p.shape for name, p in after.items()} == {name: p.shape for name, p in before.items()}
    assert {name for name in after if not torch.equal(after[name], before[name])} == plan.fresh_tensors
    kept = [edit.name.rsplit(".", 1)[-1] for edit in plan.layers[0].tensors if not edit.is_fresh]
    assert kept == (["dt_bias", "A_log", "D"] if make is make_mamba2 else [])

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["expansion"][0]["kind"] == "reinitialize"
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), statex.load(tmp_path)):
        assert stored_plan(loaded.config).steps == [plan]
        with statex.statex_ops():
            assert_same_model(loaded.eval(), model)


def test_the_control_draws_what_an_expansion_draws():
    """GLA's merged mixer has the shapes of the old one: control and expansion differ in nothing but the state."""
    expanded, control = make_gla(num_heads=4), make_gla(num_heads=4)
    statex.expand(expanded, layers=[EXPANDED], seed=7)
    statex.reinitialize(control, [EXPANDED], seed=7)
    for name, parameter in mixer(control).named_parameters():
        if "norm" not in name:
            assert torch.equal(parameter, dict(mixer(expanded).named_parameters())[name]), name


LOAD_WITHOUT_IMPORT = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    assert "statex" not in sys.modules or folder != sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    wanted = load_file(folder + "/wanted.safetensors")
    logits = model(wanted["ids"], use_cache=False).logits
    assert torch.equal(logits, wanted["logits"]), folder
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).expansion is not None
    assert type(model).__module__.startswith("statex."), type(model)
    model.save_pretrained(folder + "-again")
print("equal")
"""


def test_loading_with_trust_remote_code_needs_no_import(tmp_path):
    from safetensors.torch import save_file

    folders = []
    for case in (FEW[0], FEW[2]):
        model = case.expanded()
        folder = tmp_path / base_type(model)
        model.save_pretrained(folder)
        save_file({"ids": tokens(), "logits": logits(model, tokens())}, folder / "wanted.safetensors")
        folders.append(str(folder))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOAD_WITHOUT_IMPORT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
    for folder in map(Path, folders):  # saved again there, it is the same: no sources of ours are copied
        again = folder.with_name(f"{folder.name}-again")
        assert {path.name for path in again.iterdir()} | {"wanted.safetensors"} == {
            path.name for path in folder.iterdir()
        }
        assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
