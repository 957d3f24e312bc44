"""What a family of recurrent models defines: where its mixers are, how big their states, whose rows are whose."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, NonNegativeInt
from torch import nn
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.families.fields import ConfigFields, PositiveFloat, Size

_AS_STORED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # where a stored plan is read
Fill = Literal["fresh", "zero", "copy"]
GROW, MERGE = "grow", "merge"
MERGED_BY_DEFAULT = (4, 3, 2)
"""Heads that are merged into one where no factor is given, the first that divides their number: with 32 heads of 128
key channels all in one, it would have 4096."""


@dataclass(frozen=True)
class StateGeometry:
    """The recurrent state of one layer: `num_heads` matrices of `key_dim` x `value_dim`."""

    num_heads: Size
    key_dim: Size
    value_dim: Size

    __pydantic_config__ = _AS_STORED

    @property
    def elements(self) -> int:
        """Numbers in the state of one sequence, without the convolution's."""
        return self.num_heads * self.key_dim * self.value_dim


class LayerShape(NamedTuple):
    """What a layer's mixer is built with: its state, and the rank of its added key dimensions (None: full rows)."""

    geometry: StateGeometry
    rank: int | None = None


@dataclass(frozen=True)
class Segment:
    """A named run of rows of a tensor: `num_blocks` blocks (heads, groups), each growing from `before` to `after` rows.

    Args:
        name: what the rows belong to: "q", "k", "B", ...
        num_blocks: how many blocks there are; growth happens inside each.
        before, after: rows of a block.
        fill: what a block's new rows are: "fresh" (initialised), "zero", or "copy" (the old rows over again).
        order: new block b takes the rows of old block order[b]; None keeps the order.
        noise: of "copy": standard deviation of what is added to new rows, as a share of the old rows' own.
        scale: factor on all rows of the segment.
    """

    name: str
    num_blocks: Size
    before: Annotated[int, Field(ge=0, lt=2**31)]
    after: Size
    fill: Fill = "fresh"
    order: tuple[NonNegativeInt, ...] | None = None
    noise: Annotated[float, Field(ge=0)] = 0.0
    scale: PositiveFloat = 1.0

    __pydantic_config__ = _AS_STORED

    @property
    def is_possible(self) -> bool:
        """Whether there are rows to copy where some are copied, and an order names each block once."""
        if self.before > self.after or (self.before == 0 and self.fill == "copy"):
            return False
        return self.order is None or (self.before > 0 and sorted(self.order) == list(range(self.num_blocks)))


@dataclass(frozen=True)
class TensorRows:
    """How a tensor's rows along `dim` become the expanded tensor's."""

    segments: tuple[Segment, ...]
    dim: NonNegativeInt = 0

    __pydantic_config__ = _AS_STORED


@torch.no_grad()
def draw_time_steps_(dt_bias: torch.Tensor, low: float = 1e-3, high: float = 1e-1) -> None:
    """Fill [H] in place so that softplus of it is log-uniform from `low` to `high`, from torch's random state."""
    steps = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp_()
    dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))


