"""A step whose loss or gradients are not finite, or whose loss spikes, changes no weight: training skips or stops."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from statex.data.mixture import TrainingBatches
from statex.training.bad_steps import SETTLED
from statex.training.trainer import StatexTrainer, train

BAD = 2


@pytest.fixture
def unscored(monkeypatch):
    """unscored(2, 3): batches of these steps have nothing to be scored, so that their mean loss is 0 / 0."""

    def spoil(*steps: int) -> None:
        original = TrainingBatches.micro_batch

        def micro_batch(self, step, m):
            batch = original(self, step, m)
            return batch | {"labels": torch.full_like(batch["labels"], -100)} if step in steps else batch

        monkeypatch.setattr(TrainingBatches, "micro_batch", micro_batch)

    return spoil


@pytest.fixture
def weights_by_step(monkeypatch):
    """The weights after each step of a training."""
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(torch.cat([tensor.detach().flatten().clone() for tensor in model.parameters()]))

    original = StatexTrainer.__init__

    def with_record(self, **kwargs):
        original(self, **kwargs)
        self.add_callback(Record())

    monkeypatch.setattr(StatexTrainer, "__init__", with_record)
    return seen


def test_a_loss_that_is_not_finite_stops_training(make, settings, data, tokenizer, tmp_path, unscored):
    unscored(BAD)
    batch = r"\(batch: sequences 8 to 11 of the text\)"
    with pytest.raises(FloatingPointError, match=rf"loss is nan .* at step 3 {batch}; set training.bad_steps = .skip"):
        train(make("mamba2"), tokenizer, data, settings(save_every=1, weights={"text": 1}), tmp_path)
    assert not (tmp_path / "trained").exists()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"checkpoint-2"}
    assert not (tmp_path / "checkpoints" / "checkpoint-3").exists()


def test_weights_that_are_not_finite_stop_training(make, settings, data, tokenizer, tmp_path):
    model = make("mamba2")
    model.get_output_embeddings().weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 1 .* lower training.learning_rate"):
        train(model, tokenizer, data, settings(), tmp_path)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_skipped_step_changes_nothing_and_is_counted(
    make, settings, data, tokenizer, tmp_path, unscored, weights_by_step, optim, caplog
):
    unscored(BAD)
    training = settings(bad_steps="skip", trainer={"optim": optim}, sequences_per_device=2)
    summary = train(make("statex_gla"), tokenizer, data, training, tmp_path)
    assert torch.equal(weights_by_step[BAD], weights_by_step[BAD - 1])
    assert not torch.equal(weights_by_step[BAD + 1], weights_by_step[BAD])
    assert summary.skipped_steps == 1
    assert math.isfinite(summary.final_loss)
    assert "at step 3 (batch: " in caplog.text
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "trained" / "model.safetensors").values())


def test_a_gradient_that_is_not_finite_is_bad_too(make, settings, data, tokenizer, tmp_path):
    model, calls = make("mamba2"), []

    def spoil(gradient):
        calls.append(None)
        return gradient * float("inf") if len(calls) == BAD + 1 else None

    next(model.parameters()).register_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"the loss is \d.* norm of the gradients (nan|inf) at step 3"):
        train(model, tokenizer, data, settings(), tmp_path)


def test_too_many_in_a_row_stop_training(make, settings, data, tokenizer, tmp_path, unscored):
    unscored(1, 2, 3)
    training = settings(steps=6, bad_steps="skip", most_bad_steps=2)
    with pytest.raises(FloatingPointError, match=r"at step 4 .*: more than training.most_bad_steps = 2 in a row"):
        train(make("mamba2"), tokenizer, data, training, tmp_path / "two")
    allowed = training.model_copy(update={"most_bad_steps": 3})
    assert train(make("mamba2"), tokenizer, data, allowed, tmp_path / "three").skipped_steps == 3


def test_a_loss_that_leaps_is_skipped_and_named(make, settings, data, tokenizer, tmp_path, monkeypatch, caplog):
    original, leap, never = TrainingBatches.micro_batch, SETTLED + 4, len(tokenizer) - 1

    def micro_batch(self, step, m):
        batch = original(self, step, m)
        return batch | {"labels": torch.full_like(batch["labels"], never)} if step == leap else batch

    monkeypatch.setattr(TrainingBatches, "micro_batch", micro_batch)
    training = settings(steps=leap + 2, weights={"text": 1}, spike=0.25, bad_steps="skip")
    assert train(make("mamba2"), tokenizer, data, training, tmp_path).skipped_steps == 1
    assert f"at step {leap + 1}, where training.spike allows 0.25 above the recent" in caplog.text


def test_what_was_skipped_is_known_after_a_resume(make, settings, data, tokenizer, tmp_path, unscored):
    """And a run that stopped resumes where steps are now skipped."""
    unscored(0, BAD, 5)

    def stop(done: int, total: int) -> None:
        if done == BAD + 2:
            raise KeyboardInterrupt

    training = settings(steps=6, bad_steps="skip", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(make("mamba2"), tokenizer, data, training, tmp_path, progress=stop)
    kept = json.loads((tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["BadSteps"]["attributes"]["skipped"] == 2
    assert train(make("mamba2"), tokenizer, data, training, tmp_path).skipped_steps == 3
