"""What a recipe may say of transformers.TrainingArguments, and what it may not."""

import dataclasses
from unittest import mock

import pytest
import torch
from transformers import TrainingArguments

from statex.errors import UserError
from statex.training import arguments
from statex.training.arguments import FIXED_FIELDS, OWN_FIELDS, training_arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer": {"dataloader_num_workers": 2}},
            "dataloader_num_workers = 2: cannot be changed: batches come ready-made",
        ),
        ({"trainer": {"output_dir": "x"}}, "training.trainer.output_dir = 'x': has a key of its own in recipes; set"),
        ({"trainer": {"max_steps": 9}}, "trainer.max_steps = 9: has a key of its own in recipes; set training.steps."),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "the loss is computed in chunks, without smoothing; leave it"),
        ({"trainer": {"average_tokens_across_devices": False}}, "each scored token has the same weight"),
        ({"trainer": {"eval_strategy": "steps"}}, "models are measured after training"),
        ({"trainer": {"no_such": 1}}, "trainer.no_such = 1: is not a field of transformers.TrainingArguments; correct"),
        ({"trainer": {"optim": "no_such"}}, "training.trainer = {'optim': 'no_such'}: is refused by transformers"),
        ({"report_to": ["no_such"]}, "training.report_to = 'no_such': is unknown or not installed; install it"),
        ({"sequences_per_device": 3}, "training.sequences_per_device = 3: does not divide the 4 sequences"),
    ],
)
def test_what_does_not_fit_is_the_user_s_mistake(settings, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        training_arguments(settings(**changes), tmp_path, seed=0)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("torch_compile_mode", "evil"),
        ("local_rank", 3),
        ("_n_gpu", 2),
        ("label_names", 3),
        ("include_num_input_tokens_seen", "evil"),
        ("fsdp_config", "nofile"),
        ("fsdp_config", {"version": 2}),
        ("fsdp", 3),
        ("accelerator_config", 1),
        ("logging_first_step", "x"),
        ("logging_first_step", 1),
        ("adam_epsilon", "1e-8"),
        ("adam_epsilon", True),
        ("neftune_noise_alpha", [1.0]),
        ("ddp_timeout", 1.5),
        ("ddp_backend", "evil"),
        ("log_level", "evil"),
        ("log_level_replica", "evil"),
        ("debug", 3),
        ("optim_args", {"a": 1}),
        ("optim_target_modules", [1]),
        ("parallelism_config", {}),
        ("enable_jit_checkpoint", True),
    ],
)
def test_further_fields_have_the_type_that_transformers_says(settings, tmp_path, field, value):
    with pytest.raises(UserError) as caught:
        training_arguments(settings(trainer={field: value}), tmp_path, seed=0)
    assert caught.value.field == f"training.trainer.{field}"
    assert caught.value.value == value
    assert caught.value.remedy


def test_the_defaults_of_transformers_have_its_types():
    """No annotation of TrainingArguments is narrower than what it takes, and none is unknown to pydantic."""
    for field in dataclasses.fields(TrainingArguments):
        if field.name in OWN_FIELDS or field.name.startswith(tuple(FIXED_FIELDS)):
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if default is not None:
            arguments._check_type(field.name, default)


def test_all_that_a_recipe_sets_is_its_own(settings, tmp_path):
    """What is passed to TrainingArguments is in one of the tables, but for what a user may well change."""
    given = {}
    with mock.patch.object(arguments, "TrainingArguments", mock.Mock(wraps=TrainingArguments)) as made:
        made.__dataclass_fields__ = TrainingArguments.__dataclass_fields__
        training_arguments(settings(gradient_checkpointing=True), tmp_path, seed=0)
        given = set(made.call_args.kwargs)
    free = {field for field in given if field not in OWN_FIELDS and not field.startswith(tuple(FIXED_FIELDS))}
    assert free == {"logging_nan_inf_filter", "ddp_find_unused_parameters", "disable_tqdm", "use_cpu"}


def test_further_fields_reach_transformers(settings, tmp_path):
    further = {"optim": "adafactor", "adam_epsilon": 1e-6, "neftune_noise_alpha": 1}
    further |= {"include_num_input_tokens_seen": "all", "log_level": "debug", "optim_target_modules": ["a"]}
    made = training_arguments(settings(trainer=further), tmp_path, seed=3)
    assert {name: getattr(made, name) for name in further} == further
    assert made.seed == 3


@pytest.mark.parametrize("value", ["ds_config.json", {"zero_optimization": {"stage": 3}}, {}])
def test_deepspeed_is_refused(settings, tmp_path, value):
    with pytest.raises(UserError) as caught:
        training_arguments(settings(trainer={"deepspeed": value}), tmp_path, seed=0)
    assert caught.value.field == "training.trainer.deepspeed"
    assert "where ZeRO-3 has released it" in caught.value.problem
    assert "fsdp = true shards the same" in caught.value.problem


def test_deepspeed_by_its_launcher_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"ACCELERATE_USE_DEEPSPEED = 'true': cannot be used: .*; use torchrun\."):
        training_arguments(settings(), tmp_path, seed=0)


def test_the_section_reaches_transformers(settings, tmp_path):
    section = settings(
        steps=30, learning_rate=2e-3, betas=[0.8, 0.9], weight_decay=0.3, max_grad_norm=0.5, save_every=None,
        log_every=7, keep_checkpoints=3, sequences_per_device=2, precision="bf16", gradient_checkpointing=True,
        report_to=["tensorboard"],
    )  # fmt: skip
    made = dataclasses.asdict(training_arguments(section, tmp_path, seed=0))
    expected = {
        "max_steps": 30, "learning_rate": 2e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.3,
        "max_grad_norm": 0.5, "save_steps": 3, "logging_steps": 7, "save_total_limit": 3,
        "gradient_accumulation_steps": 2, "bf16": True, "report_to": ["tensorboard"],
        "output_dir": str(tmp_path / "checkpoints"),
    }  # fmt: skip
    assert {name: made[name] for name in expected} == expected


@pytest.mark.parametrize(("precision", "has_gpu", "expected"), [
    ("fp32", True, False), ("bf16", False, True), ("auto", False, False), ("auto", True, True),
])  # fmt: skip
def test_precision(monkeypatch, precision, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_gpu)
    assert arguments.compute_in_bf16(precision) == expected


def test_one_process_trains_on_one_gpu(settings, tmp_path, monkeypatch):
    """transformers would put a model into DataParallel where it sees several."""

    class SeesFour(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(arguments, "TrainingArguments", SeesFour)
    assert training_arguments(settings(), tmp_path, seed=0).n_gpu == 1