class Family(ABC):
    """One architecture. Modules are named from the language model (`AutoModelForCausalLM`) down."""

    model_type: str
    fields: type[ConfigFields]
    """What the values of its configuration may be."""
    mixer_path: str
    """Path of a layer's token mixer, with {} for its index."""
    norm_path: str
    """Path of the norm before it, likewise; empty where that norm feeds more than the mixer and is never reset."""
    keys_last: bool
    """Whether the model's cache holds a layer's state as [B, H, V, K] instead of [B, H, K, V]."""
    config_class: str
    """Full name of its configuration class; this and the next are imported when first needed."""
    model_class: str
    """Of its base model (`AutoModel`)."""
    causal_lm_class: str
    """Of its causal language model."""
    library: str = "transformers"
    """The package that they are of. Another than transformers is imported when one of its models is first asked for."""
    holds_plan: bool = False
    """Whether these are statex's own and replay a stored plan; for transformers' classes, such ones are derived."""
    mixer_class: str = ""
    """Of its token mixer, which runs on statex's ops in the derived model; empty: it stays as it is."""
    recurrence: Literal["mamba2", "gated_delta", "kimi_delta", "lightning", "selective_scan", "fla_delta"] = "mamba2"
    """What kind of mixer that is, hence which functions of its module statex's ops replace (`models/dispatch.py`)."""
    whole_sequences: str = ""
    """What it has that keeps its sequences whole, without `training.sequence_parallel` and `backpropagation_length`;
    empty: nothing."""
    norm_classes: tuple[str, ...] = ()
    """Of its norms, gated or not, which the derived model runs on statex's op."""
    methods: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("reinit", "inherit", "preserve"), (GROW,))
    """How the state is enlarged with each initialisation, the first where no method is given: GROW adds keys to each
    head, MERGE makes one head of several."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """Initialisations that are impossible whatever the method, and why, after "init = ..."."""
    merging_needs: str = ""
    """Why merged heads have not every initialisation, after "init = ...", where there is MERGE."""
    grows: str = "key dimension"
    """What an expansion enlarges, for docs/families.md; this and the next three."""
    factors: str = "2 and more; 4 where none is given"
    """Which factors there are."""
    composite: str = ""
    """Model type of transformers' models of text and images whose language model it is, if there are such."""
    left_out: str = ""
    """What its checkpoints may hold that transformers does not load, and that an expanded folder therefore lacks."""
    runs_on: str = "statex's ops"
    """Whose kernels an expanded model runs on."""
    measured: str = "nothing yet"
    """What was measured on models of some size, with links from docs/."""
    blocks_compile: bool = False
    """Whether torch.compile takes each of its blocks as one graph."""
    compiled_by_default: bool = False
    """Whether training on a GPU compiles them where nothing is said: where that was tried on one, and is faster."""
    kept_by_reinit: tuple[str, ...] = ()
    """Tensors of the mixer that a re-initialisation leaves alone."""
    time_steps: str = ""
    """The mixer's tensor of time steps, before softplus, where transformers makes all alike (`initialize_mixer`)."""
    begins_with_small_filters: bool = False
    """Whether transformers initialises its convolution as any other weight (`initialize_mixer`)."""

    @property
    def is_available(self) -> bool:
        """Whether its classes are installed."""
        if self.library != "transformers":
            spec = find_spec(self.library)  # which, without a dot, imports nothing
            places = spec.submodule_search_locations if spec is not None else None
            part = self.config_class.split(".")[1]  # FLA's kernels alone, fla-core, are a package of the same name
            return any(Path(place, part).is_dir() for place in places or ())
        return find_spec(self.config_class.rpartition(".")[0].rpartition(".")[0]) is not None

    @property
    def expanded_type(self) -> str:
        """Model type of its expanded models, where their classes are derived."""
        library = "" if self.library == "transformers" else f"{self.library}_"
        return f"statex_{library}{self.model_type}"

    @property
    def module_classes(self) -> tuple[str, ...]:
        """Full names of the classes that run on statex's ops in the derived model."""
        return (self.mixer_class, *self.norm_classes) if self.mixer_class else ()

    def mixer_name(self, config: PreTrainedConfig, index: int) -> str:
        """Full name of a layer's mixer."""
        return self.mixer_path.format(index)

    def norm_name(self, config: PreTrainedConfig, index: int) -> str | None:
        """Full name of the norm before it, None where it is never reset."""
        return self.norm_path.format(index) if self.norm_path else None

    def num_layers(self, values: Mapping[str, Any]) -> Any:
        """How many layers the model has that `values`, those of a config.json and its class's defaults, describe."""
        return values["num_hidden_layers"]

    def num_layers_left_out(self, values: Mapping[str, Any]) -> int:
        """How many more the weights may have behind those, which are not loaded."""
        return 0

    def cached_state(self, cache: Any, index: int) -> torch.Tensor:
        """A layer's state in the model's cache."""
        return cache.layers[index].recurrent_states[0]

    def state_matrices(self, cached: torch.Tensor) -> torch.Tensor:
        """[B, H, K, V], a view of a layer's state as the model's cache holds it."""
        return cached.mT if self.keys_last else cached

    def fill_buffers(self, config: PreTrainedConfig, module: nn.Module) -> None:  # noqa: B027 (most have none)
        """Compute what no checkpoint holds, where the module is a mixer: buffers that follow the size of its state."""

    def initialize_mixer(self, mixer: Any) -> None:
        """Finish a fresh mixer, from torch's random state, where transformers' initialisation is not the model's own.

        Time steps: it sets every `dt_bias` to 1 there (Jamba's to 0), so a step is softplus(1) = 1.3, and a head keeps
        exp(-1.3 A) of its state a token, which is nothing for most A from 1 to 16. Mamba, Mamba2 and Gated DeltaNet
        start with 0.001 to 0.1 (arXiv 2312.00752, section 3.6; the reference code of arXiv 2405.21060 and 2412.06464).

        Filters: its normal numbers of `initializer_range` = 0.02 make x, B and C 15 times smaller each than PyTorch's
        own, with which Mamba begins (and transformers' mamba and mamba2); what is read from the state is their product.
        """
        if self.time_steps:
            draw_time_steps_(mixer.get_parameter(self.time_steps))
        if self.begins_with_small_filters:
            mixer.conv1d.reset_parameters()
            if mixer.conv1d.bias is not None:
                nn.init.zeros_(mixer.conv1d.bias)

    def check(self, config: PreTrainedConfig) -> None:  # noqa: B027 (most families have nothing to refuse)
        """Refuse what cannot be expanded, whatever the layers and the factor.

        Raises:
            UserError: the changed mixers could not run under this configuration.
        """

    @abstractmethod
    def recurrent_layers(self, config: PreTrainedConfig) -> list[int]:
        """Indices of the layers that have a matrix state."""

    @abstractmethod
    def geometry(self, config: PreTrainedConfig) -> StateGeometry:
        """State of a recurrent layer before any expansion."""

    def method_of(self, init: str, method: str | None = None) -> str:
        """GROW or MERGE: the one asked for, or the family's own with this initialisation.

        Raises:
            UserError: the two do not go together, or the family has not this method.
        """
        possible = self.methods.get(init, ())
        if init in self.lacks:
            raise UserError("init", init, self.lacks[init], f"use init = {' or '.join(map(repr, self.methods))}")
        if method in possible or (method is None and possible):
            return method or possible[0]
        merging = [f'"{each}"' for each, methods in self.methods.items() if MERGE in methods]
        if merging and (method == MERGE or not possible):
            otherwise = f', or method = "{GROW}"' if possible else ""
            problem, remedy = self.merging_needs, f"use init = {' or '.join(merging)}"
            raise UserError("init", init, problem, f"{remedy}{otherwise}")
        problem = f"is not how a layer of {self.model_type} is enlarged with init = {init!r}"
        raise UserError("method", method, problem, f'use "{possible[0]}", or leave it out')

    def default_factor(self, config: PreTrainedConfig, before: StateGeometry, method: str = GROW) -> int:
        """The factor for a layer with this state where none is given: the paper's, for the families that it has."""
        if method == GROW:
            return 4
        num_heads = self.num_mergeable_heads(config, before)
        return next((factor for factor in MERGED_BY_DEFAULT if num_heads % factor == 0), num_heads)

    def expanded_geometry(
        self, config: PreTrainedConfig, before: StateGeometry, factor: int, init: str, method: str | None = None
    ) -> StateGeometry:
        """State of a layer with the state `before`, once expanded.

        Raises:
            UserError: the factor does not fit, or the method does not go with the initialisation.
        """
        if self.method_of(init, method) == MERGE:
            return self.merged_geometry(config, before, factor)
        if factor < 2:
            raise UserError("factor", factor, "does not enlarge the state", "use 2 or more")
        return StateGeometry(before.num_heads, factor * before.key_dim, before.value_dim)

    def num_mergeable_heads(self, config: PreTrainedConfig, before: StateGeometry) -> int:
        """Heads of keys, which a factor of merging must divide."""
        return before.num_heads

    def merged_geometry(self, config: PreTrainedConfig, before: StateGeometry, factor: int) -> StateGeometry:
        """State of a layer with the state `before`, each `factor` heads made into one.

        Raises:
            UserError: the factor does not divide the heads.
        """
        H = self.num_mergeable_heads(config, before)
        if factor < 2 or H % factor:
            divisors = [n for n in range(2, H + 1) if H % n == 0]
            remedy = f"use one of {divisors}" if divisors else "there is one head, and nothing to merge"
            raise UserError("factor", factor, f"does not divide the {H} heads of a layer", remedy)
        return StateGeometry(before.num_heads // factor, factor * before.key_dim, factor * before.value_dim)

    @abstractmethod
    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        """A mixer with a state of this geometry, its weights as its constructor leaves them."""

    @abstractmethod
    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        """Tensors whose rows change under `inherit`; all others keep their weights."""

    @abstractmethod
    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        """Tensors whose rows change under `preserve`; new tensors appear with `before` = 0, all others are kept.

        Raises:
            UserError: the function cannot be preserved under this configuration, or not with this rank.
        """
