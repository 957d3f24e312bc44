"""Training that was stopped goes on as if it had not been: killed at any moment, saves included, with the same data."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statex.data.mixture import TrainingBatches
from statex.errors import UserError
from statex.pipeline import run_recipe
from statex.recipe import load_recipe
from statex.training.trainer import last_checkpoint, step_of, train
from tiny_recipe import EVALUATION, data_values, environment, run_statex, write_recipe


def stopped_at(step: int):
    """A report of progress that stops training as the keyboard does."""

    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_bitwise_equal(ours: Path, theirs: Path) -> None:
    ours_of, theirs_of = weights(ours), weights(theirs)
    assert ours_of.keys() == theirs_of.keys()
    for name in theirs_of:
        assert torch.equal(ours_of[name], theirs_of[name]), name


@pytest.fixture
def recipe_of(make, tokenizer, data, settings, tmp_path):
    """recipe_of(family, name): the path of a recipe that expands a checkpoint and trains it, in a run of that name."""

    def write(family: str, name: str, **changes) -> Path:
        checkpoint = tmp_path / f"checkpoint-{family}"
        if not checkpoint.exists():
            make(family).save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
        values = {
            "name": name, "output": str(tmp_path / "runs"), "models": {"model": {"checkpoint": str(checkpoint)}},
            "arms": {"preserve": {"kind": "statex", "expansion": {"every": 1, "init": "preserve"}}},
            "training": settings(steps=10, sequences_per_device=2, **changes).model_dump(exclude_none=True),
            "data": data_values(data.text.files[0]),
            "evaluation": EVALUATION,
        }  # fmt: skip
        return write_recipe(tmp_path / f"{name}.toml", values)

    return write


def arm(recipe: Path) -> Path:
    return load_recipe(recipe).folder / "model" / "preserve-seed0"


@pytest.mark.slow
def test_killed_at_any_moment(recipe_of, family):
    whole, interrupted = recipe_of(family, "whole"), recipe_of(family, "interrupted")
    run_recipe(load_recipe(whole), evaluation=False)
    script = Path(__file__).with_name("interrupted.py")
    done = subprocess.run(
        [sys.executable, script, interrupted, "0"], capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    kills = [int(number) for number in done.stdout.split()]
    assert sum(kills) >= 3
    assert kills[0] >= 2  # of which so many were about to write
    assert_bitwise_equal(arm(interrupted) / "expanded", arm(whole) / "expanded")
    assert_bitwise_equal(arm(interrupted) / "trained", arm(whole) / "trained")
    assert not (arm(interrupted) / "checkpoints").exists()


@pytest.mark.slow
def test_the_same_command_goes_on(recipe_of):
    whole, interrupted = recipe_of("mamba2", "whole"), recipe_of("mamba2", "interrupted")
    run_recipe(load_recipe(whole), evaluation=False)
    command = [sys.executable, "-m", "statex", "train", str(interrupted)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    while not list(arm(interrupted).glob("checkpoints/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (arm(interrupted) / "trained").exists()
    assert run_statex("train", interrupted).returncode == 0
    assert_bitwise_equal(arm(interrupted) / "trained", arm(whole) / "trained")


def test_the_place_in_the_data_follows_from_the_step(make, tokenizer, data, settings, tmp_path, monkeypatch):
    """A stage that is stopped and goes on sees each batch that one without interruption sees, in the same order."""
    seen: list[tuple] = []
    original = TrainingBatches.__iter__

    def recorded(self):
        for batch in original(self):
            seen.append((batch["input_ids"].sum().item(), tuple(batch["input_ids"].shape)))
            yield batch

    monkeypatch.setattr(TrainingBatches, "__iter__", recorded)
    training = settings(steps=8, sequences_per_device=2)
    train(make("mamba2"), tokenizer, data, training, tmp_path / "whole")
    expected, seen[:] = seen[:], []
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped", progress=stopped_at(5))
    before = len(seen)
    train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped")
    assert len({shape for _, shape in expected}) > 1  # text and recall
    assert seen[:before] == expected[:before]
    assert seen[before:] == expected[2 * 4 :]  # two micro-batches a step, from the checkpoint of step 4 on
    assert_bitwise_equal(tmp_path / "stopped" / "trained", tmp_path / "whole" / "trained")


@pytest.fixture
def stopped(make, tokenizer, data, settings, tmp_path):
    """A stage that was stopped at step 5 of 8 with checkpoints of steps 2 and 4; and how it goes on."""
    training = settings(steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path / "stage", progress=stopped_at(5))
    checkpoints = tmp_path / "stage" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    def go_on(**further):
        return train(make("mamba2"), tokenizer, data, training, tmp_path / "stage", **further)

    return checkpoints, go_on


def test_a_checkpoint_half_written_is_not_seen(stopped):
    checkpoints, go_on = stopped
    half = checkpoints / "unfinished" / "checkpoint-6"
    shutil.copytree(checkpoints / "checkpoint-4", half)
    (half / "optimizer.pt").unlink()
    assert go_on().steps == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_checkpoint_that_is_not_whole_is_refused(stopped, name, damage):
    checkpoints, go_on = stopped
    path = checkpoints / "checkpoint-4" / name
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError) as caught:
        go_on()
    assert f"checkpoint = '{path.parent}': its file {name} is {damage}; remove this checkpoint" in str(caught.value)
    if name == "optimizer.pt":
        shutil.rmtree(path.parent)
        assert go_on().steps == 6


def test_a_checkpoint_without_its_list_is_refused(stopped):
    checkpoints, go_on = stopped
    (checkpoints / "checkpoint-4" / "files.json").unlink()
    with pytest.raises(UserError, match=r"its file files\.json is missing"):
        go_on()


def test_the_list_names_all_files_and_is_about_the_last_checkpoint(stopped):
    checkpoints, _ = stopped
    last = Path(last_checkpoint(checkpoints))
    assert step_of(str(last)) == 4
    names = {path.name for path in last.iterdir()} - {"files.json"}
    assert json.loads((last / "files.json").read_text()).keys() == names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert last_checkpoint(checkpoints / "none") is None


def test_stopped_behind_the_last_step_it_does_not_train_more(make, tokenizer, data, settings, tmp_path, monkeypatch):
    training = settings(min_learning_rate_ratio=1.0)  # a step too many would be a big one
    train(make("mamba2"), tokenizer, data, training, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped", progress=stopped_at(4))
    train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped")
    assert_bitwise_equal(tmp_path / "stopped" / "trained", tmp_path / "whole" / "trained")


def test_stopped_before_its_summary_the_stage_is_finished_again(make, tokenizer, data, settings, tmp_path, monkeypatch):
    training = settings()
    train(make("mamba2"), tokenizer, data, training, tmp_path / "whole")

    def killed(path, text):
        if path.name == "training.json":
            raise KeyboardInterrupt
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr("statex.training.trainer.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "trained").exists()
    summary = train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped")
    assert summary.steps == 2
    assert_bitwise_equal(tmp_path / "stopped" / "trained", tmp_path / "whole" / "trained")


def test_old_checkpoints_go(make, tokenizer, data, settings, tmp_path):
    training = settings(steps=9, save_every=1, keep_checkpoints=3)
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path, progress=stopped_at(8))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
