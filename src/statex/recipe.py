"""A recipe: one typed TOML file that describes a whole run. Unknown keys and bad values fail at once."""

import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from statex.errors import UserError
from statex.expansion.config import ExpansionConfig, user_error

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is also a folder's."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]
"""At least one number, none below 1."""


class Section(BaseModel):
    """A part of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(Section):
    """Where documents come from: exactly one of a hub data set, files, or Python's own standard library.

    `files` are paths or globs; relative ones are looked up from the folder of the recipe. The ending of a file,
    whatever its case, says what it is: .jsonl (or .ndjson), .json, .csv, .tsv and .parquet are tables, of which only
    the column `field` is read; .txt, .md, .py and their like are plain text, one document a file. All but parquet may
    be compressed (.gz, .bz2, .xz, .zst). A file of any other ending needs `format`.
    """

    hub: str | None = Field(default=None, description="data set on the Hugging Face hub")
    hub_config: str | None = None
    split: str = "train"
    files: list[str] | None = None
    standard_library: bool = Field(default=False, description="sources of Python's standard library")
    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet"] | None = Field(
        default=None, description="what all files are; default: what the ending of each says"
    )
    bad_records: Literal["error", "skip"] = Field(
        default="error",
        description="what a record that cannot be read is: a line that is no JSON or not UTF-8, or has no text in "
        "`field`; those skipped are counted and told",
    )
    field: str = Field(default="text", description="column of tables and hub data that holds the text")
    held_out: float = Field(default=0.05, gt=0, lt=1, description="share of the documents kept for evaluation")

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("hub", "files", "standard_library") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("needs exactly one of hub, files and standard_library; give one of them")
        return self

    def identity(self) -> dict[str, Any]:
        """What says which documents these are: all but what becomes of those that cannot be read."""
        return self.model_dump(mode="json", exclude={"bad_records"})


class Recall(Section):
    """Synthetic associative recall (MQAR, arXiv 2312.04927): pairs of a key and a value, then queries for values.

    Every batch is one of `shapes`, chosen at random.
    """

    num_keys: int = Field(default=64, ge=2)
    num_values: int = Field(default=64, ge=2)
    shapes: list[tuple[int, int]] = Field(
        default=[(16, 4), (32, 8), (64, 16), (128, 32)], description="(sequence length, number of pairs)"
    )

    @model_validator(mode="after")
    def _shapes_fit(self):
        for length, pairs in self.shapes:
            if not 1 <= pairs <= min(self.num_keys, self.num_values, length // 4):
                problem = "has more pairs than num_keys, than num_values or than a quarter of its length, or none"
                raise UserError("shapes", [length, pairs], problem, "give fewer pairs or a longer length")
        return self


class Tokenizer(Section):
    """The byte-level BPE tokenizer that is trained from the recipe's text when a model is made from scratch."""

    vocab_size: int = Field(default=512, ge=300, description="with the 256 bytes and the reserved recall tokens")
    training_bytes: int = Field(default=5_000_000, ge=1, description="of text that it is trained on, at most")


class Data(Section):
    text: TextSource = TextSource(standard_library=True)
    recall: Recall = Recall()
    tokenizer: Tokenizer = Tokenizer()
    reset_state_at_documents: bool = Field(
        default=False, description="start a fresh state at each document border of a packed sequence"
    )
    shuffle_buffer: int = Field(default=1000, ge=1, description="documents that shuffling looks at")
    seed: int = Field(default=0, ge=0)


class Weights(Section):
    """The share of the steps that each kind of data gets; they need not add to 1."""

    text: float = Field(default=1.0, ge=0)
    mqar: float = Field(default=0.0, ge=0)
    passkey: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_data(self):
        if self.text + self.mqar + self.passkey <= 0:
            raise ValueError("all weights are 0; give at least one kind of data a weight")
        return self


