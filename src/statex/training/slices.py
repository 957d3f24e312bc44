"""Training on parts of sequences, slices of several ranks and segments one after the other: which models and lengths
can be cut, which ranks share a sequence, and how a micro-batch is run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from statex.data.mixture import segments_of, sequence_lengths
from statex.errors import UserError
from statex.families import family_of
from statex.models.documents import has_attention
from statex.ops import carried_state, sequence_parallel
from statex.recipe import Training
from statex.settings import Data

Result = TypeVar("Result")


def check_slices(training: Training, data: Data, model: PreTrainedModel) -> None:
    """Refuse `sequence_parallel` and `backpropagation_length` where the model or the data do not go with them.

    Args:
        training, data: sections of the recipe.
        model: also on the meta device.

    Raises:
        UserError: some operation of the model would see its part alone, or a sequence has no equal parts, or slices
            that are shorter than what a convolution reaches back.
    """
    size, segment = training.sequence_parallel, training.backpropagation_length
    for name, value in (("sequence_parallel", size if size > 1 else None), ("backpropagation_length", segment)):
        if value is not None and (reason := _whole_because(model)):
            remedy = f"leave it out: sequences of {model.config.model_type} stay whole"
            raise UserError(f"training.{name}", value, reason, remedy)
    for field, length in sequence_lengths(data, training):
        if segment is not None and length > segment and length % segment:
            problem = f"is longer than backpropagation_length = {segment} and no multiple of it"
            raise UserError(field, length, problem, f"give a multiple of {segment}, or at most that")
    if size == 1:
        return
    reach = max((weight.shape[-1] - 1 for name, weight in model.named_parameters() if _is_convolution(name)), default=0)
    for field, length in sequence_lengths(data, training):
        if segment is not None and length > segment:
            field, length = "training.backpropagation_length", segment
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
        reason = "layers of attention, which would see a part of the tokens alone"
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


class Parts:
    """How the trainer runs micro-batches: whole, or in segments that carry the states of a model's mixers.

    Args:
        model: whose mixers' modules they are.
        training: its `backpropagation_length`, and how many ranks share a sequence.
    """

    def __init__(self, model: PreTrainedModel, training: Training):
        family, length = family_of(model.config), training.backpropagation_length
        self.length = None if length is None else length // training.sequence_parallel
        self.mixers = [
            model.get_submodule(family.mixer_name(model.config, index))
            for index in (family.recurrent_layers(model.config) if length is not None else ())
        ]

    def run(
        self,
        inputs: dict[str, Tensor],
        group: dist.ProcessGroup | None,
        step: Callable[[dict[str, Tensor], bool], Result],
    ) -> list[Result]:
        """Call `step` with each part of a micro-batch, and whether it is the last; forward and backward are its own."""
        parts = segments_of(inputs, self.length)
        if len(parts) == 1:
            with on_slices(group, inputs.get("seq_idx")):
                return [step(inputs, True)]
        results = []
        with carried_state(self.mixers) as carried:
            for part in parts:
                seq_idx = part.get("seq_idx")
                with on_slices(group, seq_idx), carried.segment(seq_idx):
                    results.append(step(part, part is parts[-1]))
        return results
