"""One factory for the expanded classes of every family: transformers' own, with a stored plan replayed, on our ops.

A family names transformers' classes; they are imported when first needed. Saved folders name ours by this module, as
`StatexMamba2ForCausalLM` for `Mamba2ForCausalLM`. A family of our own classes, which hold a plan themselves, has
nothing made.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict

from statex.families import FAMILIES, Family, family_of
from statex.models.keywords import LOSS_KEYWORDS, check_keywords, check_no_attentions, with_arguments_of
from statex.models.replay import ReplayExpansion
from statex.models.shim import FoundThroughShim
from statex.ops.segments import cu_seqlens_of, one_seq_idx

PREFIX = "Statex"
OLDER_CACHE_NAME = "cache_params"


class ModelClasses(NamedTuple):
    """The model classes of a family that hold a plan."""

    model: Any
    causal_lm: Any


def __getattr__(name: str) -> type:
    """The class of that name, as saved folders and pickles ask for it."""
    for family in FAMILIES.values() if name.startswith(PREFIX) else ():
        if family.holds_plan:
            continue
        if name == _expanded_name(family.config_class):
            return expanded_config_class(family)
        if name in map(_expanded_name, (family.model_class, family.causal_lm_class, *family.module_classes)):
            classes = expanded_model_classes(family)
            return {one.__name__: one for one in (*classes, *classes.model.exchanged.values())}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _expanded_name(path: str) -> str:
    return f"{PREFIX}{path.rpartition('.')[2]}"


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _derived(base: type, *mixins: type, **members: Any) -> Any:
    doc = f"transformers' {base.__name__} with the state of some layers expanded, as `config.expansion` says."
    own = {"__module__": __name__, "__doc__": doc, "__qualname__": f"{PREFIX}{base.__name__}"}
    return type(f"{PREFIX}{base.__name__}", (*mixins, base), own | members)


class ExpandedConfig(FoundThroughShim):
    """What our configuration has beside transformers': the plan (statex.expansion.edits), and what the mixer lacks."""

    def validate_architecture(self) -> None:
        """Refuse what our mixer cannot compute; called by transformers whenever a configuration is made."""
        super().validate_architecture()  # type: ignore[misc]
        family_of(self).check(self)  # type: ignore[arg-type]


@functools.cache
def expanded_config_class(family: Family) -> Any:
    """The configuration class of a family that has a plan; no model code is imported."""
    base = _imported(family.config_class)
    if family.holds_plan:
        return base
    made = _derived(
        base,
        ExpandedConfig,
        model_type=f"statex_{family.model_type}",
        base_model_type=family.model_type,
        expansion=None,
        __annotations__={"expansion": list | dict | None},
    )
    return strict(made)


class ExpandedModel(ReplayExpansion):
    """What our model classes do beside transformers'."""

    exchanged: ClassVar[dict[type, type]]
    """Ours, by the class of transformers whose place they take."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.replay_expansion()
        self._exchange_classes()
        self.post_init()  # type: ignore[attr-defined]

    def _exchange_classes(self: Any) -> None:
        """Put all mixers, expanded or not, and all norms on statex's ops, in place."""
        for module in self.modules():
            module.__class__ = self.exchanged.get(type(module), type(module))

    @classmethod
    def adopt(cls, model: Any) -> None:
        """Turn a model of transformers' class with a plan in its configuration into this class, in place."""
        model.__class__ = cls
        model.config.__class__ = cls.config_class  # type: ignore[attr-defined]
        model._exchange_classes()


@functools.cache
def expanded_model_classes(family: Family) -> ModelClasses:
    """The model classes of a family that hold a plan; imports its model code."""
    model, causal_lm = _imported(family.model_class), _imported(family.causal_lm_class)
    if family.holds_plan:
        return ModelClasses(model, causal_lm)
    from statex.models.on_statex_ops import mixer_on_statex_ops, norm_on_statex_ops

    mixer = _imported(family.mixer_class)
    exchanged = {mixer: _derived(mixer, forward=mixer_on_statex_ops(mixer.forward))}
    for norm in map(_imported, family.norm_classes):
        exchanged[norm] = _derived(norm, forward=norm_on_statex_ops)
    members = {"config_class": expanded_config_class(family), "exchanged": exchanged}
    exchanged[model] = _derived(model, ExpandedModel, forward=_model_forward(model), **members)
    return ModelClasses(
        exchanged[model], _derived(causal_lm, ExpandedModel, forward=_causal_lm_forward(causal_lm), **members)
    )


def _model_forward(base: Any) -> Callable:
    """The forward of a base model."""
    _, *names, _ = inspect.signature(base.forward).parameters
    known = {*names, OLDER_CACHE_NAME}

    @with_arguments_of(base.forward)
    def forward(
        self: Any,
        *args: Any,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', but packed documents keep their states apart, and unknown keywords are refused.

        Args:
            seq_idx: [B, T], which document of a packed row each token belongs to. Such a pass makes no cache.
            cu_seqlens: the same for a batch of 1, as in FLA: [S + 1] int, the borders of the documents from 0 to T.
            output_attentions: of the Hugging Face interface; there are none.
        """
        check_keywords(kwargs, known)
        check_no_attentions(output_attentions)
        if seq_idx is None and cu_seqlens is None:
            return base.forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
        if tokens:  # else transformers says that they are missing
            seq_idx = one_seq_idx(seq_idx, cu_seqlens, tokens[0])
        borders = cu_seqlens_of(seq_idx) if seq_idx is not None else None  # found once for all layers
        return base.forward(self, *args, **{"use_cache": False} | kwargs, seq_idx=seq_idx, cu_seqlens=borders)

    return forward


def _causal_lm_forward(base: Any) -> Callable:
    """The forward of a language model."""
    _, *names, _ = inspect.signature(base.forward).parameters
    known = {*names, OLDER_CACHE_NAME, *LOSS_KEYWORDS}

    @with_arguments_of(base.forward)
    def forward(
        self: Any,
        *args: Any,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; `seq_idx` and `cu_seqlens` also reach the base model."""
        check_keywords(kwargs, known)
        check_no_attentions(output_attentions)
        if seq_idx is None and cu_seqlens is None:
            return base.forward(self, *args, **kwargs)
        documents = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        hook = self.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | documents), with_kwargs=True
        )
        try:
            return base.forward(self, *args, **{"use_cache": False} | kwargs)
        finally:
            hook.remove()

    return forward