class Training(Section):
    """One stage of training; the defaults are the paper's post-training (arXiv 2509.22630, appendix)."""

    steps: int = Field(default=20_000, ge=1)
    tokens_per_step: int = Field(default=524_288, ge=1, description="over all ranks and accumulated batches")
    sequence_length: int = Field(default=65_536, ge=2, description="of text and passkey sequences, in tokens")
    sequences_per_device: int | None = Field(
        default=None, ge=1, description="text sequences in one forward pass; default: as many as a step needs"
    )
    weights: Weights = Weights()
    learning_rate: float = Field(default=3e-4, gt=0)
    fresh_learning_rate_multiplier: float = Field(default=1.0, gt=0, description="for tensors the plan made fresh")
    train_only_expanded: bool = Field(default=False, description="freeze all but the mixers that the plan changed")
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=1000, ge=0)
    decay_steps: int | None = Field(default=None, ge=1, description="wsd only; default: a fifth of the steps")
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="compute in bf16 over fp32 master weights; auto: bf16 where the device has it"
    )
    loss_chunk: int = Field(default=4096, ge=1, description="tokens whose logits exist at one time")
    save_every: int | None = Field(default=None, ge=1, description="default: a tenth of the steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=50, ge=1)
    report_to: list[str] = Field(default=[], description='for example ["tensorboard"] or ["wandb"]')
    trainer: dict[str, Any] = Field(
        default={},
        description="further fields of transformers.TrainingArguments, for example fsdp or deepspeed, but none that "
        "has a key of its own here",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.tokens_per_step % self.sequence_length:
            problem = f"is no multiple of sequence_length = {self.sequence_length}"
            raise UserError("tokens_per_step", self.tokens_per_step, problem, "change one of them")
        if self.warmup_steps >= self.steps:
            problem = f"leaves nothing of steps = {self.steps}"
            raise UserError("warmup_steps", self.warmup_steps, problem, "shorten the warm-up")
        if self.decay_steps is not None and self.schedule != "wsd":
            problem = f'does not go with schedule = "{self.schedule}"'
            raise UserError("decay_steps", self.decay_steps, problem, 'remove it or use schedule = "wsd"')
        if (self.decay_steps or 0) + self.warmup_steps > self.steps:
            problem = f"and warmup_steps = {self.warmup_steps} are more than steps = {self.steps}"
            raise UserError("decay_steps", self.decay_steps, problem, "shorten one of them")
        return self


class Model(Section):
    """The model a run starts from: a checkpoint, or a family and a configuration that are pre-trained from scratch."""

    checkpoint: str | None = Field(default=None, description="folder or hub name of a pre-trained model")
    family: str | None = Field(default=None, description="model type, for example statex_gla or mamba2")
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
    training: dict[str, Any] = {}
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


class MqarSuite(Section):
    num_pairs: Counts = [4, 8, 16, 32]
    num_keys: int = Field(default=64, ge=2)
    num_values: int = Field(default=64, ge=2)
    num_items: int = Field(default=200, ge=1, description="sequences for each number of pairs")

    @model_validator(mode="after")
    def _pairs_fit(self):
        most = min(self.num_keys, self.num_values)
        for pairs in self.num_pairs:
            if not 1 <= pairs <= most:
                remedy = f"give 1 to {most} pairs"
                raise UserError("num_pairs", pairs, "does not fit num_keys and num_values", remedy)
        return self


class PasskeySuite(Section):
    lengths: Counts | None = Field(default=None, description="tokens; default: what model and device allow")
    num_depths: int = Field(default=5, ge=1)
    num_items: int = Field(default=20, ge=1, description="questions in each cell of the grid")


class NeedleSuite(PasskeySuite):
    """S-NIAH as in RULER (arXiv 2404.06654): the answer must occur among the tokens that the model goes on with."""

    num_items: int = Field(default=20, ge=1, description="questions in each cell of the grid")
    max_new_tokens: int = Field(default=128, ge=1, description="tokens that an answer is looked for in")


class MultikeySuite(Section):
    lengths: Counts | None = Field(default=None, description="tokens; default: what model and device allow")
    num_keys: int = Field(default=4, ge=2, description="needles in a context; each is asked for")
    num_items: int = Field(default=20, ge=1, description="contexts of each length")
    max_new_tokens: int = Field(default=128, ge=1)


class VariableTrackingSuite(Section):
    lengths: Counts | None = Field(default=None, description="tokens; default: what model and device allow")
    num_chains: int = Field(default=1, ge=1, description="chains in a context; each is asked for")
    num_hops: int = Field(default=4, ge=1, description="assignments in a chain after the first")
    num_items: int = Field(default=20, ge=1, description="contexts of each length")
    max_new_tokens: int = Field(default=30, ge=1)


class SymbolIclSuite(Section):
    shots: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    num_labels: int = Field(default=4, ge=2, le=8)
    num_queries: int = Field(default=8, ge=1, description="of each kind, seen and unseen, at each number of shots")
    num_items: int = Field(default=16, ge=1, description="contexts, each with symbols and labels of its own")


class CostSuite(Section):
    lengths: Counts | None = Field(default=None, description="tokens; default: what the device allows")
    batch_sizes: Counts = Field(default=[1, 8], description="rows that are decoded at once")
    decode_tokens: int = Field(default=32, ge=1, description="tokens a row in one repetition")
    repetitions: int = Field(default=5, ge=2)


class TextSuite(Section):
    length: int | None = Field(default=None, ge=2, description="tokens of a window of a document that is scored")
    num_windows: int = Field(default=100, ge=1, description="one of each long enough document, then second ones, ...")


class ArHitsSuite(TextSuite):
    theta: int = Field(default=0, ge=0, description="how often the n-gram of a hit may occur in the training text")
    ngram: int | None = Field(
        default=None, ge=2, le=4, description="default: 2, but 3 below 16,384 and 4 below 2,048 tokens of vocabulary"
    )
    count_tokens: int = Field(default=2_000_000, ge=1, description="tokens of the training text that are counted")


class HarnessTasks(Section):
    """What goes for lm-eval's tasks alone."""

    limit: int | None = Field(
        default=None, ge=1, description="items of each task, and of each of its lengths or shots; default: all"
    )
    lengths: Counts | None = Field(default=None, description="tokens, of RULER's and our tasks; default: theirs")
    unsafe_code: bool = Field(default=False, description="run the code that a model writes: humaneval and mbpp need it")
    data: str | None = Field(default=None, description="folder of data sets that are read instead of the hub's")


class Evaluation(Section):
    suites: list[str] = Field(
        default=["mqar", "passkey", "ar_hits", "nll_by_position"],
        description="suites, groups of them, and lm-eval's tasks: those of `statex eval --suite`",
    )
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=1234, ge=0, description="of the items; all arms and seeds see the same ones")
    text: TextSource | None = Field(default=None, description="default: the held-out share of data.text")
    mqar: MqarSuite = MqarSuite()
    passkey: PasskeySuite = PasskeySuite()
    ar_hits: ArHitsSuite = ArHitsSuite()
    nll_by_position: TextSuite = TextSuite()
    niah_single_1: NeedleSuite = NeedleSuite()
    niah_single_2: NeedleSuite = NeedleSuite()
    niah_single_3: NeedleSuite = NeedleSuite()
    niah_multikey: MultikeySuite = MultikeySuite()
    variable_tracking: VariableTrackingSuite = VariableTrackingSuite()
    symbol_icl: SymbolIclSuite = SymbolIclSuite()
    cost: CostSuite = CostSuite()
    harness: HarnessTasks = HarnessTasks()


OTHER_FOLDERS = {"pretrained", "tokenizer", "shared", "figures"}
"""What a run's folder holds beside those of its models and arms."""


class Recipe(Section):
    """A whole run: models, the arms that are compared on them, data, training, evaluation."""

    name: Name
    output: str = Field(default="runs", description="the folder that runs are written to")
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    workers: int = Field(
        default=1, ge=1, description="models and seeds worked on at once, each with its share of cores"
    )
    models: dict[Name, Model] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1)
    data: Data = Data()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _arms_fit(self):
        if taken := OTHER_FOLDERS & {*self.models, *self.arms}:
            name = taken.pop()
            section = "models" if name in self.models else "arms"
            raise UserError(section, name, "is the name of another folder of a run", "give it another name")
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

    Raises:
        UserError: no such file, no valid TOML, an unknown key, or a value of the wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("recipe", str(path), "there is no such file", "give the path of a TOML recipe")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("recipe", str(path), f"is not valid TOML ({error})", "correct that line") from None
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, relative_to=path.parent)


def parse_recipe(values: dict[str, Any], relative_to: Path | None = None) -> Recipe:
    """Check the values of a recipe; paths of data become absolute, seen from `relative_to`."""
    values = copy.deepcopy(values)
    if relative_to is not None:
        for section in (values.get("data"), values.get("evaluation")):
            source = section.get("text") if isinstance(section, dict) else None
            if isinstance(source, dict) and isinstance(source.get("files"), list):
                source["files"] = [str(relative_to.resolve() / str(pattern)) for pattern in source["files"]]
        harness = values["evaluation"].get("harness") if isinstance(values.get("evaluation"), dict) else None
        if isinstance(harness, dict) and isinstance(harness.get("data"), str):
            harness["data"] = str(relative_to.resolve() / harness["data"])
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise user_error(error) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key, `section.key=value`; a value that is not TOML is taken as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError("--set", override, "is not of the form section.key=value", "write for example seeds=[0,1,2]")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError("--set", override, f"{section} is not a section", "name a key inside a section")
    target[last] = value


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
