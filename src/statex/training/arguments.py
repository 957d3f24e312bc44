"""A recipe's training section as transformers.TrainingArguments."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from statex.data.mixture import gradient_accumulation_steps
from statex.errors import UserError, explained
from statex.recipe import Training
from statex.training import CHECKPOINTS

logger = logging.getLogger(__name__)

OWN_FIELDS = {
    "output_dir": "output", "run_name": "name", "seed": "seeds", "data_seed": "data.seed",
    "max_steps": "training.steps", "num_train_epochs": "training.steps",
    "per_device_train_batch_size": "training.sequences_per_device", "train_batch_size": "training.sequences_per_device",
    "gradient_accumulation_steps": "training.sequences_per_device",
    "auto_find_batch_size": "training.sequences_per_device",
    "learning_rate": "training.learning_rate", "lr_scheduler_type": "training.schedule",
    "lr_scheduler_kwargs": "training.schedule", "warmup_steps": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps", "adam_beta1": "training.betas", "adam_beta2": "training.betas",
    "weight_decay": "training.weight_decay", "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision", "fp16": "training.precision",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "torch_compile": "training.compile", "torch_compile_backend": "training.compile",
    "torch_compile_mode": "training.compile",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing",
    "save_strategy": "training.save_every", "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints", "logging_strategy": "training.log_every",
    "logging_steps": "training.log_every", "report_to": "training.report_to",
}  # fmt: skip
"""Fields of transformers.TrainingArguments that a recipe sets by a key of its own: that key."""

NO_DEEPSPEED = (
    "the loss reads the head's weight outside the head's forward, where ZeRO-3 has released it, and no other of "
    "DeepSpeed's stages was tried; fsdp = true shards the same"
)
FIXED_FIELDS = {
    "dataloader_": "batches come ready-made and in order, in the process that trains",
    "ignore_data_skip": "batches begin at the step that is asked for",
    "remove_unused_columns": "batches come ready-made",
    "train_sampling_strategy": "batches come ready-made",
    "average_tokens_across_devices": "each scored token has the same weight, whatever the number of processes",
    "label_smoothing_factor": "the loss is computed in chunks, without smoothing",
    "use_liger_kernel": "the loss is computed in chunks already",
    "eval_": "models are measured after training", "do_eval": "models are measured after training",
    "load_best_model_at_end": "models are measured after training",
    "resume_from_checkpoint": "the same command resumes by itself", "save_only_model": "training could not resume",
    "deepspeed": NO_DEEPSPEED,
    "push_to_hub": "a run leaves its models in its folder", "hub_": "a run leaves its models in its folder",
}  # fmt: skip
"""Fields, or their beginnings, that no recipe can set, and why."""


def refuse_own_field(field: str, value: Any) -> None:
    """Raise UserError where `training.trainer` must not set a field of TrainingArguments."""
    if field in OWN_FIELDS:
        raise UserError(
            f"training.trainer.{field}", value, "has a key of its own in recipes", f"set {OWN_FIELDS[field]}"
        )
    for beginning, reason in FIXED_FIELDS.items():
        if field.startswith(beginning):
            raise UserError(f"training.trainer.{field}", value, f"cannot be changed: {reason}", "leave it out")


def training_arguments(training: Training, output: Path, seed: int, quiet: bool = False) -> TrainingArguments:
    """A recipe's training section, its `trainer` fields included, as transformers.TrainingArguments.

    Raises:
        UserError: a field of TrainingArguments that is unknown or not the recipe's to set, a value it refuses, or a
            logger that is not installed.
    """
    _check_fields(training)
    _check_processes(training)
    fields = _fields(training, output, seed, quiet)
    with explained("training.trainer", training.trainer, "is refused by transformers", "correct the value"):
        arguments = TrainingArguments(**(fields | training.trainer))
    if arguments.n_gpu > 1:
        logger.warning("training on one of %d GPUs; torchrun --nproc-per-node N uses N", arguments.n_gpu)
        arguments._n_gpu = 1  # else transformers wraps the model in DataParallel
    return arguments


def _fields(training: Training, output: Path, seed: int, quiet: bool) -> dict[str, Any]:
    """What the recipe's keys are called by transformers, and what its batches and checkpoints need."""
    fields: dict[str, Any] = {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": training.steps,
        "per_device_train_batch_size": 1,  # only a label: the batches come ready from TrainingBatches
        "gradient_accumulation_steps": gradient_accumulation_steps(training, _world_size()),
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup_steps,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": compute_in_bf16(training.precision),
        "save_strategy": "steps",
        "save_steps": training.save_every or max(1, training.steps // 10),
        "save_total_limit": training.keep_checkpoints,
        "logging_strategy": "steps",
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "report_to": training.report_to or "none",
        "seed": seed,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the batches begin at the step asked for
        "ddp_find_unused_parameters": False,
        "disable_tqdm": quiet,
        "use_cpu": not torch.cuda.is_available(),  # what else transformers may find, statex's ops do not run on
    }
    if training.schedule == "wsd":
        decay = training.decay_steps or max(1, training.steps // 5)
        fields["lr_scheduler_type"] = "warmup_stable_decay"
        fields["lr_scheduler_kwargs"] = {"num_decay_steps": decay, "min_lr_ratio": training.min_learning_rate_ratio}
    else:
        fields["lr_scheduler_type"] = "cosine_with_min_lr"
        fields["lr_scheduler_kwargs"] = {"min_lr_rate": training.min_learning_rate_ratio}
    return fields


def _check_fields(training: Training) -> None:
    """Raise UserError where `trainer` or `report_to` name what there is not, or what is not theirs to set."""
    for field, value in training.trainer.items():
        refuse_own_field(field, value)
        if field not in TrainingArguments.__dataclass_fields__:
            problem = "is no field of transformers.TrainingArguments"
            raise UserError(f"training.trainer.{field}", value, problem, "correct its name")
        if field.endswith("_config") and not isinstance(value, (str, dict)):
            # transformers opens what is no table as a file; a number is then one that is open already, such as stdout
            raise UserError(f"training.trainer.{field}", value, "is neither a table nor a file", "give one of them")
    loggers = get_available_reporting_integrations()
    if missing := [name for name in training.report_to if name not in loggers]:
        remedy = f"install it, or use one that is: {', '.join(loggers) or 'there is none'}"
        raise UserError("training.report_to", missing[0], "is unknown or not installed", remedy)


def _check_processes(training: Training) -> None:
    """Raise UserError where processes cannot share the training as they are set to."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        problem = f"cannot be used: {NO_DEEPSPEED}"
        raise UserError("ACCELERATE_USE_DEEPSPEED", os.environ["ACCELERATE_USE_DEEPSPEED"], problem, "use torchrun")
    if _world_size() == 1 and (fsdp := training.trainer.get("fsdp")):
        problem = "shares a model among several processes, and there is one"
        remedy = "start it by torchrun --nproc-per-node N, or leave it out"
        raise UserError("training.trainer.fsdp", fsdp, problem, remedy)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_in_bf16(precision: str) -> bool:
    """Whether to compute in bf16 over fp32 master weights; "auto" does where a GPU has it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"
