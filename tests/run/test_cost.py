"""A dry run: what a recipe's training takes, estimated before anything is started."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from statex.benchmarking.model import gla_1300m, mamba2_1300m
from statex.cli import app
from statex.errors import UserError
from statex.expansion.config import PRESETS
from statex.expansion.plan import plan_expansion
from statex.models.registration import register_families
from statex.recipe import Training, parse_recipe
from statex.run.cost import MFU, PRODUCT_PER_SECOND, costs
from statex.run.preflight import check_recipe
from statex.run.selection import Selection
from statex.training.memory import peak_memory_of, size_of
from tiny_recipe import CONFIGS, TRAINING, recipe_values, write_recipe, write_text


@pytest.fixture
def values(tmp_path):
    return recipe_values(write_text(tmp_path / "text"), tmp_path / "runs", list(CONFIGS)) | {"seeds": [0, 1]}


def test_each_stage_is_listed_and_nothing_written(values, tmp_path):
    recipe = parse_recipe(values)
    found = costs(recipe)
    arms = [arm for arm in recipe.arms if recipe.arms[arm].kind != "base"]
    assert [(each.model, each.arm) for each in found] == [
        (model, arm) for model in ("gla", "mamba2") for arm in (None, *arms)
    ]
    assert not (tmp_path / "runs").exists()
    by_arm = {each.arm: each for each in found if each.model == "gla"}
    assert by_arm["preserve"].state > by_arm["lpt"].state
    assert by_arm["preserve"].parameters > by_arm["lpt"].parameters
    for each in found:
        assert each.tokens == each.steps * TRAINING["tokens_per_step"]
        seconds = each.operations / (MFU * PRODUCT_PER_SECOND)
        assert each.hours == pytest.approx(2 * seconds / 3600)  # of two seeds


def test_a_part_of_it_at_a_known_speed(values):
    part = Selection(models=["mamba2"], arms=["lpt"], seeds=[1])
    _, found = costs(parse_recipe(values), part, tokens_per_second=100.0)
    assert (found.model, found.arm) == ("mamba2", "lpt")
    assert found.hours == pytest.approx(found.tokens / 100 / 3600)


MEASURED = {  # bytes at the peak of a step on H200s, by tokens of a GPU, GPUs and how many of them share a sequence
    ("gla", None): {(65536, 1, 1): 40.1e9},
    ("gla", "paper-gla"): {(65536, 1, 1): 38.6e9, (65536, 2, 1): 43.8e9, (2**18, 1, 1): 104e9, (2**17, 2, 2): 70.2e9},
    ("mamba2", None): {(65536, 1, 1): 50.4e9},
    ("mamba2", "paper-mamba2"): {(65536, 1, 1): 49.4e9, (65536, 2, 1): 58.5e9},
}


@pytest.mark.parametrize(("family", "preset"), MEASURED)
def test_memory_is_predicted_as_it_was_measured(family, preset):
    """Every block computed again; docs/results/scaling.md."""
    network, outputs = models_of_1300m(family)
    size = size_of(network, plan_expansion(network, PRESETS[preset]) if preset else None)
    for (tokens, gpus, shared), measured in MEASURED[family, preset].items():
        training = Training(
            tokens_per_step=tokens * gpus, sequence_length=tokens * shared, sequences_per_device=1,
            sequence_parallel=shared, gradient_checkpointing=True,
        )  # fmt: skip
        predicted = peak_memory_of(size, training, outputs, network.config.vocab_size, gpus)
        assert predicted == pytest.approx(measured, rel=0.1), (tokens, gpus, shared)


def models_of_1300m(family):
    register_families()
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config({"gla": gla_1300m, "mamba2": mamba2_1300m}[family](False))
    return network, sum(module.out_features for module in network.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_what_the_prediction_of_memory_depends_on(family):
    network, outputs = models_of_1300m(family)
    training = Training(tokens_per_step=65536, sequence_length=65536, gradient_checkpointing=True)
    vocabulary = network.config.vocab_size
    predicted = [peak_memory_of(size_of(network), training, outputs, vocabulary, gpus) for gpus in (1, 8)]
    assert predicted[1] - predicted[0] == 4 * size_of(network).weights  # of one sequence, and unsharded
    narrow, size = training.model_copy(update={"residual_precision": "bf16"}), size_of(network)
    of_stream = 2 * 65536 * size.width * size.layers
    assert predicted[0] - peak_memory_of(size, narrow, outputs, vocabulary, 1) == of_stream
    sharded = training.model_copy(update={"trainer": {"fsdp": "full_shard"}})
    assert peak_memory_of(size_of(network), sharded, outputs, vocabulary, 8) < predicted[0] - 10e9
    sliced = training.model_copy(update={"sequence_parallel": 4})
    of_slice = training.model_copy(update={"tokens_per_step": 16384, "sequence_length": 16384})
    wanted = peak_memory_of(size_of(network), of_slice, outputs, vocabulary, 2)
    assert [peak_memory_of(size_of(network), sliced, outputs, vocabulary, gpus) for gpus in (4, 8)] == [wanted] * 2
    cut = training.model_copy(
        update={"sequence_length": 2**20, "tokens_per_step": 2**20, "backpropagation_length": 65536}
    )
    of_segments = peak_memory_of(size_of(network), cut, outputs, vocabulary, 1)
    assert 0 < of_segments - predicted[0] < 1e9  # the states that are carried
    kept = training.model_copy(update={"gradient_checkpointing": False})
    assert peak_memory_of(size_of(network), kept, outputs, vocabulary, 1) > 2 * predicted[0]


def test_sequences_that_gpus_share(values):
    """Told on a machine with fewer processes than the recipe asks for."""
    del values["models"]["mamba2"]
    values["training"] |= {"sequence_parallel": 4, "sequences_per_device": 1}
    values["arms"]["lpt"] = {"kind": "lpt", "training": {"sequence_parallel": 1}}
    by_arm = {each.arm: each for each in costs(parse_recipe(values))}
    assert list(by_arm["lpt"].memory) == [1, 2, 4, 8]
    assert list(by_arm["control"].memory) == [4, 8]
    assert by_arm["control"].memory[4] < by_arm["lpt"].memory[4]
    assert by_arm["control"].operations > by_arm["lpt"].operations
    values["arms"]["control"]["training"] = {"sequence_length": 48, "tokens_per_step": 96, "sequence_parallel": 3}
    with pytest.raises(UserError, match=r"data\.recall\.shapes = 16: does not divide among sequence_parallel = 3"):
        costs(parse_recipe(values))
    values["arms"]["control"]["training"] = {"trainer": {"neftune_noise_alpha": 1.0}}
    with pytest.raises(UserError, match="is noise whose size follows from the length of a sequence"):
        costs(parse_recipe(values))


def test_a_model_that_gpus_share(values, monkeypatch, caplog):
    """Told in one process, with less memory than the recipe needs, and checked like any other recipe."""
    del values["models"]["mamba2"]
    trainer = {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}
    values["training"]["trainer"] = values["models"]["gla"]["pretraining"]["trainer"] = trainer
    monkeypatch.setattr("statex.training.memory.host_memory", lambda: 1)
    recipe = parse_recipe(values)
    found = costs(recipe)
    assert recipe == parse_recipe(values)  # transformers adds its defaults to the table
    assert found[1].memory[8] < found[1].memory[1]
    assert not caplog.records  # of a CPU, where nothing is shared
    with pytest.raises(UserError, match=r"pretraining\.trainer\.fsdp = True: shares a model among several"):
        check_recipe(parse_recipe(values))
    for changes, message in (
        ({"fsdp": 3}, "trainer.fsdp = 3: "),
        ({"fsdp": False}, "fsdp_config = {'reshard_after_forward': False}: is about fsdp, which is off"),
        ({"fsdp_config": {"reshard_after_forward": "evil"}}, "is refused by transformers"),
        ({"adam_epsilon": -1.0}, "cannot train a model (Invalid epsilon value: -1.0)"),
    ):
        values["training"]["trainer"] = trainer | changes
        with pytest.raises(UserError) as caught:
            costs(parse_recipe(values))
        assert message in str(caught.value)


def test_on_the_command_line(values, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", values)
    called = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--dollars", "2", "--json"])
    assert called.exit_code == 0, called.output
    rows = json.loads(called.stdout)
    assert {"model", "arm", "tokens", "operations", "memory", "hours"} <= rows[0].keys()
    values["arms"]["lpt"] |= {"training": {"sequence_parallel": 2}}
    write_recipe(recipe, values)
    shown = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--tokens-per-second", "100", "--dollars", "2"])
    assert "GPU hours for all seeds" in shown.stdout
    assert [row.count(" - ") for row in shown.stdout.splitlines() if " lpt " in row] == [1, 1]  # none on one GPU
    assert "dollars, at 100 tokens/s on one GPU" in shown.stdout
    assert not (tmp_path / "runs").exists()
    alone = CliRunner().invoke(app, ["run", str(recipe), "--dollars", "2"])
    assert "applies to a dry run only" in str(alone.exception)
