"""The batches of a training stage: steps of text, MQAR, passkeys and recall in words, mixed by weight.

Everything about a step follows from the recipe, the run's seed and the step's number: its kind, its shape, every
random draw, and, by the number of text steps before it, its sequences of text. So arms with the same data and seed see
the same batches, training resumes at any step at once, and the global batch does not depend on the number of ranks.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from statex.data.forms import FORMS, FormBuilder, form_batch
from statex.data.recall import IGNORED, PasskeyBuilder, mqar_batch, passkey_batch
from statex.data.tokenizer import recall_vocabulary
from statex.data.tokens import TextOrder, TokenFolder, check_text, whole_windows
from statex.errors import UserError
from statex.recipe import Training, Weights
from statex.settings import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("text", "mqar", "passkey", *FORMS)
"""What a step can be made of, each with its weight in `training.weights`."""
STEPS_PER_DRAW = 1024  # kinds are drawn for this many steps at once: one by one, 20,000 steps would take a second
KIND_STREAM, RECALL_STREAM = 0, 1  # random streams of a seed that must not meet


class TrainingBatches(IterableDataset):
    """Micro-batches of one rank from optimizer step `start_step` on, without end.

    Each is a dict of (n, T) tensors: `input_ids` and `labels` (int64, -100 where nothing is scored, not shifted), and
    with `data.reset_state_at_documents` also `seq_idx` (int32, the document in its sequence that a token belongs to).
    T is `training.sequence_length` for text and passkey steps and that of one of `data.recall.shapes` for mqar steps.
    `gradient_accumulation_steps` micro-batches make a step; micro-batch m of group g holds the sequences g + G m,
    g + G m + G M, ... of the step's, with G groups of `training.sequence_parallel` consecutive ranks and M
    micro-batches. Where groups have several ranks, each gets its slice of all sequences (`slice_of`), T among them, or
    of each of their segments of `training.backpropagation_length` tokens.
    Use it with `DataLoader(..., batch_size=None)`, whose workers take turns.

    Args:
        data, training: sections of the recipe.
        tokenizer: of the model; it gives the ids of text and, by `recall_vocabulary`, of recall data.
        seed: of the run; with `data.seed` it gives the order of the text and every random draw.
        rank, world_size: this process among those that train together.
        start_step: the optimizer step to begin with.
        tokens: the prepared text; without it no text can be read, and it is only checked that there is some.

    Raises:
        UserError: the ranks do not make whole groups, tokens_per_step does not divide among the groups and
            micro-batches, a recall shape or the sequence length does not fit, the text is missing or shorter than one
            sequence, or the vocabulary is too small.
    """

    def __init__(
        self,
        data: Data,
        training: Training,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        tokens: TokenFolder | None = None,
    ):
        super().__init__()
        data = data.model_copy(update={"seed": combined_seed(data.seed, seed)})
        self.data, self.training, self.tokenizer = data, training, tokenizer
        self.start_step = start_step
        self.group, self.part = divmod(rank, training.sequence_parallel)
        self.num_groups = num_groups(training, world_size)
        self.gradient_accumulation_steps = gradient_accumulation_steps(training, world_size)
        weights = training.weights
        self.text: TextOrder | None = None
        self._text_steps = [0]  # before each block of steps, as far as was asked for
        if weights.text and tokens is None:
            check_text(data, tokenizer, training.sequence_length)
        elif tokens is not None:
            self.text = TextOrder(tokens, training.sequence_length, data.seed)
        if weights.mqar:
            recall = data.recall
            self.key_ids, self.value_ids = recall_vocabulary(tokenizer, recall.num_keys, recall.num_values)
            self._check_shapes()
        if weights.passkey:
            self.passkey = PasskeyBuilder(tokenizer)
            if training.sequence_length < self.passkey.min_length:
                problem = "is too short for passkey sequences"
                remedy = f"give at least {self.passkey.min_length} or set weights.passkey to 0"
                raise UserError("training.sequence_length", training.sequence_length, problem, remedy)
        self.forms = {
            name: FormBuilder(tokenizer, name, data.forms.num_questions) for name in FORMS if getattr(weights, name)
        }
        for length in self._form_lengths if self.forms else ():
            self._check_form_length(length)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for number in itertools.count(own, workers):
            step, m = divmod(number, self.gradient_accumulation_steps)
            yield self.micro_batch(self.start_step + step, m)

    def micro_batch(self, step: int, m: int) -> dict[str, Tensor]:
        """Micro-batch m of this rank in an optimizer step."""
        first = self.group + self.num_groups * m
        return self._rows(step, slice(first, None, self.num_groups * self.gradient_accumulation_steps))

    def first_sequence(self) -> Tensor:
        """[1, T] tokens that are the same for all ranks, or slices of them: the stage's first sequence, text if any."""
        of_text = (step for step in range(self.training.steps) if self.kind_of_step(step) == "text")
        return self._rows(next(of_text, 0), slice(1))["input_ids"]

    def _rows(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Some sequences of the global batch of a step, or this rank's slices of them."""
        if self.kind_of_step(step) == "text":
            batch = self._text_rows(step, rows)
        else:
            batch = {name: tensor[rows].contiguous() for name, tensor in self._recall_step(step).items()}
        return rank_part(batch, self.training, self.part)

    def kind_of_step(self, step: int) -> str:
        """What the batch of an optimizer step is made of."""
        block, index = divmod(step, STEPS_PER_DRAW)
        return KINDS[_kinds_of_block(self.training.weights, self.data.seed, block)[index]]

    def name_of_step(self, step: int) -> str:
        """A description of an optimizer step's batch by which it can be found again."""
        kind = self.kind_of_step(step)
        if kind != "text":
            return f"{kind} of step {step}, counted from 0"
        N = self.training.tokens_per_step // self.training.sequence_length
        first = self.num_text_steps(step) * N
        return f"sequences {first} to {first + N - 1} of the text"

    def num_text_steps(self, steps: int) -> int:
        """How many of the first steps are of text."""
        block, rest = divmod(steps, STEPS_PER_DRAW)
        while len(self._text_steps) <= block:
            self._text_steps.append(self._text_steps[-1] + self._text_steps_of(len(self._text_steps) - 1))
        return self._text_steps[block] + self._text_steps_of(block, rest)

    def _text_steps_of(self, block: int, first: int = STEPS_PER_DRAW) -> int:
        """How many of the first steps of a block are of text."""
        kinds = _kinds_of_block(self.training.weights, self.data.seed, block)[:first]
        return int((kinds == KINDS.index("text")).sum())

    def _text_rows(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Some sequences of the global batch of a text step."""
        if self.text is None:
            raise RuntimeError("the text was not prepared; give TrainingBatches its tokens")
        N = self.training.tokens_per_step // self.training.sequence_length
        before = self.num_text_steps(step) * N
        sequences = [self.text.read(before + row) for row in range(N)[rows]]
        ids = torch.from_numpy(np.stack([ids for ids, _ in sequences]))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.data.reset_state_at_documents:
            batch["seq_idx"] = torch.from_numpy(np.stack([seq_idx for _, seq_idx in sequences]))
        return batch

    def _recall_step(self, step: int) -> dict[str, Tensor]:
        """The global batch of a step of recall data."""
        generator = np.random.default_rng([self.data.seed, RECALL_STREAM, step])
        kind = self.kind_of_step(step)
        if kind == "mqar":
            shapes = self.data.recall.shapes
            T, D = shapes[generator.integers(len(shapes))]
            N = self.training.tokens_per_step // T
            ids, labels = mqar_batch(generator, N, T, D, self.key_ids, self.value_ids)
        elif kind in self.forms:
            T = self._form_lengths[generator.integers(len(self._form_lengths))]
            ids, labels = form_batch(generator, self.training.tokens_per_step // T, T, self.forms[kind])
        else:
            T = self.training.sequence_length
            ids, labels = passkey_batch(generator, self.training.tokens_per_step // T, T, self.passkey)
        batch = {"input_ids": ids, "labels": labels}
        if self.data.reset_state_at_documents:
            batch["seq_idx"] = torch.zeros(ids.shape, dtype=torch.int32)
        return batch

    @property
    def _form_lengths(self) -> list[int]:
        return self.data.forms.lengths or [self.training.sequence_length]

    def _check_form_length(self, length: int) -> None:
        """Each form's text must fit, and each micro-batch of each rank must get a text."""
        field = "data.forms.lengths" if self.data.forms.lengths else "training.sequence_length"
        if self.training.tokens_per_step // length < self.num_groups * self.gradient_accumulation_steps:
            problem = "tokens_per_step gives fewer texts than there are ranks and micro-batches"
            raise UserError(field, length, problem, "use shorter texts or more tokens_per_step")
        for builder in self.forms.values():
            try:
                builder.build(np.random.default_rng(0), length)
            except UserError as error:
                raise UserError(field, length, error.problem, error.remedy) from error

    def _check_shapes(self) -> None:
        """A step of every recall shape must have a sequence for each micro-batch of each rank."""
        needed = self.num_groups * self.gradient_accumulation_steps
        for length, _ in self.data.recall.shapes:
            if self.training.tokens_per_step // length < needed:
                problem = f"tokens_per_step gives fewer than {needed} sequences, one for each rank and micro-batch"
                remedy = "use shorter shapes or more tokens_per_step"
                raise UserError("data.recall.shapes", length, problem, remedy)


def combined_seed(data_seed: int, run_seed: int) -> int:
    """The seed of everything random in the data of one run, another one for each pair of seeds."""
    return int(np.random.SeedSequence([data_seed, run_seed]).generate_state(1, np.uint64)[0])


def text_tokens(data: Data, training: Training, seed: int) -> int:
    """Tokens of text that a stage of training reads, however often it reads some of them."""
    if not training.weights.text:
        return 0
    blocks = -(-training.steps // STEPS_PER_DRAW)
    seed = combined_seed(data.seed, seed)
    kinds = np.concatenate([_kinds_of_block(training.weights, seed, block) for block in range(blocks)])
    return int((kinds[: training.steps] == KINDS.index("text")).sum()) * training.tokens_per_step


def text_windows(data: Data, training: Training, seed: int) -> int:
    """Tokens of text that must be prepared for a stage of training: all windows that it reads from."""
    return whole_windows(text_tokens(data, training, seed), training.sequence_length)


def rank_part(batch: dict[str, Tensor], training: Training, part: int) -> dict[str, Tensor]:
    """What the rank numbered `part` among those that share sequences gets of a batch: its slices of all segments."""
    parts = training.sequence_parallel
    if parts == 1:
        return batch
    slices = [slice_of(segment, part, parts) for segment in segments_of(batch, training.backpropagation_length)]
    return {name: torch.cat([each[name] for each in slices], dim=1) for name in slices[0]}


def slice_of(batch: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """One of `parts` equal slices of the sequences of a batch.

    `shift_labels`, the token to predict at each position, are computed before the sequences are cut, as a slice's last
    position predicts the first token of the next slice. transformers and our loss take them in place of `labels`.
    """
    return {name: tensor.chunk(parts, dim=1)[part].contiguous() for name, tensor in _with_targets(batch).items()}


def segments_of(batch: dict[str, Tensor], length: int | None) -> list[dict[str, Tensor]]:
    """The sequences of a batch in segments of `length` tokens, each like a slice of `slice_of`; None: all in one."""
    T = batch["input_ids"].shape[1]
    if length is None or length >= T:
        return [batch]
    parts = {name: tensor.split(length, dim=1) for name, tensor in _with_targets(batch).items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def _with_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with `shift_labels`, where it has labels."""
    if "shift_labels" in batch or "labels" not in batch:
        return batch
    return batch | {"shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}


def sequence_lengths(data: Data, training: Training) -> Iterator[tuple[str, int]]:
    """The lengths that sequences of a stage may have, each with the name of the field that sets it."""
    weights, lengths_of_forms = training.weights, data.forms.lengths or ()
    has_forms = any(getattr(weights, name) for name in FORMS)
    if weights.text or weights.passkey or (has_forms and not lengths_of_forms):
        yield "training.sequence_length", training.sequence_length
    if weights.mqar:
        yield from (("data.recall.shapes", length) for length, _ in data.recall.shapes)
    if has_forms:
        yield from (("data.forms.lengths", length) for length in lengths_of_forms)


def num_groups(training: Training, world_size: int) -> int:
    """How many groups of ranks share sequences.

    Raises:
        UserError: they do not make a whole number of groups.
    """
    size = training.sequence_parallel
    if world_size % size:
        problem = f"does not divide the number of processes, which is {world_size}"
        raise UserError("training.sequence_parallel", size, problem, f"start a multiple of {size} by torchrun")
    return world_size // size


def gradient_accumulation_steps(training: Training, world_size: int = 1) -> int:
    """Micro-batches of a step on each rank.

    Raises:
        UserError: the ranks do not make whole groups, or the step's sequences do not divide among the groups and
            micro-batches.
    """
    N, groups = training.tokens_per_step // training.sequence_length, num_groups(training, world_size)
    size = training.sequence_parallel
    one, several = ("process", "processes") if size == 1 else (f"{size} processes", f"times {size} processes")
    if N % groups:
        problem = f"its {N} sequences of {training.sequence_length} tokens do not divide among {groups} {several}"
        remedy = f"give a multiple of {training.sequence_length * groups}"
        raise UserError("training.tokens_per_step", training.tokens_per_step, problem, remedy)
    per_group = N // groups
    size = training.sequences_per_device or per_group
    if per_group % size:
        problem = f"does not divide the {per_group} sequences of a step on each {one}"
        remedy = f"give a divisor of {per_group}"
        raise UserError("training.sequences_per_device", size, problem, remedy)
    return per_group // size


@lru_cache(maxsize=64)
def _kinds_of_block(weights: Weights, seed: int, block: int) -> np.ndarray:
    """The kinds of steps block * STEPS_PER_DRAW and following, as indices of KINDS."""
    shares = np.array([getattr(weights, kind) for kind in KINDS])
    generator = np.random.default_rng([seed, KIND_STREAM, block])
    return generator.choice(len(KINDS), size=STEPS_PER_DRAW, p=shares / shares.sum())
