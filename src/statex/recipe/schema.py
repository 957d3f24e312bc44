"""What a recipe may say: its sections, the keys of each with their types, ranges and defaults."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, ValidationError, create_model, model_validator

from statex.errors import UserError
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
)


class Weights(Section):
    """The share of the steps that each kind of data gets; they need not add up to 1."""

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
    """A size such as "60GiB" in bytes; anything else unchanged."""
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
    backpropagation_length: int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        description="tokens that a backward pass goes back over: longer sequences are run in segments of so many, each "
        "of which begins with the states that the one before ended with; default: whole sequences",
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
        default="stop",
        description="what to do about a step with a non-finite loss or gradients, or a spike; it changes no weight",
    )
    most_bad_steps: int = Field(default=10, ge=0, description="bad steps skipped in a row; one more stops training")
    spike: float | None = Field(
        default=None,
        gt=0,
        description="nats by which a step's loss may exceed the recent mean of its kind of data; default: any",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute the activations of blocks in the backward pass, to save memory"
    )
    activation_memory: ActivationMemory = Field(
        default="least",
        description='with gradient_checkpointing: "least" recomputes every block, "most" only those that the GPU has '
        'no room for; or the bytes that training may use at its peak, such as "60GiB"',
    )
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="compile the blocks of the model; auto: on a GPU, of the families that were tried "
        "on one, without sequence_parallel and backpropagation_length",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        default="auto",
        description="run forward and backward of a micro-batch as one CUDA graph, so that a small model does not wait "
        "for the host; auto: on one GPU, for GLA and Mamba2, without gradient_checkpointing, sequence_parallel, "
        "backpropagation_length and data.reset_state_at_documents",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="compute in bf16 over fp32 master weights; auto: bf16 where the device has it"
    )
    residual_precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the residual stream between blocks and its gradient; bf16, for training that computes in bf16, "
        "halves the bytes that blocks hand on and keep",
    )
    loss_chunk: int = Field(default=4096, ge=1, description="tokens whose logits exist at once")
    save_every: int | None = Field(default=None, ge=1, description="default: a tenth of the steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=50, ge=1)
    watch_state_every: int | None = Field(
        default=None, ge=1, description="steps between measurements of how much of its new state an expanded arm uses"
    )
    report_to: list[str] = Field(default=[], description='for example ["tensorboard"] or ["wandb"]')
    trainer: dict[str, Any] = Field(
        default={},
        description="further fields of transformers.TrainingArguments, for example fsdp, except those that "
        "have a key of their own here",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.tokens_per_step % self.sequence_length:
            problem = f"is not a multiple of sequence_length = {self.sequence_length}"
            raise UserError("tokens_per_step", self.tokens_per_step, problem, "change one of them")
        if self.sequence_length % self.sequence_parallel:
            problem = f"does not divide sequence_length = {self.sequence_length}"
            raise UserError("sequence_parallel", self.sequence_parallel, problem, "change one of them")
        segment = self.backpropagation_length
        if segment is not None and self.sequence_length % segment:
            problem = f"does not divide sequence_length = {self.sequence_length}"
            raise UserError("backpropagation_length", segment, problem, "change one of them")
        if segment is not None and segment % self.sequence_parallel:
            problem = f"is no multiple of sequence_parallel = {self.sequence_parallel}"
            raise UserError("backpropagation_length", segment, problem, "change one of them")
        if self.compile is True and segment is not None:
            problem = "does not go with backpropagation_length: states that are carried over are in no graph"
            raise UserError("compile", True, problem, "leave one of them out")
        if self.compile is True and self.sequence_parallel > 1:
            problem = "does not go with sequence_parallel: states that come from another process are in no graph"
            raise UserError("compile", True, problem, "leave one of them out")
        if self.warmup_steps >= self.steps:
            problem = f"leaves no steps after the warm-up: steps = {self.steps}"
            raise UserError("warmup_steps", self.warmup_steps, problem, "shorten the warm-up")
        if self.decay_steps is not None and self.schedule != "wsd":
            problem = f'does not go with schedule = "{self.schedule}"'
            raise UserError("decay_steps", self.decay_steps, problem, 'remove it or use schedule = "wsd"')
        if (self.decay_steps or 0) + self.warmup_steps > self.steps:
            problem = f"and warmup_steps = {self.warmup_steps} together exceed steps = {self.steps}"
            raise UserError("decay_steps", self.decay_steps, problem, "shorten one of them")
        if self.activation_memory != "least" and not self.gradient_checkpointing:
            problem = "has no effect without gradient_checkpointing: all activations are kept"
            raise UserError(
                "activation_memory", self.activation_memory, problem, "remove it, or set gradient_checkpointing = true"
            )
        if self.residual_precision == "bf16" and self.precision == "fp32":
            problem = 'does not go with precision = "fp32": a stream in bf16 needs blocks that compute in it'
            raise UserError("residual_precision", "bf16", problem, "remove one of them")
        if self.learning_rate * self.weight_decay >= 1:
            problem = f"times learning_rate = {self.learning_rate} is 1 or more: one step would remove the whole weight"
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
    then post-trained). `expansion` is for statex and control arms (a control uses only its layers); its
    seed is the run's. `training` changes keys of the recipe's training section for this arm.
    """

    kind: Literal["base", "lpt", "statex", "control"]
    expansion: ExpansionConfig | None = None
    training: dict[str, Any] = Field(default={})
    models: list[str] | None = Field(default=None, description="names of the models that it is run on; default: all")

    @model_validator(mode="after")
    def _expansion_fits(self):
        if self.kind == "statex" and self.expansion is None:
            raise UserError("expansion", None, 'is missing in an arm of kind "statex"', "say what to expand")
        if self.kind in ("base", "lpt") and self.expansion is not None:
            remedy = 'remove it or use kind = "statex"'
            raise UserError("expansion", self.expansion, f'does not go with kind = "{self.kind}"', remedy)
        if self.expansion is not None and self.expansion.seed:
            raise UserError("expansion.seed", self.expansion.seed, "is set by the run", "remove it and set seeds")
        if self.kind == "base" and self.training:
            raise UserError("training", self.training, 'an arm of kind "base" is evaluated only', "remove it")
        return self


