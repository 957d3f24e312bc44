"""Training on slices of sequences: which models and lengths can be cut, and which ranks share a sequence."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from statex.data.mixture import sequence_lengths
from statex.errors import UserError
from statex.families import family_of
from statex.models.documents import has_attention
from statex.ops import sequence_parallel
from statex.recipe import Training
from statex.settings import Data


def check_slices(training: Training, data: Data, model: PreTrainedModel) -> None:
    """Refuse `sequence_parallel` where the model or the data do not go with it.

    Args:
        training, data: sections of the recipe.
        model: also on the meta device.

    Raises:
        UserError: some operation of the model would see its slice alone, or a sequence has no equal slices, or such as
            are shorter than what a convolution reaches back.
    """
    size = training.sequence_parallel
    if size == 1:
        return
    if reason := _whole_because(model):
        remedy = f"leave it out: sequences of {model.config.model_type} stay whole"
        raise UserError("training.sequence_parallel", size, reason, remedy)
    reach = max((weight.shape[-1] - 1 for name, weight in model.named_parameters() if _is_convolution(name)), default=0)
    for field, length in sequence_lengths(data, training):
        if length % size:
            problem = f"does not divide among sequence_parallel = {size} processes"
            raise UserError(field, length, problem, f"give a multiple of {size}")
        if length // size < reach:
            problem = f"leaves each of {size} processes fewer tokens than the {reach} that a convolution reaches back"
            raise UserError(field, length, problem, f"give at least {size * reach}, or fewer processes")


def _whole_because(model: PreTrainedModel) -> str | None:
    """Why the sequences of a model cannot be cut; None where they can."""
    reason = family_of(model.config).whole_sequences
    if not reason and has_attention(model.base_model):
        reason = "layers of attention, which would see the tokens of their own process alone"
    return f"{model.config.model_type} has {reason}" if reason else None


def _is_convolution(name: str) -> bool:
    return name.endswith("conv1d.weight")


@contextmanager
def groups_of_ranks(training: Training, arguments: TrainingArguments) -> Iterator[dist.ProcessGroup | None]:
    """The group of this rank among those that share sequences, None where none do; all ranks must enter it.

    It is a separate group even where it has all ranks, since gradients are reduced at the same time.
    """
    if training.sequence_parallel == 1:
        yield None
        return
    group, _ = dist.new_subgroups(training.sequence_parallel, timeout=arguments.ddp_timeout_delta)
    yield group
    dist.destroy_process_group(group)  # not behind an error, where others may never come


def on_slices(group: dist.ProcessGroup | None, seq_idx: Tensor | None) -> AbstractContextManager[None]:
    """Within it, what the ranks of a group compute on is their slice; `seq_idx` as of `sequence_parallel`."""
    return nullcontext() if group is None else sequence_parallel(group, seq_idx)
