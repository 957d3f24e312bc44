"""The stages of a chain: what each checks before a run begins, what it does, and how it is known to be finished.

Every stage writes under another name and then renames; finished work is not repeated. Stages write to

    <model>/pretrained-seed<k>/trained/      of a model that is made from scratch
    <model>/<arm>-seed<k>/{expanded,trained}/, training.json, evaluation/, results.jsonl, diagnostics.jsonl
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from statex.expansion.config import ExpansionConfig
from statex.recipe import Arm, Recipe, Training
from statex.results import write_results
from statex.run.arms import CHANGED_KINDS, change_by_arm, plan_of_arm
from statex.run.inputs import Inputs, errors_in
from statex.run.measuring import (
    DIAGNOSTICS,
    RESULTS,
    begin_evaluation,
    diagnosis,
    lacked_data,
    measurements,
    was_measured_by,
)
from statex.run.selection import Chain
from statex.training import SUMMARY

StageProgress = Callable[[str, int, int], None]
"""Called with a stage's title, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Stage(ABC):
    """One stage of one model and seed."""

    recipe: Recipe
    model: str
    seed: int
    is_shared: ClassVar[bool] = False
    """Whether several selections share it: one process runs it, and the others wait."""
    by_one_process: ClassVar[bool] = False
    """Whether under torchrun the first process runs it alone, and the others wait."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name in the progress display."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder it writes to."""

    @abstractmethod
    def check(self, inputs: Inputs) -> None:
        """Raise what the stage would raise, as far as can be known before anything is written.

        Raises:
            UserError: the stage cannot run with a value of the recipe, a checkpoint or a text.
        """

    @abstractmethod
    def is_finished(self) -> bool:
        """Whether everything that the stage writes exists."""

    def is_needed(self) -> bool:
        """Whether there is anything to do."""
        return not self.is_finished()

    @abstractmethod
    def run(self, progress: StageProgress) -> None:
        """Run the stage."""

    @property
    def base(self) -> Path:
        """The folder of the checkpoint that the chain starts from; `PreTrain` makes it where the recipe names none."""
        checkpoint = self.recipe.models[self.model].checkpoint
        if checkpoint is not None:
            return Path(checkpoint)
        return self.recipe.folder / self.model / f"pretrained-seed{self.seed}" / "trained"


@dataclass(frozen=True)
class PrepareTokens(Stage):
    """Tokenise the training text as far as the stages of one model need it; stages share the result."""

    by_one_process = True
    title = "prepare tokens"

    @property
    def folder(self) -> Path:
        return self.recipe.tokens

    @property
    def needed(self) -> int:
        """Tokens to prepare for the model's longest training, with any seed."""
        from statex.data.mixture import text_windows

        trainings = list(_trainings(self.recipe, self.model))
        return max(
            (text_windows(self.recipe.data, each, seed) for each in trainings for seed in self.recipe.seeds), default=0
        )

    def check(self, inputs: Inputs) -> None:
        """Nothing: the stages that read the text check it."""

    def is_finished(self) -> bool:
        from statex.data.tokens import are_prepared

        needed = self.needed
        if not needed or self._is_used_up():
            return True
        return are_prepared(self.recipe.data, self.tokenizer(), self.folder, needed)

    def _is_used_up(self) -> bool:
        """Whether every model that reads the tokens is trained."""
        arms = self.recipe.arms_of(self.model).items()
        folders = [arm_folder(self.recipe, self.model, name, self.seed) for name, arm in arms if arm.kind != "base"]
        if self.recipe.models[self.model].pretraining is not None:
            folders.append(self.base.parent)
        return all((folder / SUMMARY).exists() for folder in folders)

    def run(self, progress: StageProgress) -> None:
        from statex.data.tokens import prepare_tokens

        shown = partial(progress, self.title)
        prepare_tokens(self.recipe.data, self.tokenizer(), self.folder, self.needed, progress=shown)

    def tokenizer(self) -> Any:
        """That of the model."""
        from statex.checkpoint import load_tokenizer, read_tokenizer

        checkpoint = self.recipe.models[self.model].checkpoint
        return read_tokenizer(self.recipe.folder / "tokenizer") if checkpoint is None else load_tokenizer(checkpoint)


