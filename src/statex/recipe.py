"""A recipe: one typed TOML file that describes a whole run. Unknown keys and bad values fail at once."""

import copy
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, ValidationError, create_model, model_validator

from statex.errors import UserError, explained
from statex.evaluation.suites import find_suite
from statex.expansion.config import ExpansionConfig, user_error
from statex.results.suites import SUITES
from statex.settings import (
    MOST_TOKENS,
    Beta,
    Data,
    FromList,
    Lengths,
    Name,
    Section,
    Text,
    TextSource,
    Weight,
    check_plain,
)


class Weights(Section):
    """The share of the steps that each kind of data gets; they need not add to 1."""

    text: Weight = 1.0
    mqar: Weight = 0.0
    passkey: Weight = 0.0
    phone_book: Weight = Field(default=0.0, description="names and numbers, then questions for some of the numbers")
    facts: Weight = Field(default=0.0, description="things and their colours in sentences, then questions")
    needles: Weight = Field(default=0.0, description="several numbers hidden in filler, then questions")
    copy_words: Weight = Field(default=0.0, description="eight words to be repeated after filler")

    @model_validator(mode="after")
    def _some_data(self):
        if sum(getattr(self, kind) for kind in type(self).model_fields) <= 0:
            raise ValueError("all weights are 0; give at least one kind of data a weight")
        return self


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes_of(value: Any) -> Any:
    """A size such as "60GiB" in bytes; all else as it is."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None:
        return value
    if match[2] not in UNITS:
        raise ValueError(f"has an unknown unit; use one of {', '.join(UNITS)}")
    return int(float(match[1]) * UNITS[match[2]])


ActivationMemory = Annotated[
    Literal["least", "most"] | Annotated[int, Field(ge=1, strict=True)], BeforeValidator(_bytes_of)
]


class Training(Section):
    """One stage of training; the defaults are the paper's post-training (arXiv 2509.22630, appendix)."""

    steps: int = Field(default=20_000, ge=1, le=10**8)
    tokens_per_step: int = Field(default=524_288, ge=1, le=2**26, description="over all ranks and accumulated batches")
    sequence_length: int = Field(
        default=65_536, ge=2, le=MOST_TOKENS, description="of text and passkey sequences, in tokens"
    )
    sequences_per_device: int | None = Field(
        default=None, ge=1, description="text sequences in one forward pass; default: as many as a step needs"
    )
    sequence_parallel: int = Field(
        default=1, ge=1, le=1024, description="consecutive processes that share each sequence, each with a slice of it"
    )
    weights: Weights = Weights()
    learning_rate: float = Field(default=3e-4, gt=0, le=10)
    fresh_learning_rate_multiplier: float = Field(
        default=1.0, gt=0, le=1e4, description="for tensors the plan made fresh"
    )
    train_only_expanded: bool = Field(default=False, description="freeze all but the mixers that the plan changed")
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=1000, ge=0)
    decay_steps: int | None = Field(default=None, ge=1, description="wsd only; default: a fifth of the steps")
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    betas: Annotated[tuple[Beta, Beta], FromList] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    max_grad_norm: float = Field(default=1.0, gt=0)
    bad_steps: Literal["stop", "skip"] = Field(
        default="stop", description="what a non-finite loss or gradients, or a spike, do; no weight changes"
    )
    most_bad_steps: int = Field(default=10, ge=0, description="that are skipped in a row; one more stops training")
    spike: float | None = Field(
        default=None, gt=0, description="nats of a step's loss above the recent ones of its kind of data; default: any"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute the activations of blocks again in the backward pass, for less memory"
    )
    activation_memory: ActivationMemory = Field(
        default="least",
        description='with gradient_checkpointing: "least" computes every block again, "most" only those that the GPU '
        'has no room for; or the bytes that training may take at its peak, such as "60GiB"',
    )
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="compile the blocks of the model; auto: on a GPU, of the families that were tried "
        "on one, without sequence_parallel",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="compute in bf16 over fp32 master weights; auto: bf16 where the device has it"
    )
    loss_chunk: int = Field(default=4096, ge=1, description="tokens whose logits exist at one time")
    save_every: int | None = Field(default=None, ge=1, description="default: a tenth of the steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=50, ge=1)
    watch_state_every: int | None = Field(
        default=None, ge=1, description="steps between two looks at how much of its new state an expanded arm uses"
    )
    report_to: list[str] = Field(default=[], description='for example ["tensorboard"] or ["wandb"]')
    trainer: dict[str, Any] = Field(
        default={},
        description="further fields of transformers.TrainingArguments, for example fsdp, but none that "
        "has a key of its own here",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.tokens_per_step % self.sequence_length:
            problem = f"is not a multiple of sequence_length = {self.sequence_length}"
            raise UserError("tokens_per_step", self.tokens_per_step, problem, "change one of them")
        if self.sequence_length % self.sequence_parallel:
            problem = f"does not divide sequence_length = {self.sequence_length}"
            raise UserError("sequence_parallel", self.sequence_parallel, problem, "change one of them")
        if self.compile is True and self.sequence_parallel > 1:
            problem = "does not go with sequence_parallel: states that come from another process are in no graph"
            raise UserError("compile", True, problem, "leave one of them out")
        if self.warmup_steps >= self.steps:
            problem = f"leaves nothing of steps = {self.steps}"
            raise UserError("warmup_steps", self.warmup_steps, problem, "shorten the warm-up")
        if self.decay_steps is not None and self.schedule != "wsd":
            problem = f'does not go with schedule = "{self.schedule}"'
            raise UserError("decay_steps", self.decay_steps, problem, 'remove it or use schedule = "wsd"')
        if (self.decay_steps or 0) + self.warmup_steps > self.steps:
            problem = f"and warmup_steps = {self.warmup_steps} are more than steps = {self.steps}"
            raise UserError("decay_steps", self.decay_steps, problem, "shorten one of them")
        if self.activation_memory != "least" and not self.gradient_checkpointing:
            problem = "is about gradient_checkpointing, which is off: all activations are kept"
            raise UserError("activation_memory", self.activation_memory, problem, "remove it, or switch that on")
        if self.learning_rate * self.weight_decay >= 1:
            problem = f"times learning_rate = {self.learning_rate} is 1 or more: a step would take all of a weight away"
            raise UserError("weight_decay", self.weight_decay, problem, "lower one of them")
        return self


class Model(Section):
    """The model a run starts from: a checkpoint, or a family and a configuration that are pre-trained from scratch."""

    checkpoint: Text | None = Field(default=None, description="folder or hub name of a pre-trained model")
    family: Text | None = Field(default=None, description="model type, for example statex_gla or mamba2")
    config: dict[str, Any] = Field(default={}, description="fields of the family's configuration")
    pretraining: Training | None = None

    @model_validator(mode="after")
    def _one_origin(self):
        if self.checkpoint is None and self.family is None:
            raise UserError("checkpoint", None, "and family are both missing", "give one of them")
        for name in ("family", "config", "pretraining") if self.checkpoint is not None else ():
            if value := getattr(self, name):
                raise UserError(name, value, "does not go with a checkpoint", "give one of them")
        if self.pretraining is not None and self.pretraining.train_only_expanded:
            problem = "nothing is expanded yet in pre-training"
            raise UserError("pretraining.train_only_expanded", True, problem, "remove it")
        return self


class Arm(Section):
    """One arm of the comparison.

    kind: "base" (the checkpoint untouched, evaluated only), "lpt" (post-trained without expansion), "statex"
    (expanded, then post-trained) or "control" (the mixers of the same layers re-initialised, the state not enlarged,
    then post-trained). `expansion` goes with statex and control, of which a control takes the layers only; its seed is
    the run's. `training` changes keys of the recipe's training section for this arm.
    """

    kind: Literal["base", "lpt", "statex", "control"]
    expansion: ExpansionConfig | None = None
    training: dict[str, Any] = Field(default={})
    models: list[str] | None = Field(default=None, description="names of the models it is for; default: all")

    @model_validator(mode="after")
    def _expansion_fits(self):
        if self.kind == "statex" and self.expansion is None:
            raise UserError("expansion", None, 'is missing in an arm of kind "statex"', "say what to expand")
        if self.kind in ("base", "lpt") and self.expansion is not None:
            remedy = 'remove it or use kind = "statex"'
            raise UserError("expansion", self.expansion, f'does not go with kind = "{self.kind}"', remedy)
        if self.expansion is not None and self.expansion.seed:
            raise UserError("expansion.seed", self.expansion.seed, "is the run's own", "remove it and set seeds")
        if self.kind == "base" and self.training:
            raise UserError("training", self.training, 'an arm of kind "base" is evaluated only', "remove it")
        return self


class HarnessTasks(Section):
    """What goes for lm-eval's tasks alone."""

    limit: int | None = Field(
        default=None, ge=1, description="items of each task, and of each of its lengths or shots; default: all"
    )
    lengths: Lengths | None = Field(default=None, description="tokens, of RULER's and our tasks; default: theirs")
    unsafe_code: bool = Field(default=False, description="run the code that a model writes: humaneval and mbpp need it")
    data: str | None = Field(default=None, description="folder of data sets that are read instead of the hub's")


class EvaluationBase(Section):
    """All of `[evaluation]` but the sections of our suites, one for each line of their table."""

    suites: list[str] = Field(
        default=["mqar", "passkey", "ar_hits", "nll_by_position"],
        description="suites, groups of them, and lm-eval's tasks: those of `statex eval --suite`",
    )
    batch_size: int = Field(default=16, ge=1, le=2**16)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of all arms while they are measured; auto: bfloat16 where training.precision computes in it on a "
        "GPU, else float32; of `statex eval`: as the model is stored",
    )
    seed: int = Field(default=1234, ge=0, description="of the items; all arms and seeds see the same ones")
    text: TextSource | None = Field(default=None, description="default: the held-out share of data.text")
    harness: HarnessTasks = HarnessTasks()

    def suite(self, name: str) -> Any:
        """The settings of one of our suites, in the class that stands beside its code."""
        return getattr(self, name)


if TYPE_CHECKING:
    Evaluation = EvaluationBase
else:
    Evaluation = create_model(
        "Evaluation",
        __base__=EvaluationBase,
        __module__=__name__,
        **{name: (find_suite(name).settings, find_suite(name).settings()) for name in SUITES},
    )


TOKENS = "tokens"
OTHER_NAMES = {
    "pretrained", "tokenizer", "shared", "figures", "recipe.toml", "results.jsonl", "report.html", "report.md",
}  # fmt: skip
"""What a run's folder holds beside the folders of its models and arms."""


class Recipe(Section):
    """A whole run: models, the arms that are compared on them, data, training, evaluation."""

    name: Name
    output: Text = Field(default="runs", description="the folder that runs are written to")
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    workers: int = Field(
        default=1, ge=1, le=1024, description="models and seeds worked on at once, each with its share of cores"
    )
    models: dict[Name, Model] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1)
    data: Data = Data()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _arms_fit(self):
        if self.name.lower() == TOKENS:
            raise UserError("name", self.name, "is the folder of prepared tokens", "give the run another name")
        for section, names in (("models", self.models), ("arms", self.arms)):
            for name in names:
                if name.lower() in OTHER_NAMES:
                    problem = "is the name of another file or folder of a run"
                    raise UserError(section, name, problem, "give it another name")
        for name, arm in self.arms.items():
            for model in arm.models or []:
                if model not in self.models:
                    known = f"known models: {', '.join(self.models)}"
                    raise UserError(f"arms.{name}.models", model, "is no model of this recipe", known)
            if self.arm_training(name).train_only_expanded and arm.kind == "lpt":
                problem = 'an arm of kind "lpt" has no expanded layers'
                raise UserError(f"arms.{name}.training.train_only_expanded", True, problem, "set it false for this arm")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds", self.seeds, "has a seed twice", "list each seed once")
        return self

    @property
    def folder(self) -> Path:
        """The folder of this run, `output`/`name`."""
        return Path(self.output) / self.name

    @property
    def tokens(self) -> Path:
        """The folder of prepared tokens, which runs beside one another share."""
        return Path(self.data.tokens) if self.data.tokens is not None else Path(self.output) / TOKENS

    def arm_training(self, arm: str) -> Training:
        """The training section with the changes of one arm.

        Raises:
            UserError: the changes have an unknown key, or a value of the wrong type or range.
        """
        try:
            return Training.model_validate(self.training.model_dump() | self.arms[arm].training)
        except ValidationError as error:
            cause = user_error(error)
            raise UserError(f"arms.{arm}.training.{cause.field}", cause.value, cause.problem, cause.remedy) from None

    def arms_of(self, model: str) -> dict[str, Arm]:
        """The arms that are run on one of the models, in the recipe's order."""
        return {name: arm for name, arm in self.arms.items() if arm.models is None or model in arm.models}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file and apply `section.key=value` overrides, whose values are TOML.

    A recipe that `extends` another, named by its path from this one, says what it changes of it: tables are merged,
    key by key, everything else is replaced.

    Raises:
        UserError: no such file, no valid TOML, recipes that extend one another, an unknown key, or a value of the
            wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("recipe", str(path), "there is no such file", "give the path of a TOML recipe")
    values = _read_values(path, ())
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, relative_to=path.parent)


