"""Training that was stopped resumes as if it had not been: killed at any moment, saves included, with the same data."""

import json
import shutil
from pathlib import Path

import interrupted
import pytest
import torch
from safetensors.torch import load_file

from commands import run
from statex.data.mixture import TrainingBatches
from statex.errors import UserError
from statex.recipe import load_recipe
from statex.run import run_recipe
from statex.training.checkpoints import damage_of, last_checkpoint, step_of
from statex.training.trainer import StatexTrainer, train
from tiny_recipe import CONFIGS, EVALUATION, data_values, write_recipe


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


@pytest.mark.slow
def test_killed_at_any_moment(make, tokenizer, data, settings, tmp_path):
    """Training that was killed again and again, and then resumed by the same recipe, ends with the same weights."""
    values = {
        "models": {family: {"checkpoint": str(tmp_path / family)} for family in CONFIGS},
        "output": str(tmp_path / "runs"),
        "arms": {"preserve": {"kind": "statex", "expansion": {"every": 1, "init": "preserve"}}},
        "training": settings(steps=10, sequences_per_device=2).model_dump(exclude_none=True),
        "data": data_values(data.text.files[0]),
        "evaluation": EVALUATION,
    }
    for family in CONFIGS:
        make(family).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    names = ("whole", "interrupted")
    recipes = [write_recipe(tmp_path / f"{name}.toml", values | {"name": name}) for name in names]
    killed = run(interrupted.main, *recipes, 0)
    assert killed.returncode == 0, killed.stderr
    kills = [int(number) for number in killed.stdout.split()]
    assert sum(kills) >= 5
    assert kills[0] >= 2  # of which so many were about to write
    run_recipe(load_recipe(recipes[1]), evaluation=False)
    for family in CONFIGS:
        ours, theirs = (tmp_path / "runs" / name / family / "preserve-seed0" for name in reversed(names))
        assert_bitwise_equal(ours / "expanded", theirs / "expanded")
        assert_bitwise_equal(ours / "trained", theirs / "trained")
        assert {path.name for path in ours.iterdir()} - {"checkpoints"} == {path.name for path in theirs.iterdir()}


def test_workers_that_make_batches_change_nothing(make, tokenizer, data, settings, tmp_path):
    """Stopped and resumed with two of them, training ends as without any and without interruption, to the bit."""
    training = settings(steps=8, sequences_per_device=2)
    train(make("mamba2"), tokenizer, data, training, tmp_path / "whole")
    with_workers = data.model_copy(update={"workers": 2})
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, with_workers, training, tmp_path / "stopped", progress=stopped_at(5))
    train(make("mamba2"), tokenizer, with_workers, training, tmp_path / "stopped")
    assert_bitwise_equal(tmp_path / "stopped" / "trained", tmp_path / "whole" / "trained")


def test_the_place_in_the_data_follows_from_the_step(make, tokenizer, data, settings, tmp_path, monkeypatch):
    """A stage that is stopped and resumed sees each batch that an uninterrupted one sees, in the same order."""
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
    """A stage that was stopped at step 5 of 8 with checkpoints of steps 2 and 4; and a function that resumes it."""
    training = settings(steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path / "stage", progress=stopped_at(5))
    checkpoints = tmp_path / "stage" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    def resume(**further):
        return train(make("mamba2"), tokenizer, data, training, tmp_path / "stage", **further)

    return checkpoints, resume


def test_a_checkpoint_half_written_is_not_seen(stopped):
    checkpoints, resume = stopped
    half = checkpoints / "unfinished" / "checkpoint-6"
    shutil.copytree(checkpoints / "checkpoint-4", half)
    (half / "optimizer.pt").unlink()
    assert resume().steps == 4


DAMAGES = {
    "is missing": lambda path: path.unlink(),
    "is cut off": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "is not what was written": lambda path: flip_a_bit(path),
}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(stopped, caplog, name, damage):
    """Training resumes from the one before, says so, and writes the damaged one again."""
    checkpoints, _ = stopped
    DAMAGES[damage](checkpoints / "checkpoint-4" / name)
    found = last_checkpoint(checkpoints)
    assert found == str(checkpoints / "checkpoint-2")
    reason = f"{checkpoints / 'checkpoint-4'} is damaged (its file {name} {damage}); training resumes from checkpoint-2"
    assert [record.getMessage() for record in caplog.records] == [reason]


@pytest.mark.parametrize("damage", ["zeroed", "listing"])
def test_training_resumes_from_the_one_before_a_damaged_checkpoint(stopped, make, tokenizer, data, settings, damage):
    checkpoints, resume = stopped
    if damage == "zeroed":
        path = checkpoints / "checkpoint-4" / "optimizer.pt"
        path.write_bytes(bytes(path.stat().st_size))
    else:
        (checkpoints / "checkpoint-4" / "files.json").write_text('{"optimizer.pt": ')
    with pytest.raises(KeyboardInterrupt):
        resume(progress=stopped_at(5))
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-4")  # written again
    assert resume().steps == 4
    train(make("mamba2"), tokenizer, data, settings(steps=8), checkpoints.parents[1] / "whole")
    assert_bitwise_equal(checkpoints.parent / "trained", checkpoints.parents[1] / "whole" / "trained")


def test_checkpoints_that_are_all_damaged_are_refused(stopped):
    checkpoints, resume = stopped
    (checkpoints / "checkpoint-4" / "files.json").unlink()
    flip_a_bit(checkpoints / "checkpoint-2" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        resume()
    message = f"checkpoint = '{checkpoints / 'checkpoint-4'}': its file files.json is missing, and no other one"
    assert message in str(caught.value)
    assert f"remove {checkpoints} to train this stage from its beginning" in str(caught.value)


@pytest.mark.parametrize("size", [None, "many", [1], {}])
def test_a_damaged_size_is_a_damaged_listing(tmp_path, size):
    listing = tmp_path / "files.json"
    (tmp_path / "optimizer.pt").write_bytes(b"")
    listing.write_text(json.dumps({"optimizer.pt": {"size": size, "sha256": ""}}))
    assert damage_of(tmp_path) == "its file files.json cannot be read"


def test_a_list_of_sizes_alone_still_serves(stopped):
    """As earlier versions wrote it."""
    checkpoints, _ = stopped
    listing = checkpoints / "checkpoint-4" / "files.json"
    sizes = {name: entry["size"] for name, entry in json.loads(listing.read_text()).items()}
    listing.write_text(json.dumps(sizes))
    assert last_checkpoint(checkpoints) == str(listing.parent)
    (listing.parent / "optimizer.pt").write_bytes(b"")
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    listing.write_text(json.dumps(sizes | {"optimizer.pt": 0}))
    assert last_checkpoint(checkpoints) == str(listing.parent)


def test_the_list_names_all_files_and_is_about_the_last_checkpoint(stopped):
    checkpoints, _ = stopped
    last = Path(last_checkpoint(checkpoints))
    assert step_of(str(last)) == 4
    names = {path.name for path in last.iterdir()} - {"files.json"}
    assert json.loads((last / "files.json").read_text()).keys() == names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert last_checkpoint(checkpoints / "none") is None


def test_stopped_behind_the_last_step_it_does_not_train_more(make, tokenizer, data, settings, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    training = settings(min_learning_rate_ratio=1.0)  # a step too many would be a big one
    train(make("mamba2"), tokenizer, data, training, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(StatexTrainer, "save_trained", stop)
        with pytest.raises(KeyboardInterrupt):
            train(make("mamba2"), tokenizer, data, training, tmp_path / "stopped")
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
        patched.setattr("statex.training.trainer.write_text_atomic", killed)
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
