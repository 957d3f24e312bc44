"""One factory for the expanded classes of every family: transformers' own, with a stored plan replayed, on our ops.

A family names classes of transformers or flash-linear-attention; they are imported when first needed. Saved folders
name ours by this module, as `StatexMamba2ForCausalLM` for `Mamba2ForCausalLM`. For a family of our own classes, which
hold a plan themselves, nothing is made.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from statex.families import ALL_FAMILIES, FAMILIES, Family, family_of, unknown_family
from statex.models.caches import CACHE_NAMES
from statex.models.dispatch import RECURRENCES, imported
from statex.models.documents import (
    arguments_without_attention,
    document_arguments,
    has_attention,
    lacks_attention,
)
from statex.models.fla import as_fla_names_it, fla_model_forward, with_plan
from statex.models.keywords import LOSS_KEYWORDS, by_name, check_keywords, check_no_attentions, with_arguments_of
from statex.models.replay import ReplayExpansion
from statex.models.shim import FoundThroughShim
from statex.ops.segments import one_seq_idx

PREFIX = "Statex"


class ModelClasses(NamedTuple):
    """The model classes of a family that hold a plan."""

    model: Any
    causal_lm: Any


def __getattr__(name: str) -> type:
    """The class of that name, as saved folders and pickles ask for it.

    Raises:
        UserError: what it is derived from is not installed.
    """
    for family in ALL_FAMILIES.values() if name.startswith(PREFIX) else ():
        if family.holds_plan:
            continue
        own = (family.config_class, family.model_class, family.causal_lm_class, *family.module_classes)
        if name not in map(_expanded_name, own):
            continue
        if family.model_type not in FAMILIES:
            raise unknown_family(family.model_type)
        if name == _expanded_name(family.config_class):
            return expanded_config_class(family)
        classes = expanded_model_classes(family)
        return {one.__name__: one for one in (*classes, *classes.model.exchanged.values())}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _expanded_name(path: str) -> str:
    return f"{PREFIX}{path.rpartition('.')[2]}"


def _derived(path: str, *mixins: type, **members: Any) -> Any:
    """A class derived from transformers' own of that full name, behind the mixins."""
    base, name = imported(path), _expanded_name(path)
    doc = f"transformers' {base.__name__} with the state of some layers expanded, as `config.expansion` says."
    own = {"__module__": __name__, "__doc__": doc, "__qualname__": name}
    return type(name, (*mixins, base), own | members)


class ExpandedConfig(FoundThroughShim):
    """What our configuration adds to transformers': the plan (statex.expansion.edits), and the limits of our mixer."""

    def validate_architecture(self) -> None:
        """Refuse what our mixer cannot compute; called by transformers whenever a configuration is made."""
        super().validate_architecture()  # type: ignore[misc]
        family_of(self).check(self)  # type: ignore[arg-type]


@functools.cache
def expanded_config_class(family: Family) -> Any:
    """The configuration class of a family that has a plan; no model code is imported."""
    if family.holds_plan:
        return imported(family.config_class)
    members = {"model_type": family.expanded_type, "base_model_type": family.model_type, "expansion": None}
    if family.library == "fla":
        constructor = with_plan(imported(family.config_class).__init__)
        return _derived(family.config_class, ExpandedConfig, __init__=constructor, **members)
    annotations = {"expansion": list | dict | None}
    return strict(_derived(family.config_class, ExpandedConfig, __annotations__=annotations, **members))


class ExpandedModel(ReplayExpansion):
    """What our model classes add to transformers'."""

    exchanged: ClassVar[dict[type, type]]
    """Ours, by the transformers class that they replace."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.replay_expansion()
        self.exchange_classes()
        self.post_init()  # type: ignore[attr-defined]

    def exchange_classes(self: Any) -> None:
        """Put all mixers, expanded or not, and all norms on statex's ops, in place."""
        for module in self.modules():
            module.__class__ = self.exchanged.get(type(module), type(module))

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """As transformers does, and fill the buffers of a mixer, which it makes for un-expanded ones alone."""
        super()._init_weights(module)  # type: ignore[misc]
        family_of(self.config).fill_buffers(self.config, module)  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        """As transformers does, but where attention is lacking, the first forward makes the cache: generate would ask
        it how many tokens it holds, and it counts none."""
        is_left = generation_config.cache_implementation is None and _cache_in(model_kwargs) is None
        if not (lacks_attention(self.base_model) and is_left):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]

    def create_masks_for_generate(
        self: Any, config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        """As transformers' model or module of that name, which would ask the cache, too."""
        if lacks_attention(self.base_model):
            return arguments_without_attention(self.base_model, inputs_embeds, attention_mask)["attention_mask"]
        theirs = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return theirs(config, inputs_embeds, attention_mask, **kwargs)

    @classmethod
    def adopt(cls, model: Any) -> None:
        """Turn a model of transformers' class with a plan in its configuration into this class, in place."""
        model.__class__ = cls
        model.config.__class__ = cls.config_class  # type: ignore[attr-defined]
        vars(model.config).pop("model_type", None)  # the former one, which transformers puts there of a folder's
        model.exchange_classes()


@functools.cache
def expanded_model_classes(family: Family) -> ModelClasses:
    """The model classes of a family that hold a plan; imports its model code."""
    model, causal_lm = imported(family.model_class), imported(family.causal_lm_class)
    if family.holds_plan:
        return ModelClasses(model, causal_lm)
    exchanged = _on_statex_ops(family)
    members = {"config_class": expanded_config_class(family), "exchanged": exchanged}
    forward = fla_model_forward(model) if family.library == "fla" else _model_forward(model, family)
    ours = _derived(family.model_class, ExpandedModel, forward=forward, **members)
    exchanged[model] = ours
    forward = _causal_lm_forward(causal_lm, model, family)
    made = ModelClasses(ours, _derived(family.causal_lm_class, ExpandedModel, forward=forward, **members))
    _convert_checkpoints_alike(family)
    for one in made:  # a constructor would, and a model that becomes ours in place has been through another's
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(one), one._can_record_outputs)
    if family.library == "fla":  # however FLA came to be imported, models of these classes are known from now on
        AutoConfig.register(family.expanded_type, members["config_class"], exist_ok=True)
        AutoModel.register(members["config_class"], made.model, exist_ok=True)
        AutoModelForCausalLM.register(members["config_class"], made.causal_lm, exist_ok=True)
    return made


