"""A recipe's training section as transformers.TrainingArguments."""

import json
import logging
import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils.logging import get_log_levels_dict

from statex.data.mixture import gradient_accumulation_steps
from statex.errors import UserError, explained
from statex.expansion.config import user_error
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
    "dataloader_": "batches come ready-made and in order; data.workers sets the processes that make them",
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
    "metric_for_best_model": "models are measured after training",
    "greater_is_better": "models are measured after training",
    "push_to_hub": "a run leaves its models in its folder", "hub_": "a run leaves its models in its folder",
    "local_rank": "the launcher sets it in each process", "_n_gpu": "the launcher gives each process its GPU",
    "parallelism_config": "processes share a model by fsdp alone",
    "enable_jit_checkpoint": "a run that is stopped resumes from its last checkpoint",
}  # fmt: skip
"""Fields, or their beginnings, that no recipe can set, and why."""

LOG_LEVELS: Any = Literal["passive", *get_log_levels_dict()]
NARROWER_TYPES: dict[str, Any] = {
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
    "log_level": LOG_LEVELS,
    "log_level_replica": LOG_LEVELS,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None,
    "fsdp": bool | str,
    "fsdp_config": dict[str, Any],
    "accelerator_config": dict[str, Any],
    "liger_kernel_config": dict[str, bool],
}
"""Types of fields that transformers annotates more widely than it reads them (or, `fsdp`, otherwise); and a table alone
where it would open a file, whose content the recipe would not hold."""


def refuse_own_field(field: str, value: Any) -> None:
    """Raise UserError where `training.trainer` must not set a field of TrainingArguments."""
    if field in OWN_FIELDS:
        raise UserError(
            f"training.trainer.{field}", value, "has a key of its own in recipes", f"set {OWN_FIELDS[field]}"
        )
    for beginning, reason in FIXED_FIELDS.items():
        if field.startswith(beginning):
            raise UserError(f"training.trainer.{field}", value, f"cannot be changed: {reason}", "leave it out")


def training_arguments(
    training: Training, output: Path, seed: int, quiet: bool = False, is_started: bool = True
) -> TrainingArguments:
    """A recipe's training section, its `trainer` fields included, as transformers.TrainingArguments.

    Args:
        is_started: whether the processes that would train are those that there are.

    Raises:
        UserError: a field of TrainingArguments that is unknown or not the recipe's to set, a value it refuses, a
            logger that is not installed, or a residual stream in bf16 where training computes in fp32.
    """
    _check_fields(training)
    _check_processes(training, is_started)
    if is_started and training.residual_precision == "bf16" and not compute_in_bf16(training.precision):
        problem = "is for training that computes in bf16, which this device does not by itself"
        raise UserError("training.residual_precision", "bf16", problem, 'remove it, or set precision = "bf16"')
    processes = _world_size() if is_started else training.sequence_parallel
    fields = _fields(training, output, seed, quiet, processes)
    with explained("training.trainer", training.trainer, "is refused by transformers", "correct the value"):
        arguments = TrainingArguments(**(fields | deepcopy(training.trainer)))  # it adds to a table it is given
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else transformers wraps the model in DataParallel
    return arguments


def _fields(training: Training, output: Path, seed: int, quiet: bool, processes: int) -> dict[str, Any]:
    """What the recipe's keys are called by transformers, and what its batches and checkpoints need."""
    fields: dict[str, Any] = {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": training.steps,
        "per_device_train_batch_size": 1,  # only a label: the batches come ready from TrainingBatches
        "gradient_accumulation_steps": gradient_accumulation_steps(training, processes),
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
            problem = "is not a field of transformers.TrainingArguments"
            raise UserError(f"training.trainer.{field}", value, problem, "correct its name")
        _check_type(field, value)
    loggers = get_available_reporting_integrations()
    if missing := [name for name in training.report_to if name not in loggers]:
        remedy = f"install it, or use one that is: {', '.join(loggers) or 'there is none'}"
        raise UserError("training.report_to", missing[0], "is unknown or not installed", remedy)


def _check_type(field: str, value: Any) -> None:
    """Raise UserError where a value is none of the type that TrainingArguments, which checks few, gives its field."""
    try:
        _type_of(field).validate_json(json.dumps(value), strict=True)  # JSON's, as TOML's, enumerations are text
    except ValidationError as error:
        cause = user_error(error)
        raise UserError(f"training.trainer.{field}", value, cause.problem, cause.remedy) from None


@cache
def _type_of(field: str) -> TypeAdapter:
    return TypeAdapter(NARROWER_TYPES.get(field) or get_type_hints(TrainingArguments)[field])


def _check_processes(training: Training, is_started: bool) -> None:
    """Raise UserError where processes cannot share the training as they are set to."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        problem = f"cannot be used: {NO_DEEPSPEED}"
        raise UserError("ACCELERATE_USE_DEEPSPEED", os.environ["ACCELERATE_USE_DEEPSPEED"], problem, "use torchrun")
    fsdp, fsdp_config = (training.trainer.get(field) for field in ("fsdp", "fsdp_config"))
    if is_started and fsdp and "WORLD_SIZE" not in os.environ:
        problem = "shares a model among several processes, and there is one"
        remedy = "start it by torchrun --nproc-per-node N, with N = 1 too to resume what more began, or leave it out"
        raise UserError("training.trainer.fsdp", fsdp, problem, remedy)
    if is_started and fsdp and not torch.cuda.is_available():
        logger.warning("training.trainer.fsdp: accelerate shards nothing on a CPU; each process holds the whole model")
    if fsdp_config and not fsdp:
        problem = "is about fsdp, which is off"
        raise UserError("training.trainer.fsdp_config", fsdp_config, problem, "set fsdp = true, or leave it out")
    _check_parts(training)


def _check_parts(training: Training) -> None:
    """Raise UserError where `trainer` has what needs whole sequences, and they are cut."""
    shared, segment = training.sequence_parallel > 1, training.backpropagation_length is not None
    alpha, optimizer = (training.trainer.get(field) for field in ("neftune_noise_alpha", "optim"))
    if alpha and (shared or segment):
        problem = "is noise whose size follows from the length of a sequence, of which a pass sees a part"
        remedy = f"leave it out, or {'sequence_parallel' if shared else 'backpropagation_length'}"
        raise UserError("training.trainer.neftune_noise_alpha", alpha, problem, remedy)
    if segment and steps_in_backward(training):
        problem = "changes weights within a backward pass, of which a step has several with backpropagation_length"
        raise UserError("training.trainer.optim", optimizer, problem, "use another optimizer, or leave it out")


def steps_in_backward(training: Training) -> bool:
    """Whether the optimizer changes weights while the backward pass is under way."""
    optimizer = str(training.trainer.get("optim", ""))
    return "lomo" in optimizer or "layerwise" in optimizer


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_in_bf16(precision: str) -> bool:
    """Whether to compute in bf16 over fp32 master weights; "auto" does where a GPU has it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"
