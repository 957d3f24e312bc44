"""A recipe: one typed TOML file that describes a whole run. Unknown keys and bad values fail at once."""

import copy
import datetime
import math
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from statex.errors import UserError, explained
from statex.expansion.config import ExpansionConfig, user_error

NUMBERS_END = 2**32
"""No number of a recipe reaches it: no seed does, and no count that a machine lives to see the end of."""
DEEPEST = 32
"""Sections, tables and lists in one another."""
MOST_TOKENS = 2**22
"""Tokens of a sequence, and of the longest prompt of an evaluation."""
MOST_VOCABULARY = 2**20
"""Tokens of a vocabulary: four times the largest that are published."""
MOST_NUMBERS = 2**27
"""Numbers that the recall data of one step, or of one cell of an evaluation, may hold at one time: half a gigabyte."""
MOST_ITEMS = 100_000
"""Questions in a cell of an evaluation: no interval needs more."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A name that is also a folder's."""
Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]
"""At least one number, none below 1."""
Lengths = Annotated[list[Annotated[int, Field(ge=1, le=MOST_TOKENS)]], Field(min_length=1)]
"""At least one number of tokens."""
Shots = Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], Field(min_length=1)]
BatchSizes = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe; a key that it does not know is an error, and so is a value that no key can mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        check_plain(values)
        return values


def check_plain(values: Any) -> None:
    """Refuse what no key of a recipe can mean, at any depth.

    Raises:
        UserError: a number that is not finite or reaches NUMBERS_END, a date, text with a NUL or that is no Unicode,
            or tables and lists nested deeper than DEEPEST.
    """
    pending: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while pending:
        keys, value = pending.pop()
        if isinstance(value, dict | list | tuple):
            if len(keys) > DEEPEST:
                raise UserError(".".join(keys[:3]), "...", f"is nested deeper than {DEEPEST}", "flatten it")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += reversed([((*keys, str(key)), item) for key, item in items])
        elif complaint := _complaint(value):
            raise UserError(".".join(keys), value, *complaint)


