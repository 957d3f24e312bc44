"""Training on transformers.Trainer: our batches, our parameter groups, our loss, and checkpoints that are whole."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from statex.checkpoint import new_folder
from statex.data.mixture import TrainingBatches, gradient_accumulation_steps
from statex.errors import UserError
from statex.expansion.plan import ExpansionPlan, stored_plan
from statex.families import family_of
from statex.measure import Stopwatch, peak_memory, reset_peak_memory
from statex.models.dispatch import statex_ops
from statex.recipe import Data, Training
from statex.training.loss import chunked_loss

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class TrainingSummary:
    """What a stage of training cost, over the steps since it was last started."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    final_loss: float | None
    num_processes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Data,
    training: Training,
    output: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingSummary:
    """Train a model and leave it in `output/trained`; go on from the last checkpoint in `output` where there is one.

    Args:
        model: in fp32, which are the master weights; a plan in its configuration names the fresh tensors.
        tokenizer: saved with the model; it makes tokens of the recipe's text.
        data, training: sections of the recipe.
        output: folder of this arm. While it trains, checkpoints are in `output/checkpoints`; logs stay in
            `output/logs`.
        seed: of the run. Data order comes from `data.seed`, so that all seeds and arms see the same tokens.
        progress: called after each step.

    Raises:
        UserError: data or settings that do not fit (see TrainingBatches), or `train_only_expanded` without a plan.
    """
    plan = stored_plan(model.config)
    if training.train_only_expanded:
        freeze_all_but_expanded(model, plan)
    set_seed(seed)
    trainer = StatexTrainer(
        model=model,
        args=training_arguments(training, output, seed, quiet=progress is not None),
        processing_class=tokenizer,
        data=data,
        training=training,
        fresh_tensors=plan.fresh_tensors if plan else set(),
        callbacks=[_ReportProgress(progress)] if progress else None,
    )
    if progress:
        trainer.remove_callback(PrinterCallback)
    resume_from = get_last_checkpoint(trainer.args.output_dir) if os.path.isdir(trainer.args.output_dir) else None
    trainer.start_step = int(resume_from.rpartition("-")[2]) if resume_from else 0
    reset_peak_memory(trainer.args.device)
    with statex_ops():
        watch = Stopwatch(trainer.args.device)
        trainer.train(resume_from_checkpoint=resume_from)
        seconds = watch.seconds()
    steps = training.steps - trainer.start_step
    summary = TrainingSummary(
        steps=steps,
        tokens=steps * training.tokens_per_step,
        seconds=seconds,
        tokens_per_second=steps * training.tokens_per_step / seconds if steps else 0.0,
        peak_memory=peak_memory(trainer.args.device),
        final_loss=next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None),
        num_processes=trainer.args.world_size,
    )
    trainer.save_trained(output / "trained")
    return summary


def training_arguments(training: Training, output: Path, seed: int, quiet: bool = False) -> TrainingArguments:
    """A recipe's training section as transformers.TrainingArguments; `training.trainer` has the last word."""
    scheduler: dict[str, Any]
    if training.schedule == "wsd":
        decay = training.decay_steps or max(1, training.steps // 5)
        scheduler = {"num_decay_steps": decay, "min_lr_ratio": training.min_learning_rate_ratio}
        schedule = "warmup_stable_decay"
    else:
        scheduler = {"min_lr_rate": training.min_learning_rate_ratio}
        schedule = "cosine_with_min_lr"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    fields = {
        "output_dir": str(output / "checkpoints"),
        "max_steps": training.steps,
        "per_device_train_batch_size": 1,  # only a label: the batches come ready from TrainingBatches
        "gradient_accumulation_steps": gradient_accumulation_steps(training, world_size),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": scheduler,
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
        "report_to": training.report_to or "none",
        "seed": seed,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the batches begin at the step asked for
        "ddp_find_unused_parameters": False,
        "disable_tqdm": quiet,
    }
    known = set(TrainingArguments.__dataclass_fields__)
    if training.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        fields |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if training.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "logs"))
    if unknown := sorted(set(training.trainer) - known):
        raise UserError(
            "training.trainer", unknown[0], "is no field of transformers.TrainingArguments", "correct its name"
        )
    return TrainingArguments(**(fields | training.trainer))


