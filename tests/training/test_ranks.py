"""Processes that train together do what one does."""

import json
import time
from pathlib import Path

import dying
import pytest
import sharded
import torch
from packaging.version import Version
from safetensors.torch import load_file

from commands import run, run_ranks, statex
from statex.data.mixture import TrainingBatches
from statex.data.tokens import prepare_tokens
from statex.errors import UserError
from statex.recipe import load_recipe, parse_recipe
from statex.run import run_recipe
from tiny_recipe import CONFIGS, EVALUATION, HYBRIDS, data_values, write_recipe


@pytest.fixture
def values(make, tokenizer, data, settings, tmp_path) -> dict:
    """A recipe of text and recall steps; in some of the latter, micro-batches have different numbers of tokens."""
    make("statex_gla").save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    section = data_values(data.text.files[0])
    section["recall"]["shapes"] = [[16, 4], [24, 3]]
    return {
        "name": "run", "output": str(tmp_path / "one"), "models": {"gla": {"checkpoint": str(tmp_path / "checkpoint")}},
        "arms": {"inherit": {"kind": "statex", "expansion": {"layers": [1], "init": "inherit"}}},
        "training": settings(steps=8, sequences_per_device=1).model_dump(exclude_none=True),
        "data": section,
        "evaluation": EVALUATION | {"suites": ["mqar"]},
    }  # fmt: skip