def _read_values(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the recipe that it extends, with the paths of both made absolute."""
    with explained("recipe", str(path), "is not valid TOML", "correct that line"):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    check_plain(values)
    make_paths_absolute(values, path.parent)
    if "extends" not in values:
        return values
    other, chain = values.pop("extends"), (*extended_by, path.resolve())
    if not isinstance(other, str):
        raise UserError("extends", other, "is not a path", "give the path of another recipe, seen from this one")
    base = path.parent / other
    if not os.path.isfile(base):  # unlike Path.is_file, False too where no file can have that name
        raise UserError("extends", other, f"there is no such file beside {path}", "give the path of another recipe")
    if base.resolve() in chain:
        names = " -> ".join(each.name for each in (*chain, base))
        raise UserError("extends", other, f"leads back to itself ({names})", "take one of them out")
    return merged(_read_values(base, chain), values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Both in one: tables are merged at any depth, all other values are those of `changes` where it has them."""
    both = base | changes
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = merged(base[key], changes[key])
    return both


def parse_recipe(values: dict[str, Any], relative_to: Path | None = None) -> Recipe:
    """Check the values of a recipe; paths of data become absolute, seen from `relative_to`."""
    check_plain(values)
    values = copy.deepcopy(values)
    if relative_to is not None:
        make_paths_absolute(values, relative_to)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise user_error(error) from None


def make_paths_absolute(values: dict[str, Any], folder: Path) -> None:
    """Have the paths of data, where they are ones, seen from `folder`."""
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("tokens"), str):
        data["tokens"] = str(folder.resolve() / data["tokens"])
    for section in (data, values.get("evaluation")):
        source = section.get("text") if isinstance(section, dict) else None
        if isinstance(source, dict) and isinstance(source.get("files"), list):
            source["files"] = [str(folder.resolve() / str(pattern)) for pattern in source["files"]]
    harness = values["evaluation"].get("harness") if isinstance(values.get("evaluation"), dict) else None
    if isinstance(harness, dict) and isinstance(harness.get("data"), str):
        harness["data"] = str(folder.resolve() / harness["data"])


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key, `section.key=value`; a value that is not TOML is taken as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError("--set", override, "is not of the form section.key=value", "write for example seeds=[0,1,2]")
    value = _value_of_override(override, text)
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError("--set", override, f"{section} is not a section", "name a key inside a section")
    target[last] = value


def _value_of_override(override: str, text: str) -> Any:
    """The value behind `=`: TOML, or else the text itself; never a part of it."""
    with explained("--set", override, "has a value that is not valid TOML", "correct the value"):
        try:
            document = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            document = {"value": text}
    if len(document) > 1 or ("\n" in text and document["value"] == text):
        raise UserError("--set", override, "has more than one line", "give --set once for each key")
    return document["value"]


class EvaluationSections(Section):
    """The sections of a recipe that measuring a single model needs."""

    data: Data = Data()
    evaluation: Evaluation = Evaluation()


def evaluation_sections(overrides: Sequence[str], suites: list[str]) -> EvaluationSections:
    """The evaluation of one model outside a recipe: the defaults with `section.key=value` overrides.

    Raises:
        UserError: an unknown key, or a value of the wrong type or range.
    """
    values: dict[str, Any] = {"evaluation": {"suites": suites}}
    for override in overrides:
        apply_override(values, override)
    try:
        return EvaluationSections.model_validate(values)
    except ValidationError as error:
        raise user_error(error) from None