def compute_in_bf16(precision: str) -> bool:
    """Whether to compute in bf16 over fp32 master weights; "auto" does where a GPU has it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def freeze_all_but_expanded(model: PreTrainedModel, plan: ExpansionPlan | None) -> None:
    """Leave gradients only to the mixers that the plan changed, and to norms it reset.

    Raises:
        UserError: the model has no plan.
    """
    if plan is None:
        raise UserError(
            "training.train_only_expanded", True, "the model has no expanded layers", "expand it first, or set it false"
        )
    path = family_of(model.config).mixer_path
    prefixes = tuple(path.format(layer.index) + "." for layer in plan.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) or name in plan.fresh_tensors)


class StatexTrainer(Trainer):
    """transformers.Trainer with statex's batches, loss, parameter groups and whole checkpoints."""

    def __init__(self, *args: Any, data: Data, training: Training, fresh_tensors: set[str], **kwargs: Any):
        self.data, self.training, self.fresh_tensors = data, training, fresh_tensors
        self.start_step = 0
        super().__init__(*args, **kwargs)
        self._last_log: tuple[int, Stopwatch] | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, from `start_step` on."""
        batches = TrainingBatches(
            self.data,
            self.training,
            self.processing_class,  # type: ignore[arg-type]
            rank=self.args.process_index,
            world_size=self.args.world_size,
            start_step=self.start_step,
        )
        return DataLoader(batches, batch_size=None, pin_memory=self.args.device.type == "cuda")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in up to four groups: fresh or inherited, with weight decay (matrices) or without (vectors)."""
        if self.optimizer is None:
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    key = name.removeprefix("module.") in self.fresh_tensors, parameter.ndim >= 2
                    groups.setdefault(key, []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            multiplier = self.training.fresh_learning_rate_multiplier
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate * (multiplier if is_fresh else 1.0),
                        "weight_decay": self.args.weight_decay if is_matrix else 0.0,
                    }
                    for (is_fresh, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, its head and cross-entropy a chunk of tokens at a time."""
        unwrapped = self.accelerator.unwrap_model(model)
        seq_idx = inputs.pop("seq_idx", None)
        hook = None
        if seq_idx is not None:  # the language-model class of transformers' Mamba2 does not pass it on
            hook = unwrapped.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"seq_idx": seq_idx}), with_kwargs=True
            )
        try:
            with chunked_loss(unwrapped, self.training.loss_chunk):
                return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second (of all ranks, since the last log) and peak memory to what is logged."""
        if "loss" in logs:
            now = Stopwatch(self.args.device)
            if self._last_log is not None:
                step, watch = self._last_log
                tokens = (self.state.global_step - step) * self.training.tokens_per_step
                logs["tokens_per_second"] = round(tokens / watch.seconds(), 1)
            logs["peak_memory_gib"] = round(peak_memory(self.args.device) / 2**30, 3)
            self._last_log = (self.state.global_step, now)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes a checkpoint: a folder beside the finished ones, which none of its readers sees."""
        return os.path.join(super()._get_output_dir(trial), "unfinished")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name and rename it when it is whole; then drop the oldest."""
        staging = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finished = Path(self.args.output_dir) / name
            shutil.rmtree(finished, ignore_errors=True)  # left there by a run that went on from an older one
            os.replace(staging / name, finished)
            rotate_checkpoints(self.args.output_dir, save_total_limit=self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_trained(self, folder: Path) -> None:
        """Write the finished model with its tokenizer to `folder`, whole or not at all, and drop the checkpoints."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            if folder.exists():
                shutil.rmtree(folder)
            with new_folder(folder) as temporary:
                self.accelerator.unwrap_model(self.model).save_pretrained(temporary, state_dict=state)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(temporary)
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()


class _ReportProgress(TrainerCallback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)