def _complaint(value: Any) -> tuple[str, str] | None:
    """What is wrong with a number or text wherever it stands, and what to do; None where nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number", "give a finite one"
    if isinstance(value, int | float) and abs(value) >= NUMBERS_END:
        return f"is beyond the numbers of a recipe, which end before {NUMBERS_END}", "give one nearer to 0"
    if isinstance(value, datetime.date | datetime.time):
        return "is a date or time, and no key takes one", "put it in quotation marks if text is meant"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        return "has a character that is none (NUL, or half of one)", "remove it"
    return None


class TextSource(Section):
    """Where documents come from: exactly one of a hub data set, files, or Python's own standard library.

    `files` are paths or globs; relative ones are looked up from the folder of the recipe. The ending of a file,
    whatever its case, says what it is: .jsonl (or .ndjson), .json, .csv, .tsv and .parquet are tables, of which only
    the column `field` is read; .txt, .md, .py and their like are plain text, one document a file. All but parquet may
    be compressed (.gz, .bz2, .xz, .zst). A file of any other ending needs `format`.
    """

    hub: Text | None = Field(default=None, description="data set on the Hugging Face hub")
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

    num_keys: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_values: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
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

    vocab_size: int = Field(
        default=512, ge=300, le=MOST_VOCABULARY, description="with the 256 bytes and the reserved recall tokens"
    )
    training_bytes: int = Field(default=5_000_000, ge=1, description="of text that it is trained on, at most")


class Data(Section):
    text: TextSource = TextSource(standard_library=True)
    recall: Recall = Recall()
    tokenizer: Tokenizer = Tokenizer()
    reset_state_at_documents: bool = Field(
        default=False, description="start a fresh state at each document border of a packed sequence"
    )
    shuffle_buffer: int = Field(default=1000, ge=1, description="documents that shuffling looks at")
    seed: int = Field(default=0, ge=0, description="of the data's order, which each of the run's seeds changes too")


class Weights(Section):
    """The share of the steps that each kind of data gets; they need not add to 1."""

    text: Weight = 1.0
    mqar: Weight = 0.0
    passkey: Weight = 0.0

    @model_validator(mode="after")
    def _some_data(self):
        if self.text + self.mqar + self.passkey <= 0:
            raise ValueError("all weights are 0; give at least one kind of data a weight")
        return self


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
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0, le=100)
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
        description="further fields of transformers.TrainingArguments, for example fsdp, but none that "
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
    num_keys: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_values: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_items: int = Field(default=200, ge=1, description="sequences for each number of pairs")

    @model_validator(mode="after")
    def _pairs_fit(self):
        most = min(self.num_keys, self.num_values)
        for pairs in self.num_pairs:
            if not 1 <= pairs <= most:
                remedy = f"give 1 to {most} pairs"
                raise UserError("num_pairs", pairs, "does not fit num_keys and num_values", remedy)
        row = max(self.num_keys, self.num_values, 4 * max(self.num_pairs))
        if self.num_items * row > MOST_NUMBERS:
            problem = f"the items of one number of pairs, {row} numbers each, do not fit into memory together"
            raise UserError("num_items", self.num_items, problem, f"give at most {MOST_NUMBERS // row}")
        return self


class PasskeySuite(Section):
    lengths: Lengths | None = Field(default=None, description="tokens; default: what model and device allow")
    num_depths: int = Field(default=5, ge=1, le=1000)
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="questions in each cell of the grid")


class NeedleSuite(PasskeySuite):
    """S-NIAH as in RULER (arXiv 2404.06654): the answer must occur among the tokens that the model goes on with."""

    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="questions in each cell of the grid")
    max_new_tokens: int = Field(default=128, ge=1, le=2**16, description="tokens that an answer is looked for in")


class MultikeySuite(Section):
    lengths: Lengths | None = Field(default=None, description="tokens; default: what model and device allow")
    num_keys: int = Field(default=4, ge=2, le=1000, description="needles in a context; each is asked for")
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="contexts of each length")
    max_new_tokens: int = Field(default=128, ge=1, le=2**16)


class VariableTrackingSuite(Section):
    lengths: Lengths | None = Field(default=None, description="tokens; default: what model and device allow")
    num_chains: int = Field(default=1, ge=1, le=1000, description="chains in a context; each is asked for")
    num_hops: int = Field(default=4, ge=1, le=1000, description="assignments in a chain after the first")
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="contexts of each length")
    max_new_tokens: int = Field(default=30, ge=1, le=2**16)


class SymbolIclSuite(Section):
    shots: Shots = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    num_labels: int = Field(default=4, ge=2, le=8)
    num_queries: int = Field(
        default=8, ge=1, le=10_000, description="of each kind, seen and unseen, at each number of shots"
    )
    num_items: int = Field(
        default=16, ge=1, le=MOST_ITEMS, description="contexts, each with symbols and labels of its own"
    )


class CostSuite(Section):
    lengths: Lengths | None = Field(default=None, description="tokens; default: what the device allows")
    batch_sizes: BatchSizes = Field(default=[1, 8], description="rows that are decoded at once")
    decode_tokens: int = Field(default=32, ge=1, le=2**20, description="tokens a row in one repetition")
    repetitions: int = Field(default=5, ge=2, le=10_000)


class TextSuite(Section):
    length: int | None = Field(
        default=None, ge=2, le=MOST_TOKENS, description="tokens of a window of a document that is scored"
    )
    num_windows: int = Field(
        default=100, ge=1, le=10**6, description="one of each long enough document, then second ones, ..."
    )


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
    lengths: Lengths | None = Field(default=None, description="tokens, of RULER's and our tasks; default: theirs")
    unsafe_code: bool = Field(default=False, description="run the code that a model writes: humaneval and mbpp need it")
    data: str | None = Field(default=None, description="folder of data sets that are read instead of the hub's")


class Evaluation(Section):
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
        raise UserError("extends", other, "is no path", "give the path of another recipe, seen from this one")
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
    for section in (values.get("data"), values.get("evaluation")):
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