@dataclass(frozen=True)
class PreTrain(Stage):
    """Make a model of the recipe's configuration and train it."""

    is_shared = True
    title = "pre-train"

    @property
    def folder(self) -> Path:
        return self.base.parent

    def check(self, inputs: Inputs) -> None:
        training, section = self.recipe.models[self.model].pretraining, f"models.{self.model}.pretraining"
        assert training is not None
        inputs.check_training(section, training)
        inputs.check_batches(section, training, self.model)

    def is_finished(self) -> bool:
        return (self.folder / SUMMARY).exists()

    def run(self, progress: StageProgress) -> None:
        from transformers import set_seed

        from statex.checkpoint import read_tokenizer
        from statex.models.scratch import make_model
        from statex.training.trainer import train

        progress(self.title, 0, 1)
        section = self.recipe.models[self.model]
        assert section.pretraining is not None
        tokenizer = read_tokenizer(self.recipe.folder / "tokenizer")
        set_seed(self.seed)
        network = make_model(section.family, section.config, tokenizer)
        train(
            network, tokenizer, self.recipe.data, section.pretraining, self.folder, seed=self.seed,
            progress=partial(progress, self.title), tokens=self.recipe.tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class ArmStage(Stage):
    """A stage of one arm."""

    arm: str
    verb: ClassVar[str]

    @property
    def title(self) -> str:
        return f"{self.verb} {self.arm}"

    @property
    def folder(self) -> Path:
        return arm_folder(self.recipe, self.model, self.arm, self.seed)

    @property
    def settings(self) -> Arm:
        """The arm's section of the recipe."""
        return self.recipe.arms[self.arm]

    @property
    def section(self) -> str:
        """The recipe's section with the arm's training settings."""
        return f"arms.{self.arm}.training" if self.settings.training else "training"

    @property
    def start(self) -> Path:
        """The folder of the model that the arm's training starts from."""
        return self.folder / "expanded" if self.settings.kind in CHANGED_KINDS else self.base

    @property
    def trained(self) -> Path:
        """The folder of the model that is measured."""
        return self.base if self.settings.kind == "base" else self.folder / "trained"

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that all of the arm's results share."""
        return {"model": self.model, "arm": self.arm, "seed": self.seed}


@dataclass(frozen=True)
class Expand(ArmStage):
    """Expand the model or, for a control, re-initialise the same layers."""

    verb = "expand"
    by_one_process = True

    def check(self, inputs: Inputs) -> None:
        from statex.models.trial import try_model
        from statex.training.memory import size_of

        if not inputs.is_new("expand", self.model, self.arm):
            return
        outline, expansion = inputs.outline(self.model), self.settings.expansion or ExpansionConfig()
        with errors_in(f"arms.{self.arm}.expansion"):
            plan = plan_of_arm(outline.network, self.settings)
        grown = size_of(outline.network, plan)
        own = f"arms.{self.arm}.expansion", expansion.model_dump(exclude_unset=True)
        inputs.require_memory(*own, grown, self.section, self.recipe.arm_training(self.arm))
        try_model(*own, outline.config, grown.weights + grown.state, partial(change_by_arm, self.settings))

    def is_finished(self) -> bool:
        return self.start.exists()

    def run(self, progress: StageProgress) -> None:
        from statex.checkpoint import load, save_with_companions

        progress(self.title, 0, 1)
        network = load(self.base)
        expansion = (self.settings.expansion or ExpansionConfig()).model_copy(update={"seed": self.seed})
        change_by_arm(self.settings.model_copy(update={"expansion": expansion}), network)
        save_with_companions(network, self.base, self.start)


@dataclass(frozen=True)
class Train(ArmStage):
    """Train an arm in fp32; it is saved in the dtype that it started from, under a card that names the checkpoint."""

    verb = "train"

    def check(self, inputs: Inputs) -> None:
        from statex.training.blocks import check_compile
        from statex.training.slices import check_slices

        training, outline = self.recipe.arm_training(self.arm), inputs.outline(self.model)
        with errors_in(self.section):
            check_slices(training, self.recipe.data, outline.network)
        inputs.check_training(self.section, training)
        check_compile(self.section, training, outline.config)
        if self.settings.kind == "lpt":
            inputs.require_memory(outline.field, outline.value, outline.size, self.section, training)
        inputs.check_batches(self.section, training, self.model)

    def is_finished(self) -> bool:
        return (self.folder / SUMMARY).exists()

    def run(self, progress: StageProgress) -> None:
        import torch

        from statex.checkpoint import base_name, load, load_tokenizer, stored_dtype
        from statex.training.trainer import train

        progress(self.title, 0, 1)
        train(
            load(self.start, dtype=torch.float32), load_tokenizer(self.start), self.recipe.data,
            self.recipe.arm_training(self.arm), self.folder, seed=self.seed, progress=partial(progress, self.title),
            base=base_name(self.base), dtype=stored_dtype(self.start), tokens=self.recipe.tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluate(ArmStage):
    """Measure a trained arm with the recipe's evaluation, replacing results of other settings."""

    verb = "evaluate"

    def check(self, inputs: Inputs) -> None:
        from statex.evaluation import check_items

        if not inputs.is_new("evaluate", self.model):
            return
        recipe = self.recipe
        learns_recall = any(training.weights.mqar for training in _trainings(recipe, self.model))
        outline = inputs.outline(self.model)
        check_items(
            outline.tokenizer, recipe.evaluation, recipe.evaluation.text or recipe.data.text,
            recipe.training.sequence_length, recipe.data.recall if learns_recall else None, outline.limit,
            f"models.{self.model}",
        )  # fmt: skip

    def is_finished(self) -> bool:
        return (self.folder / RESULTS).exists() and was_measured_by(self.folder, self.recipe.evaluation)

    def is_needed(self) -> bool:
        return not self.is_finished() or lacked_data(self.folder)

    def run(self, progress: StageProgress) -> None:
        begun_before = begin_evaluation(self.folder, self.recipe.evaluation)
        results = measurements(
            self.recipe, self.trained, self.folder, begun_before, self.facts,
            lambda suite, done, total: progress(f"{self.title}: {suite}", done, total),
        )  # fmt: skip
        write_results(self.folder / RESULTS, results)


@dataclass(frozen=True)
class Diagnose(ArmStage):
    """Examine how a trained arm uses what its expansion added."""

    verb = "diagnose"

    def check(self, inputs: Inputs) -> None:
        """Nothing: it needs only what `Evaluate` checks."""

    def is_finished(self) -> bool:
        return (self.folder / DIAGNOSTICS).exists()

    def run(self, progress: StageProgress) -> None:
        progress(self.title, 0, 1)
        results = diagnosis(self.recipe, self.trained, self.start, self.facts)
        write_results(self.folder / DIAGNOSTICS, results)


def training_stages(recipe: Recipe, chain: Chain) -> list[Stage]:
    """The stages that make and train the models of a chain, in order."""
    of_chain = recipe, chain.model, chain.seed
    stages: list[Stage] = [PrepareTokens(*of_chain)]
    if recipe.models[chain.model].pretraining is not None:
        stages.append(PreTrain(*of_chain))
    for arm in chain.arms:
        if recipe.arms[arm].kind in CHANGED_KINDS:
            stages.append(Expand(*of_chain, arm))
        if recipe.arms[arm].kind != "base":
            stages.append(Train(*of_chain, arm))
    return stages


def measuring_stages(recipe: Recipe, chain: Chain) -> list[Stage]:
    """The stages that measure the trained models of a chain, in order."""
    stages: list[Stage] = []
    for arm in chain.arms:
        stages.append(Evaluate(recipe, chain.model, chain.seed, arm))
        if recipe.arms[arm].kind in CHANGED_KINDS:
            stages.append(Diagnose(recipe, chain.model, chain.seed, arm))
    return stages


def arm_folder(recipe: Recipe, model: str, arm: str, seed: int) -> Path:
    """Where one arm of one model and seed is kept."""
    return recipe.folder / model / f"{arm}-seed{seed}"


def _trainings(recipe: Recipe, model: str) -> Iterator[Training]:
    """The training sections of one model, in all its arms."""
    pretraining = recipe.models[model].pretraining
    if pretraining is not None:
        yield pretraining
    for name, arm in recipe.arms_of(model).items():
        if arm.kind != "base":
            yield recipe.arm_training(name)
