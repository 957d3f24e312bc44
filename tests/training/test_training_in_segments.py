"""Truncated back-propagation: sequences are trained on in segments that carry their states."""

import json
from functools import partial
from glob import glob
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainerCallback

from statex.data.mixture import TrainingBatches, segments_of
from statex.data.recall import IGNORED
from statex.data.tokens import prepare_tokens
from statex.errors import UserError
from statex.models.dispatch import statex_ops
from statex.models.expanded import expand
from statex.ops import carried_state
from statex.settings import Data
from statex.training.arguments import training_arguments
from statex.training.blocks import compiles
from statex.training.loss import linear_cross_entropy
from statex.training.slices import check_slices
from statex.training.trainer import StatexTrainer, train
from tiny_recipe import data_values


@pytest.fixture(scope="module")
def short(data, tmp_path_factory) -> Data:
    """Documents of a line each, told apart, and recall data of one segment, of two and of three."""
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    lines = [line for file in glob(data.text.files[0]) for line in Path(file).read_text().splitlines() if line.strip()]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    values = data_values(str(path)) | {"reset_state_at_documents": True}
    values["recall"]["shapes"] = [[8, 2], [16, 4], [24, 3]]
    return Data.model_validate(values)


def expanded(make, family):
    model = make(family)
    expand(model, layers=[1], init="inherit")
    return model


class Watch(TrainerCallback):
    """The gradients of each step, before they are clipped, and the losses."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def watched(model, data, training, tokenizer, folder, tokens) -> Watch:
    watch = Watch()
    trainer = StatexTrainer(
        model=model, args=training_arguments(training, folder, seed=0, quiet=True), output=folder, data=data,
        processing_class=tokenizer, training=training, tokens=tokens, fresh_tensors=set(), callbacks=[watch],
    )  # fmt: skip
    trainer.train_to_the_end()
    return watch


def by_hand(model, batches, length) -> list[dict]:
    """The gradients of a step for each two micro-batches, written out."""
    mixers = [module for name, module in model.named_modules() if name.endswith((".attn", ".mixer"))]
    found, batches = [], list(batches)
    for pair in zip(batches[::2], batches[1::2], strict=True):
        scored = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in pair)
        for batch in pair:
            with statex_ops(), carried_state(mixers) as carried:
                for part in segments_of(batch, length):
                    ids, seq_idx = part["input_ids"], part["seq_idx"]
                    targets = part.get("shift_labels")
                    if targets is None:
                        targets = F.pad(part["labels"][:, 1:], (0, 1), value=IGNORED)
                    with carried.segment(seq_idx):
                        hidden = model.base_model(input_ids=ids, seq_idx=seq_idx, use_cache=False)
                        loss = linear_cross_entropy(hidden.last_hidden_state, model.lm_head.weight, targets)
                        (loss / scored).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    return found


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_are_those_of_whole_sequences_and_gradients_truncated(
    make, family, short, settings, tokenizer, tmp_path, gradient_checkpointing
):
    """At a learning rate that moves nothing, all steps see the same weights."""
    whole = settings(
        steps=6, learning_rate=1e-30, weight_decay=0, sequences_per_device=2, max_grad_norm=1e9,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    cut = whole.model_copy(update={"backpropagation_length": 8})
    tokens = prepare_tokens(short, tokenizer, tmp_path / "tokens", 10**6)
    run = partial(watched, data=short, tokenizer=tokenizer, tokens=tokens)
    reference = run(expanded(make, family), training=whole, folder=tmp_path / "whole")
    watch = run(expanded(make, family), training=cut, folder=tmp_path / "cut")
    assert watch.losses == pytest.approx(reference.losses, rel=1e-5)
    batches = TrainingBatches(short, cut, tokenizer, tokens=tokens)
    lengths = {batch["input_ids"].shape[1] for batch, _ in zip(batches, range(12), strict=False)}
    assert {8, 32} <= lengths
    wanted = by_hand(expanded(make, family), (batch for batch, _ in zip(batches, range(12), strict=False)), 8)
    truncated = 0
    for got, expected, untruncated in zip(watch.gradients, wanted, reference.gradients, strict=True):
        for name in expected:
            assert (got[name] - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-12, name
            truncated += (got[name] - untruncated[name]).norm() > 1e-3 * untruncated[name].norm()
    assert truncated


def test_stopped_and_resumed(make, family, short, settings, tokenizer, tmp_path):
    """To the bit what training without interruption makes."""
    training = settings(steps=6, sequences_per_device=2, backpropagation_length=8)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    train(expanded(make, family), tokenizer, short, training, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(expanded(make, family), tokenizer, short, training, tmp_path / "stopped", progress=stop)
    train(expanded(make, family), tokenizer, short, training, tmp_path / "stopped")
    ours, theirs = (load_file(tmp_path / name / "trained" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "stopped" / "training.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"mqar": 1}}, r"data\.recall\.shapes = 20: is longer than backpropagation_length = 8 and no"),
        ({"weights": {"facts": 1}}, r"data\.forms\.lengths = 18: is longer than .*; give a multiple of 8, or at most"),
        ({"weights": {"text": 1}, "sequence_parallel": 4}, r"backpropagation_length = 8: leaves each of 4 processes"),
    ],
)  # fmt: skip
def test_sequences_without_equal_segments_are_refused(make, family, data, settings, changes, message):
    section = data.model_dump(exclude_none=True) | {"forms": {"lengths": [18]}, "recall": {"shapes": [[20, 4]]}}
    with pytest.raises(UserError, match=message):
        check_slices(settings(backpropagation_length=8, **changes), Data.model_validate(section), make(family))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backpropagation_length": 12}, "backpropagation_length = 12: does not divide sequence_length = 32"),
        ({"backpropagation_length": 64}, "backpropagation_length = 64: does not divide sequence_length = 32"),
        ({"backpropagation_length": 2, "sequence_parallel": 4}, "is no multiple of sequence_parallel = 4"),
        ({"backpropagation_length": 8, "compile": True}, "compile = True: does not go with backpropagation_length"),
    ],
)
def test_sections_that_contradict_themselves(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("neftune_noise_alpha", 5.0, r"= 5\.0: is noise whose size .*; leave it out, or backpropagation_length"),
        ("optim", "lomo", "= 'lomo': changes weights within a backward pass"),
    ],
)  # fmt: skip
def test_what_needs_whole_sequences_is_refused(settings, tmp_path, field, value, message):
    section = settings(backpropagation_length=8, trainer={field: value})
    with pytest.raises(UserError, match=message):
        training_arguments(section, tmp_path, seed=0)


def test_blocks_are_not_compiled_with_a_warning(make, family, settings, caplog):
    PartialState(cpu=True)
    assert not compiles(make(family).config, settings(backpropagation_length=8), torch.device("cuda"))
    (record,) = caplog.records
    assert "states that are carried from segment to segment are in no graph" in record.message
