"""A training section is tried before its run is begun: built, and one step made, with nothing left behind."""

import os
import tempfile

import pytest
import torch

from statex.errors import UserError
from statex.training.trial import try_training


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """No file, no variable of the environment, no number drawn."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables, state = dict(os.environ), torch.get_rng_state()
    yield
    assert not list(tmp_path.iterdir())
    assert dict(os.environ) | {"PYTEST_CURRENT_TEST": ""} == variables | {"PYTEST_CURRENT_TEST": ""}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"train_only_expanded": True}, {"gradient_checkpointing": True}, {"precision": "bf16"}, {"schedule": "wsd"},
        {"trainer": {"optim": "adafactor"}}, {"compile": True}, {"report_to": ["tensorboard"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_documents", [False, True])
def test_valid_training_is_accepted_silently(settings, capsys, changes, with_documents):
    try_training(settings(**changes), with_documents)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"fsdp": "full_shard"}, "training.trainer.fsdp = 'full_shard': shares a model among several processes, and"),
        ({"optim": "adamw_bnb_8bit"}, "training.trainer = {'optim': 'adamw_bnb_8bit'}: cannot train a model (You need"),
        ({"optim_args": "x"}, "cannot train a model (not enough values to unpack"),
        (
            {"push_to_hub": True},
            "training.trainer.push_to_hub = True: cannot be changed: a run leaves its models in its",
        ),
        ({"hub_model_id": "a/b"}, "cannot be changed: a run leaves its models in its folder"),
        ({"adam_epsilon": -1.0}, "cannot train a model (Invalid epsilon value: -1.0)"),
        ({"adam_epsilon": "x"}, "training.trainer.adam_epsilon = 'x': Input should be a valid number"),
        ({"log_level": "nonsense"}, "training.trainer.log_level = 'nonsense': Input should be 'passive', 'detail'"),
        ({"torch_compile_backend": "nonsense"}, "has a key of its own in recipes; set training.compile"),
        ({"accelerator_config": 1}, "training.trainer.accelerator_config = 1: Input should be an object"),
        ({"accelerator_config": "no_such.json"}, "accelerator_config = 'no_such.json': Input should be an object"),
        ({"optim": "rmsprop", "optim_args": "alpha=2.0"}, "training.learning_rate = 0.01: with weight_decay = 0.1 one"),
    ],
)
def test_what_does_not_train_is_refused(settings, trainer, message):
    with pytest.raises(UserError) as caught:
        try_training(settings(trainer=trainer), False)
    assert message in str(caught.value)
