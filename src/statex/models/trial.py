"""A model tried before time is spent on it: its size is computed without allocating it, and one tiny pass is made."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from statex.errors import UserError, explained
from statex.expansion.state import state_report
from statex.expansion.stored import stored_plan
from statex.models.dispatch import statex_ops

NUM_TOKENS = 8
WHOLE, WHOLE_LAYERS = 2**22, 8
"""Most weights and state elements, and layers, of a model that is tried whole; of a larger one, one layer is tried."""
MOST = 2**24
"""Largest model that is tried at all: 64 MiB of weights, and as much for gradients."""


def model_without_memory(field: str, value: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, where nothing is allocated.

    Args:
        field, value: what the configuration comes from, for errors.

    Raises:
        UserError: the configuration describes no model, one with an empty tensor, or one without a recurrent state.
    """
    with explained(field, value, "makes no model", "correct the configuration"), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        num_state_elements = state_report(config).total_elements
    empty = [name for name, tensor in network.named_parameters() if not tensor.numel()]
    if empty or num_state_elements < 1:
        problem = f"makes the tensor {empty[0]} empty" if empty else "makes a model without a recurrent state"
        raise UserError(field, value, problem, "give sizes above 0")
    return network


def try_model(
    field: str, value: Any, config: PreTrainedConfig, size: int, change: Callable[[Any, bool], object] | None = None
) -> None:
    """One forward and backward pass of a sequence of a few random tokens, on the CPU, with random weights.

    A model larger than WHOLE is tried with one of its layers and a small vocabulary, and not at all if that is still
    too large. torch's random state is left as it was.

    Args:
        field, value: what the model comes from, for errors.
        config: of the model before any expansion.
        size: its weights and state elements, after the expansion.
        change: expands the model; its second argument says whether the model has only one layer.

    Raises:
        UserError: the pass fails, or its loss or gradients are not finite.
    """
    one_layer = size > WHOLE or config.num_hidden_layers > WHOLE_LAYERS
    if one_layer:
        size //= config.num_hidden_layers
    if size > MOST or (one_layer and not _layers_are_alike(config)):
        return
    config = _one_layer(config) if one_layer else copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), explained(field, value, "makes a model that fails", "correct the values"):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if change is not None:
            change(network, one_layer)
        ids = torch.randint(config.vocab_size, (1, NUM_TOKENS))
        with statex_ops():
            loss = network(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
    gradients = [tensor.grad for tensor in network.parameters() if tensor.grad is not None]
    if not all(torch.isfinite(tensor).all() for tensor in [loss, *gradients]):
        problem = f"{NUM_TOKENS} random tokens give a loss or gradients that are NaN or infinite"
        raise UserError(field, value, problem, "correct what makes them so large, or negative under a root")


def _layers_are_alike(config: Any) -> bool:
    """Whether one layer represents all: none is expanded or of another kind, and no list names their kinds."""
    has_list = any(isinstance(vars(config).get(name), list) for name in ("layer_types", "layers_block_type"))
    return stored_plan(config) is None and not has_list and len(set(getattr(config, "layer_types", ()))) < 2


def _one_layer(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = 1, NUM_TOKENS
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config