class HarnessTasks(Section):
    """Settings of lm-eval's tasks alone."""

    limit: int | None = Field(
        default=None, ge=1, description="items of each task, and of each of its lengths or shots; default: all"
    )
    lengths: Lengths | None = Field(default=None, description="tokens, of RULER's and our tasks; default: theirs")
    unsafe_code: bool = Field(default=False, description="run the code that a model writes: humaneval and mbpp need it")
    data: str | None = Field(default=None, description="folder of data sets to read instead of the hub's")


class EvaluationBase(Section):
    """All of `[evaluation]` but the sections of our suites, one for each line of their table."""

    suites: list[str] = Field(
        default=["mqar", "passkey", "ar_hits", "nll_by_position"],
        description="suites, groups and lm-eval's tasks, as in `statex eval --suite`",
    )
    batch_size: int = Field(default=16, ge=1, le=2**16)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of all arms while they are measured; auto: bfloat16 where training.precision uses it on a GPU, "
        "else float32; in `statex eval`: as the model is stored",
    )
    seed: int = Field(default=1234, ge=0, description="of the items, which are the same for all arms and seeds")
    text: TextSource | None = Field(default=None, description="default: the held-out share of data.text")
    harness: HarnessTasks = HarnessTasks()

    def suite(self, name: str) -> Any:
        """The settings of one of our suites, in the class defined next to its code."""
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
"""What a run's folder holds besides the folders of its models and arms."""


class Recipe(Section):
    """A whole run: models, the arms that are compared on them, data, training, evaluation."""

    name: Name
    output: Text = Field(default="runs", description="the folder that runs are written to")
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="models, seeds and arms to work on in parallel, each with its share of the cores",
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
                    raise UserError(f"arms.{name}.models", model, "is not a model of this recipe", known)
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
        """The folder of prepared tokens, shared by runs in the same output folder."""
        return Path(self.data.tokens) if self.data.tokens is not None else Path(self.output) / TOKENS

    def arm_training(self, arm: str) -> Training:
        """The training section with the changes of one arm.

        Raises:
            UserError: a change has an unknown key, or a value of the wrong type or range.
        """
        try:
            return Training.model_validate(self.training.model_dump() | self.arms[arm].training)
        except ValidationError as error:
            cause = user_error(error)
            raise UserError(f"arms.{arm}.training.{cause.field}", cause.value, cause.problem, cause.remedy) from None

    def arms_of(self, model: str) -> dict[str, Arm]:
        """The arms that are run on one of the models, in the recipe's order."""
        return {name: arm for name, arm in self.arms.items() if arm.models is None or model in arm.models}


class EvaluationSections(Section):
    """The sections of a recipe that measuring a single model needs."""

    data: Data = Data()
    evaluation: Evaluation = Evaluation()