@pytest.mark.slow
def test_two_ranks_train_what_one_does(values, tokenizer, tmp_path):
    one = parse_recipe(values)
    read = prepare_tokens(one.data, tokenizer, tmp_path / "tokens", 10**6)
    batches = TrainingBatches(one.data, one.training, tokenizer, tokens=read)
    kinds = [batches.kind_of_step(step) for step in range(one.training.steps)]
    assert {"text", "mqar"} == set(kinds)
    labels = [(batch["labels"] != -100).sum().item() for batch, _ in zip(batches, range(4 * len(kinds)), strict=False)]
    assert any(len(set(labels[4 * step : 4 * step + 4])) > 1 for step in range(len(kinds)))

    run_recipe(one, evaluation=False)
    recipe = write_recipe(tmp_path / "two.toml", values | {"output": str(tmp_path / "two")})
    done = run_ranks(statex, "run", recipe, "--json")
    assert done.returncode == 0, done.stderr
    two = load_recipe(recipe)
    assert json.loads(done.stdout) == {"folder": str(two.folder)}
    assert done.stderr.count("train inherit") <= 2  # shown by one process: as it begins and as it ends
    assert (two.folder / "report.html").exists()

    folders = [folder / "gla" / "inherit-seed0" for folder in (one.folder, two.folder)]
    assert json.loads((folders[1] / "training.json").read_text())["num_processes"] == 2
    assert files(folders[1] / "trained") == files(folders[0] / "trained")
    ours, theirs = (load_file(folder / "trained" / "model.safetensors") for folder in reversed(folders))
    before = load_file(folders[0] / "expanded" / "model.safetensors")
    for name in theirs:
        difference = (ours[name] - theirs[name]).norm()
        assert difference <= 1e-5 * theirs[name].norm(), name
        assert not torch.equal(theirs[name], before[name])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"),
    reason="torch 2.11 cannot read a sharded optimizer of a CPU ('cpu:0') again",
)
@pytest.mark.slow
def test_sharded_ranks_resume_and_train_what_one_process_does(make, tokenizer, data, settings, tmp_path):
    """FSDP2 with a multiplier for fresh tensors and activation checkpointing; both ranks are killed, and one and two
    resume from a checkpoint of one file, four from one in shards; one arm is trained in segments."""
    models = (*CONFIGS, *HYBRIDS)
    values = {
        "models": {family: {"checkpoint": str(tmp_path / family)} for family in models}, "name": "run",
        "arms": {"preserve": {"kind": "statex", "expansion": {"layers": [1], "init": "preserve"}}},
        "data": data_values(data.text.files[0]), "evaluation": EVALUATION,
    }  # fmt: skip
    for family in models:
        make(family).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    section = settings(steps=4, sequences_per_device=1, fresh_learning_rate_multiplier=3.0, gradient_checkpointing=True)
    in_shards = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    segments = values["arms"]["preserve"] | {"models": ["statex_gla"], "training": {"backpropagation_length": 8}}
    all_arms = values["arms"] | {"segments": segments}
    killed_model = {"mamba2": values["models"]["mamba2"]}
    whole, alone, killed, killed_in_shards = (
        write_recipe(
            tmp_path / f"{output}.toml",
            values
            | {"output": str(tmp_path / output), "models": trained}
            | {"arms": all_arms if trained is values["models"] else values["arms"]}
            | {"training": section.model_dump(exclude_none=True) | {"trainer": trainer}},
        )
        for output, trained, trainer in (
            ("whole", values["models"], {"fsdp": "full_shard"}),
            ("alone", values["models"], {}),
            ("killed", killed_model, {"fsdp": True}),
            ("killed_in_shards", killed_model, in_shards),
        )
    )
    done = run(sharded.main, whole, alone, 3, (killed, (1, 2)), (killed_in_shards, (4,)))
    assert done.returncode == 0, done.stderr[-3000:]
    for family, arm in (*((family, "preserve") for family in models), ("statex_gla", "segments")):
        ours, theirs = (tmp_path / name / "run" / family / f"{arm}-seed0" for name in ("whole", "alone"))
        assert json.loads((ours / "training.json").read_text())["num_processes"] == 2
        # AdamW takes whole steps by what rounding leaves of the gradients of vectors that are normalised
        assert_same_model(ours, theirs, 1e-4 if family == "olmo_hybrid" else 1e-5)
    resumed = {folder.name: folder for folder in tmp_path.glob("killed*-by-*")}
    assert len(resumed) == 3
    for name, output in resumed.items():
        ours, theirs = (folder / "run" / "mamba2" / "preserve-seed0" for folder in (output, tmp_path / "alone"))
        summary = json.loads((ours / "training.json").read_text())
        assert summary["num_processes"] == int(name[-1])
        assert summary["steps"] == 2  # after the checkpoint of step 2
        assert_same_model(ours, theirs)
    again, whole = (
        load_file(tmp_path / name / "run/mamba2/preserve-seed0/trained/model.safetensors")
        for name in ("killed-by-2", "whole")
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def assert_same_model(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    assert files(ours / "trained") == files(theirs / "trained")
    weights, expected = (load_file(folder / "trained" / "model.safetensors") for folder in (ours, theirs))
    assert weights.keys() == expected.keys()
    for name in expected:
        assert (weights[name] - expected[name]).norm() <= tolerance * expected[name].norm(), (ours, name)


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_and_one_process_resumes(values, tmp_path):
    values["training"] |= {"steps": 4, "save_every": 1}
    recipe = write_recipe(tmp_path / "dying.toml", values | {"output": str(tmp_path / "dying")})
    begun = time.monotonic()
    died = run_ranks(dying.main, "train", recipe)
    assert died.returncode == 1
    assert dying.MESSAGE in died.stderr
    assert "ChildFailedError" in died.stderr  # whether the agent noticed the killed one first or what ended the other
    assert time.monotonic() - begun < 60  # with what importing and starting takes
    folder = tmp_path / "dying" / "run" / "gla" / "inherit-seed0"
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")]
    assert not (folder / "training.json").exists()
    run_recipe(load_recipe(recipe), evaluation=False)
    assert json.loads((folder / "training.json").read_text())["steps"] == 2


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_processes_of_torchrun_and_workers_exclude_one_another(values, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"workers = 2: does not go with torchrun, .*; start one process, or --set"):
        run_recipe(parse_recipe(values | {"workers": 2}))


def test_a_step_that_does_not_divide_among_the_processes_is_refused(values, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("statex.run.chains.world_size", lambda: 1)
    with pytest.raises(
        UserError, match=r"training.tokens_per_step = 128: its 4 sequences .* among 3 processes; give a"
    ):
        run_recipe(parse_recipe(values))
    assert not (tmp_path / "one").exists()
