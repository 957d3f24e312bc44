"""What the stages of a recipe are checked against before anything is written; shared by all, and made once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from statex.errors import UserError
from statex.recipe import Recipe, Training
from statex.run.launch import world_size


@dataclass(frozen=True)
class Outline:
    """A model before it is made or loaded.

    Args:
        field, value: where the recipe names it and what it says, for errors.
        network: on the meta device.
        size: its weights and state (`statex.training.memory.Size`).
        limit: the most tokens that it can read, None for a purely recurrent one.
    """

    field: str
    value: Any
    config: Any
    tokenizer: Any
    network: Any
    size: Any
    limit: int | None


class Inputs:
    """A recipe's tokenizer and the outlines of its models.

    Args:
        is_started: whether the processes that will train are already running; else this may be a single one.
    """

    def __init__(self, recipe: Recipe, *, is_started: bool = True):
        self.recipe, self.is_started = recipe, is_started
        self._outlines: dict[str, Outline] = {}
        self._seen: set[tuple[str, ...]] = set()

    def is_new(self, *check: str) -> bool:
        """Whether this check has not been made yet: most stages share a section or a model."""
        is_new = check not in self._seen
        self._seen.add(check)
        return is_new

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the models made from scratch, from the run's folder or trained; None without any."""
        from statex.checkpoint import read_tokenizer
        from statex.data.tokenizer import train_tokenizer

        if all(model.family is None for model in self.recipe.models.values()):
            return None
        folder = self.recipe.folder / "tokenizer"
        if folder.is_dir():
            return read_tokenizer(folder)
        return train_tokenizer(self.recipe.data.text, self.recipe.data.tokenizer, self.recipe.data.recall)

    def outline(self, model: str) -> Outline:
        """The outline of one of the recipe's models, checked against the memory and tried on a few tokens.

        Raises:
            UserError: a checkpoint that is incomplete or has no tokenizer, or a configuration whose model cannot be
                trained here.
        """
        if model not in self._outlines:
            self._outlines[model] = self._make_outline(model)
        return self._outlines[model]

    def _make_outline(self, name: str) -> Outline:
        from statex.models.limits import context_limit
        from statex.models.trial import model_without_memory, try_model
        from statex.training.blocks import check_compile
        from statex.training.memory import size_of
        from statex.training.slices import check_slices

        model = self.recipe.models[name]
        with errors_in(f"models.{name}"):
            config, tokenizer = self._config_and_tokenizer(name)
        key, value = ("config", model.config) if model.checkpoint is None else ("checkpoint", model.checkpoint)
        field = f"models.{name}.{key}"
        network = model_without_memory(field, value, config)
        size = size_of(network)
        if model.pretraining is not None:
            section = f"models.{name}.pretraining"
            check_compile(section, model.pretraining, config)
            with errors_in(section):
                check_slices(model.pretraining, self.recipe.data, network)
            self.require_memory(field, value, size, section, model.pretraining)
        try_model(field, value, config, size.weights + size.state)
        return Outline(field, value, config, tokenizer, network, size, context_limit(network))

    def _config_and_tokenizer(self, name: str) -> tuple[Any, Any]:
        from statex.checkpoint import inspect, load_config, load_tokenizer
        from statex.models.scratch import make_config

        model = self.recipe.models[name]
        if model.checkpoint is None:
            if model.pretraining is None:
                raise UserError("pretraining", None, "is missing", "say how the model of this family is pre-trained")
            return make_config(model.family, model.config, self.tokenizer), self.tokenizer
        inspect(model.checkpoint)
        config, tokenizer = load_config(model.checkpoint), load_tokenizer(model.checkpoint)
        if tokenizer is None:
            raise UserError(
                "checkpoint", model.checkpoint, "has no tokenizer", "save the model's tokenizer into its folder"
            )
        return config, tokenizer

    def require_memory(self, field: str, value: Any, size: Any, section: str, training: Training) -> None:
        """Raise UserError where a stage of training needs more memory than there is (`statex.training.memory`)."""
        from statex.training.memory import require_memory

        if self.is_started:
            require_memory(field, value, size, section, training, self.recipe.data.recall)

    def check_training(self, section: str, training: Training) -> None:
        """Raise what a stage of training would raise about its settings; `section` is their name in the recipe."""
        import torch

        from statex.training.captured import check_capture
        from statex.training.trial import try_training

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_capture(
            section, training, self.recipe.data,
            device=device if self.is_started else None, world_size=world_size() if self.is_started else 1,
        )  # fmt: skip
        if self.is_new("training", training.model_dump_json()):
            with errors_in(section):
                try_training(training, self.recipe.data.reset_state_at_documents, self.is_started)

    def check_batches(self, section: str, training: Training, model: str) -> None:
        """Raise what a stage of training would raise about its data."""
        from statex.data.mixture import TrainingBatches, sequence_lengths
        from statex.models.limits import require_context

        if self.is_new("batches", model, training.model_dump_json()):
            outline = self.outline(model)
            processes = world_size() if self.is_started else training.sequence_parallel
            with errors_in(section):
                for field, length in sequence_lengths(self.recipe.data, training):
                    require_context(field, length, length, outline.limit, f"models.{model}")
                TrainingBatches(self.recipe.data, training, outline.tokenizer, world_size=processes)


@contextmanager
def errors_in(section: str) -> Iterator[None]:
    """Name the field of an error as the recipe does: within the stage's section, or in full for `data`."""
    try:
        yield
    except UserError as error:
        named_in_full = error.field.startswith(("data.", "evaluation."))
        field = error.field if named_in_full else f"{section}.{error.field.removeprefix('training.')}"
        raise UserError(field, error.value, error.problem, error.remedy) from error
