"""Training on transformers.Trainer: our batches, our parameter groups, our loss, and complete checkpoints."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from statex.checkpoint import write_card
from statex.data.mixture import TrainingBatches, text_windows
from statex.data.tokens import TokenFolder, prepare_tokens
from statex.expansion.stored import stored_plan
from statex.models.dispatch import statex_ops
from statex.models.documents import document_arguments
from statex.models.replay import ReplayExpansion
from statex.recipe import Training
from statex.settings import Data
from statex.training import CHECKPOINTS, SUMMARY
from statex.training.activations import KeepActivations
from statex.training.arguments import training_arguments
from statex.training.bad_steps import BadSteps
from statex.training.blocks import TrainingBlocks, compiles
from statex.training.captured import CapturedSteps, captures
from statex.training.checkpoints import last_checkpoint, step_of, write_listing
from statex.training.loader import WORKERS, TimedLoader
from statex.training.loss import chunked_loss
from statex.training.slices import Parts, check_slices, groups_of_ranks
from statex.training.summary import TrainingSummary
from statex.training.watching import WatchGradients, WatchState, logged_state_use
from statex.training.weights import freeze_all_but_expanded, in_dtype, require_master_weights, without_weights
from statex.utils.atomic import new_folder, write_text_atomic
from statex.utils.timing import Stopwatch, peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Data,
    training: Training,
    output: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    tokens: Path | None = None,
) -> TrainingSummary:
    """Train a model; resume from the last checkpoint in `output` where there is one.

    The model is left in `output/trained`, and what its training cost in `output/training.json`. While it trains,
    checkpoints are in `output/checkpoints`. TensorBoard's events go to `output/logs`.

    Args:
        model: in fp32, which are the master weights; a plan in its configuration names the fresh tensors.
        tokenizer: saved with the model; it makes tokens of the recipe's text.
        data, training: sections of the recipe.
        output: folder of this arm.
        seed: of the run. With `data.seed` it gives the order of the data, which is the same for all arms of a seed.
        progress: called after each step.
        base: name of the checkpoint that the model was made from, for its card; None for a model made from scratch.
        dtype: of the saved weights; by default the model's own.
        tokens: folder of prepared tokens, to which what is missing is added; by default `tokens` beside `output`.

    Raises:
        UserError: data or settings that do not fit (see TrainingBatches, check_slices), a model in bf16,
            `train_only_expanded` without a plan, or checkpoints that are all damaged.
    """
    require_master_weights(model)
    check_slices(training, data, model)
    plan = stored_plan(model.config)
    if training.train_only_expanded:
        freeze_all_but_expanded(model, plan)
    arguments = training_arguments(training, output, seed, quiet=progress is not None)
    _mention_idle_gpus(arguments)
    prepared = None
    if needed := text_windows(data, training, seed):  # every process looks; where they are missing, one makes them
        folder, is_first = tokens or output.parent / "tokens", arguments.process_index == 0
        prepared = prepare_tokens(data, tokenizer, folder, needed, verify=is_first)
    set_seed(seed)
    trainer = StatexTrainer(
        model=model,
        args=arguments,
        output=output,
        processing_class=tokenizer,
        data=data,
        tokens=prepared,
        training=training,
        fresh_tensors=plan.fresh_tensors if plan else set(),
        callbacks=[_ReportProgress(progress)] if progress else None,
    )
    if progress:
        trainer.remove_callback(PrinterCallback)
    summary = trainer.train_to_the_end()
    trainer.save_trained(summary, base, dtype)
    return summary


def _mention_idle_gpus(arguments: TrainingArguments) -> None:
    """Say so where one process trains and sees several GPUs."""
    if arguments.world_size == 1 and (gpus := torch.cuda.device_count()) > 1:
        logger.warning("training on one of %d GPUs; torchrun --nproc-per-node N uses N", gpus)


class StatexTrainer(Trainer):
    """transformers.Trainer with statex's batches, loss, parameter groups and complete checkpoints."""

    def __init__(
        self,
        *,
        output: Path,
        data: Data,
        training: Training,
        fresh_tensors: set[str],
        tokens: TokenFolder | None = None,
        **kwargs: Any,
    ):
        self.output, self.data, self.training, self.fresh_tensors = output, data, training, fresh_tensors
        self.tokens = tokens
        self.loader: TimedLoader | None = None
        self.start_step = 0
        self.group: ProcessGroup | None = None  # of the ranks that share sequences, while they are trained on
        self.use_cache = kwargs["model"].config.use_cache  # transformers.Trainer sets it to False and leaves it so
        super().__init__(**kwargs)
        if self.accelerator.ddp_handler is not None:  # gradients lie in DDP's buckets, not there and in copies
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(output / "logs")
        self._last_log: tuple[int, Stopwatch, float] | None = None
        self._operations_of_token: int | None = None  # by one token
        training, device = self.training, self.args.device
        self.blocks = TrainingBlocks(
            kwargs["model"],
            compiled=compiles(kwargs["model"].config, training, device),
            recomputed=training.gradient_checkpointing,
            stream=torch.bfloat16 if training.residual_precision == "bf16" else None,
        )
        self.captured: CapturedSteps | None = None  # while it trains, where steps are captured
        if training.activation_memory != "least":
            self.add_callback(KeepActivations(self.blocks, training.activation_memory, device))
        self.bad_steps = BadSteps(training, device, self.describe_batch)
        self.add_callback(self.bad_steps)
        self.parts = Parts(kwargs["model"], training)
        self.watch = WatchGradients(self.fresh_tensors)
        if self.fresh_tensors:
            self.add_callback(self.watch)
        self.watch_state = WatchState(stored_plan(kwargs["model"].config), training.watch_state_every)

    @property
    def waited(self) -> float:
        """Seconds that this rank waited for data."""
        return self.loader.waited if self.loader is not None else 0.0

    @property
    def batches(self) -> TrainingBatches | None:
        """What makes the batches, None where they are given."""
        made = self.loader.dataset if self.loader is not None else None
        return made if isinstance(made, TrainingBatches) else None

    @property
    def checkpoints(self) -> Path:
        """The folder of finished checkpoints."""
        return Path(str(self.args.output_dir))

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, from `start_step` on."""
        batches = TrainingBatches(
            self.data,
            self.training,
            self.processing_class,  # type: ignore[arg-type]
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            start_step=self.start_step,
            tokens=self.tokens,
        )
        device, workers = self.args.device, self.data.workers
        if workers is None:
            workers = WORKERS if device.type == "cuda" else 0
        self.loader = TimedLoader(batches, device, workers)
        return self.loader

    def describe_batch(self, step: int) -> tuple[str, str]:
        """The kind of a step's batch, and what it is called."""
        batches = self.batches
        if batches is None:
            return "", "given"
        return batches.kind_of_step(step), batches.name_of_step(step)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """A micro-batch forward and backward; its loss is also for `BadSteps`."""
        step = self.state.global_step
        if self.batches is not None and self.watch_state.is_due(step):
            ids = self.batches.first_sequence().to(self.args.device)
            read = partial(self.parts.run, {"input_ids": ids}, self.group)
            with self.blocks.plain():
                self.log(self.watch_state.measure(self.accelerator.unwrap_model(model), read, step, self.group))
        run = partial(super().training_step, model)

        def run_part(part: dict[str, Any], is_last: bool) -> torch.Tensor:
            if self.captured is not None:
                return self.captured(run, part, num_items_in_batch)
            if num_items_in_batch is None and not is_last:
                raise RuntimeError("the loss of a segment needs to know how many tokens its whole step scores")
            # FSDP reduces those of each segment: held back, they would be whole on every process
            held_back = not is_last and not self.accelerator.is_fsdp2
            with self.accelerator.no_sync(model) if held_back else nullcontext():
                return run(part, num_items_in_batch)

        first, *others = self.parts.run(inputs, self.group, run_part)
        return self.bad_steps.add(sum(others, first), step)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.bad_steps.judge(norm, self.state.global_step, getattr(self.optimizer, "optimizer", self.optimizer))
        return norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in up to four groups: fresh or inherited, with weight decay (matrices) or without (vectors)."""
        model = self.model if model is None else model
        if self.optimizer is None:
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = name.removeprefix("module.") in self.fresh_tensors, parameter.ndim >= 2
                    groups.setdefault(key, []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
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
            apart = {"seq_idx": seq_idx}
            if not isinstance(unwrapped, ReplayExpansion):
                mask = inputs.get("attention_mask")
                apart = document_arguments(unwrapped.base_model, inputs["input_ids"], seq_idx, mask)
            hook = unwrapped.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | apart), with_kwargs=True
            )
        try:
            with chunked_loss(unwrapped, self.training.loss_chunk, self.blocks.compiled, self.captured is not None):
                return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations a parameter and token; transformers walks over all modules in each step to say the same."""
        if self._operations_of_token is None:
            model: Any = self.model
            self._operations_of_token = 6 * model.num_parameters(exclude_embeddings=True)
        return self._operations_of_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to what is logged tokens per second (of all ranks, since the last log), the share of that time that this
        rank waited for data, and peak memory."""
        if "loss" in logs:
            now = Stopwatch(self.args.device)
            if self._last_log is not None:
                step, watch, waited = self._last_log
                tokens, seconds = (self.state.global_step - step) * self.training.tokens_per_step, watch.seconds()
                logs["tokens_per_second"] = round(tokens / seconds, 1)
                logs["data_wait"] = round((self.waited - waited) / seconds, 4)
            logs["peak_memory_gib"] = round(peak_memory(self.args.device) / 2**30, 3)
            logs |= self.watch.logged()
            if self.training.bad_steps == "skip":
                logs["skipped_steps"] = self.bad_steps.skipped
            self._last_log = (self.state.global_step, now, self.waited)
        super().log(logs, start_time)

    def train_to_the_end(self) -> TrainingSummary:
        """Train from the last checkpoint, or from the beginning, to the last step; returns what that cost."""
        device, resume_from = self.args.device, self.checkpoint_to_resume()
        self.start_step = step_of(resume_from) if resume_from else 0
        reset_peak_memory(device)
        model: Any = self.model
        if captures(model.config, self.training, self.data, device, self.args.world_size):
            self.captured = CapturedSteps(model)
        with statex_ops(), self.blocks.running(), groups_of_ranks(self.training, self.args) as self.group:
            watch = Stopwatch(device)
            self.train(resume_from_checkpoint=resume_from)
            seconds = watch.seconds()
        self.captured = None
        steps = self.training.steps - self.start_step
        tokens = steps * self.training.tokens_per_step
        return TrainingSummary(
            steps=steps,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds if steps else 0.0,
            peak_memory=peak_memory(device),
            final_loss=next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), None),
            num_processes=self.args.world_size,
            data_wait=self.waited / seconds,
            skipped_steps=self.bad_steps.skipped,
            state_use=logged_state_use(self.state.log_history),
        )

    def checkpoint_to_resume(self) -> str | None:
        """What `last_checkpoint` finds, looked for by the main process alone: reading the files takes its time."""
        found = [last_checkpoint(self.output / CHECKPOINTS) if self.args.process_index == 0 else None]
        return broadcast_object_list(found)[0]

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes a checkpoint: a folder beside the finished ones, which none of its readers sees."""
        return os.path.join(super()._get_output_dir(trial), "unfinished")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name and rename it when it is complete; then drop the oldest.

        None after the last step: the finished model is saved, and resuming from there would train one step too many.
        """
        if self.state.global_step >= self.training.steps:
            return
        staging, folder = Path(self._get_output_dir(trial)), self.output / CHECKPOINTS
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_listing(staging / name)
            shutil.rmtree(folder / name, ignore_errors=True)  # damaged, or training would have resumed from it
            os.replace(staging / name, folder / name)
            rotate_checkpoints(str(folder), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save_trained(self, summary: TrainingSummary, base: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Write the finished model with its tokenizer and card, atomically, then the summary; drop the
        checkpoints. `base` and `dtype` are those of `train`."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            model.config.use_cache = self.use_cache
            outline = without_weights(model, dtype or model.dtype)
            # Gathered from shards, tied weights come as two tensors, and both would be written
            state |= {name: state[source] for name, source in outline.all_tied_weights_keys.items()}
            folder = self.output / "trained"
            shutil.rmtree(folder, ignore_errors=True)  # left there by a call that was killed before its summary
            with new_folder(folder) as temporary:
                outline.save_pretrained(temporary, state_dict=in_dtype(state, outline.dtype))
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(temporary)
                write_card(temporary, outline, base, self._settings())
            write_text_atomic(self.output / SUMMARY, json.dumps(summary.to_dict(), indent=2) + "\n")
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _settings(self) -> dict[str, Any]:
        """What the model card says about this training."""
        training = self.training
        settings: dict[str, Any] = {
            "steps": training.steps,
            "tokens": training.steps * training.tokens_per_step,
            "tokens per step": training.tokens_per_step,
            "sequence length": training.sequence_length,
            "learning rate": training.learning_rate,
            "schedule": training.schedule,
            "seed": self.args.seed,
        }
        if self.fresh_tensors:
            settings["learning rate of fresh tensors, times"] = training.fresh_learning_rate_multiplier
        return settings


class _ReportProgress(TrainerCallback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)