def _on_statex_ops(family: Family) -> dict[type, type]:
    """The family's mixer and norms on statex's ops, by transformers' own."""
    from statex.models.on_statex_ops import mixer_on_statex_ops

    if not family.mixer_class:
        return {}
    mixer = imported(family.mixer_class)
    forward = mixer_on_statex_ops(mixer.forward, family.recurrence)
    exchanged = {mixer: _derived(family.mixer_class, forward=forward)}
    forward = RECURRENCES[family.recurrence].norm_forward
    return exchanged | {imported(norm): _derived(norm, forward=forward) for norm in family.norm_classes}


def _convert_checkpoints_alike(family: Family) -> None:
    """Register for our model type the renaming that transformers applies to the family's own checkpoints."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    mapping = get_checkpoint_conversion_mapping(family.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(family.expanded_type, mapping, overwrite=True)


def _known_keywords(base: Any) -> set[str]:
    """What a forward of transformers reads, by its signature or through its decorators."""
    _, *names, _ = inspect.signature(base.forward).parameters
    older_cache_name = "past_key_values" if has_attention(base) else "cache_params"
    recorded = base._can_record_outputs or {}
    outputs = {"return_dict", *(f"output_{name}" for name in recorded)} if recorded else set()
    return {*names, older_cache_name, *outputs}


def _model_forward(base: Any, family: Family) -> Callable:
    """The forward of a base model."""
    _, *names, _ = inspect.signature(base.forward).parameters
    known, attends = _known_keywords(base), has_attention(base)
    of_the_loss = LOSS_KEYWORDS if attends else ()  # which language models with attention hand on
    recurrence = RECURRENCES[family.recurrence]
    new_cache = imported(recurrence.cache) if recurrence.cache else None
    run = base.forward if recurrence.around_model is None else recurrence.around_model(base.forward)

    @with_arguments_of(base.forward)
    def forward(
        self: Any,
        *args: Any,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', but packed documents are kept apart, and unknown keywords are refused.

        Args:
            seq_idx: [B, T], which document of a packed row each token belongs to. Such a pass makes no cache.
            cu_seqlens: the same for a batch of 1, as in FLA: [S + 1] int, the borders of the documents from 0 to T.
            output_attentions: of the Hugging Face interface, where some layers have attention.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in of_the_loss}
        check_keywords(kwargs, known)
        given = by_name(names, args, kwargs)
        if not attends:
            check_no_attentions(output_attentions)
        elif output_attentions is not None:
            given["output_attentions"] = output_attentions
        tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
        if not tokens:  # transformers says that they are missing
            return run(self, **given)
        if (seq_idx := one_seq_idx(seq_idx, cu_seqlens, tokens[0])) is not None:
            apart = document_arguments(self, tokens[0], seq_idx, given.get("attention_mask"))
            return run(self, **{"use_cache": False} | given | apart)
        if attends:
            given |= _masks_and_positions(self, tokens[0], given)
        if new_cache is not None and _cache_in(given) is None and _makes_cache(self, given):
            given[next(name for name in CACHE_NAMES if name in names)] = new_cache()
        return run(self, **given)

    return forward


def _masks_and_positions(model: Any, tokens: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What a base model that may have attention is given besides."""
    if lacks_attention(model):
        return arguments_without_attention(model, tokens, given.get("attention_mask"), given.get("position_ids"))
    if (cache := _cache_in(given)) is None or given.get("position_ids") is not None:
        return {}
    start = cache.get_seq_length()  # which some of transformers' models take for 0
    return {"position_ids": torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]}


def _cache_in(given: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _makes_cache(model: Any, given: dict[str, Any]) -> bool:
    """Whether transformers' forward makes a cache when none is given."""
    asked = given.get("use_cache")
    use_cache = model.config.use_cache if asked is None else asked
    return use_cache and not (model.gradient_checkpointing and model.training)


def _causal_lm_forward(base: Any, model: Any, family: Family) -> Callable:
    """The forward of a language model, which passes what it does not read to its base model."""
    known, attends = {*_known_keywords(base), *_known_keywords(model)}, has_attention(base)
    if family.library != "fla":  # which reads num_items_in_batch alone of these, and by its name
        known.update(LOSS_KEYWORDS)

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
        kwargs = as_fla_names_it(kwargs) if family.library == "fla" else kwargs
        check_keywords(kwargs, known)
        if not attends:
            check_no_attentions(output_attentions)
        elif output_attentions is not None:
            kwargs["output_attentions"] = output_attentions
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
