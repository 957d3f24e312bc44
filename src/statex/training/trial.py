"""A training section tried before its run is begun: one step of transformers.Trainer, on a model of a few weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback

from statex.errors import UserError, explained
from statex.models.expanded import expand
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.recipe import Training
from statex.training.arguments import training_arguments
from statex.training.trainer import StatexTrainer
from statex.training.weights import freeze_all_but_expanded

NUM_TOKENS = 8
MINIATURE: dict[str, Any] = {
    "steps": 1, "warmup_steps": 0, "decay_steps": None, "sequence_length": NUM_TOKENS, "sequences_per_device": None,
    "save_every": None, "report_to": [], "compile": False, "cuda_graphs": False, "activation_memory": "least",
    "sequence_parallel": 1, "backpropagation_length": None, "watch_state_every": None,
}  # fmt: skip
"""What a trial changes in a training section: its length, who shares it, and who reports it."""


def try_training(training: Training, with_documents: bool, is_started: bool = True) -> None:
    """Build transformers.TrainingArguments, the Trainer and its optimizer, and make one step of a few tokens.

    It writes nothing but to a folder of its own, which goes at the end. No step is made among several processes, which
    would have to take part; in one, nothing is shared.

    Args:
        training: the section.
        with_documents: whether batches tell documents apart (`data.reset_state_at_documents`).
        is_started: whether the processes that would train are those that there are.

    Raises:
        UserError: a value that transformers, accelerate or torch refuse, or a step that leaves non-finite weights.
    """
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), _kept_environment():
        training_arguments(training, Path(folder), seed=0, is_started=is_started)
        fields, processes = training.trainer, int(os.environ.get("WORLD_SIZE", "1"))
        if processes == 1:
            fields = {name: value for name, value in fields.items() if name not in ("fsdp", "fsdp_config")}
        miniature = training.model_copy(
            update=MINIATURE | {"tokens_per_step": NUM_TOKENS * processes, "trainer": fields}
        )
        if not is_started:  # the device that will train may compute in bf16 where this one does not
            miniature = miniature.model_copy(update={"residual_precision": "fp32"})
        arguments = training_arguments(miniature, Path(folder), seed=0, quiet=True)
        network, fresh = _tiny_model(training)
        with explained(
            "training.trainer" if fields else "training", fields, "cannot train a model", "correct the value"
        ):
            trainer = _Trial(
                with_documents,
                model=network,
                args=arguments,
                output=Path(folder),
                processing_class=None,
                data=None,
                training=miniature,
                fresh_tensors=fresh,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.create_optimizer()
            if processes == 1:
                _try_step(trainer, network)


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Inside this context, what transformers sets in the environment, as accelerate's compiler, goes at the end."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _try_step(trainer: StatexTrainer, network: torch.nn.Module) -> None:
    rates = trainer.training.learning_rate, trainer.training.weight_decay
    try:
        trainer.train()
        is_finite = all(torch.isfinite(tensor).all() for tensor in network.parameters())
    except FloatingPointError:
        is_finite = False
    if not is_finite:
        problem = f"with weight_decay = {rates[1]} one step makes weights NaN or infinite"
        raise UserError("training.learning_rate", rates[0], problem, "lower them, or correct training.trainer")


def _tiny_model(training: Training) -> tuple[GLAForCausalLM, set[str]]:
    """A model, expanded where only expanded layers are to be trained, and the names of its fresh tensors."""
    torch.manual_seed(0)
    config = GLAConfig(
        vocab_size=NUM_TOKENS, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    network = GLAForCausalLM(config)
    plan = expand(network, every=1) if training.train_only_expanded else None
    if plan is not None:
        freeze_all_but_expanded(network, plan)
    return network, plan.fresh_tensors if plan is not None else set()


class _Trial(StatexTrainer):
    def __init__(self, with_documents: bool, **kwargs: Any):
        self.with_documents = with_documents
        super().__init__(**kwargs)

    def get_train_dataloader(self) -> DataLoader:
        ids = torch.arange(NUM_TOKENS).unsqueeze(0)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.with_documents:
            batch["seq_idx"] = torch.zeros_like(ids, dtype=torch.int32)
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
