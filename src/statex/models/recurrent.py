"""What statex's own recurrent models share: how they are called, their cache, and how they generate.

Shape letters: B batch, T time, D width of the residual stream.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from statex.models.caches import cache_field, cache_of, one_cache
from statex.models.keywords import check_keywords, check_no_attentions
from statex.models.replay import ReplayExpansion
from statex.ops.segments import cu_seqlens_of, one_seq_idx

CACHE_NAME = cache_field(CausalLMOutputWithPast)  # what `generate` calls it, too


class RecurrentModel(ReplayExpansion):
    """Mixin of a base model: `embeddings`, `layers` and `norm` in a row; put it before the transformers classes.

    A layer is called with hidden states [B, T, D] and whatever the layer before it passed on, and returns hidden
    states, or a tuple of them and what it passes on. These are positional arguments: gradient checkpointing computes
    gradients for no others.
    """

    embeddings: Any
    layers: Any
    norm: Any
    gradient_checkpointing: bool
    training: bool

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Args:
        input_ids: [B, T], or `inputs_embeds` [B, T, D].
        attention_mask: [B, any >= T], 0 at padding; its last T columns are used.
        cache: the states of the tokens before, updated in place; `past_key_values` is its name before transformers
            5.24.
        use_cache: whether to return a cache, by default that of the configuration, and none in training.
        seq_idx: [B, T], which document of a packed row each token belongs to; the state is reset at each.
            It excludes a cache.
        cu_seqlens: the same for a batch of 1, as in FLA: [S + 1] int, the borders of the documents from 0 to T.
        output_attentions: part of the Hugging Face interface; must be false, as there are none.

        With `return_dict=False` the outputs come as a tuple.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        check_no_attentions(output_attentions)
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        T = hidden_states.shape[1]
        seq_idx = one_seq_idx(seq_idx, cu_seqlens, hidden_states)
        cache = self._cache(one_cache(cache, past_key_values), use_cache, is_packed=seq_idx is not None)
        mask = attention_mask[:, -T:] if attention_mask is not None and T > 1 else None
        borders = cu_seqlens_of(seq_idx) if seq_idx is not None else None

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states: list[torch.Tensor] = []
        handed_on: list[torch.Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            given = {"attention_mask": mask, "cache": cache, "seq_idx": seq_idx, "cu_seqlens": borders}
            outputs = layer(hidden_states, *handed_on, **given)
            hidden_states, *handed_on = outputs if isinstance(outputs, tuple) else (outputs,)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            **{CACHE_NAME: cache if use_cache is not False else None},  # type: ignore[arg-type]
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None, *, is_packed: bool) -> Cache | None:
        """The cache of a pass: that given, or a new one where one is to be returned.

        Raises:
            ValueError: a cache that could not be kept up to date.
        """
        if is_packed:
            if cache is not None or use_cache:
                raise ValueError("seq_idx: packed documents leave no cache and continue none; pass use_cache=False")
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("cache: gradient checkpointing would update it twice; leave one of them out")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return DynamicCache(config=self.config) if cache is None and use_cache else cache


class StaticStates(StaticCache):
    """The cache type for which generate compiles; the states of every cache keep their place in memory."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0 until something was read; after that a state does not know it, and transformers' own error says so."""
        return super().get_seq_length(layer_idx) if self.has_previous_state() else 0


class RecurrentForCausalLM(ReplayExpansion):
    """Mixin of a causal language model: a base model `model` and a head `lm_head`, likewise."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (transformers' own form)
    model: Any
    lm_head: Any
    loss_function: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embeddings = value

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """The first forward makes the cache; with `cache_implementation="static"` one for which generate compiles."""
        if model_kwargs.get(CACHE_NAME) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        elif generation_config.use_cache is not False and generation_config.cache_implementation == "static":
            model_kwargs[CACHE_NAME] = StaticStates(self.config, max_cache_len=0)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *,
        inputs_embeds: torch.Tensor | None = None,  # named, or generate assumes that the model does not use it
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict:
        """As transformers', without the mask once the prompt is read: it grows, which would recompile compiled code.

        Raises:
            ValueError: a cache that has read tokens is given with ids that are not marked, by a mask of all tokens, as
                those that follow. transformers would cut off the tokens read, but a state does not record their number.
        """
        cache = kwargs.get(CACHE_NAME)
        if is_first_iteration and cache is not None and cache.has_previous_state():
            if attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]:
                raise ValueError(
                    f"{CACHE_NAME}: it has read tokens, and these ids may contain them; give only the ids that follow, "
                    "and an attention_mask of all tokens"
                )
        elif kwargs.get("use_cache") and not is_first_iteration:
            attention_mask = None
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """The padding mask unchanged, [B, any]: a recurrence does not need a causal one."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        **loss_keywords: Any,
    ) -> CausalLMOutputWithPast:
        """As the base model's; `labels` [B, T] are shifted inside, -100 is ignored; logits are [B, T, vocabulary].

        `loss_keywords` are those of transformers' causal language-model loss, for example `num_items_in_batch`.
        """
        check_keywords(loss_keywords)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            return_dict=True,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **loss_keywords)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: cache_of(outputs)}
        )
