"""The memory that a stage of training surely needs, compared with what there is before anything is allocated."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from statex.errors import UserError
from statex.expansion.edits import ExpansionPlan
from statex.expansion.stored import layer_geometry
from statex.recipe import Training
from statex.settings import Recall
from statex.training.arguments import compute_in_bf16
from statex.utils.environment import host_memory

LAYER_TENSORS = 8


def tokens_of_pass(training: Training) -> int:
    """Tokens of a text sequence that a process computes on in one forward and backward pass."""
    length = min(training.sequence_length, training.backpropagation_length or training.sequence_length)
    return length // training.sequence_parallel


@dataclass(frozen=True)
class Size:
    """How big a model is: its weights, the elements of its state at batch 1, its layers and their width."""

    weights: int
    state: int
    layers: int
    width: int


def size_of(network: Any, plan: ExpansionPlan | None = None) -> Size:
    """The size of a model, also on the meta device; with a plan, of what the plan makes of it."""
    weights = sum(tensor.numel() for tensor in network.parameters())
    states = layer_geometry(network.config)
    if plan is not None:
        states |= {layer.index: layer.after for layer in plan.layers}
        edits = [edit for layer in plan.layers for edit in layer.tensors]
        weights += sum(math.prod(edit.after) - (math.prod(edit.before) if edit.before else 0) for edit in edits)
    width = network.config.hidden_size
    return Size(weights, sum(state.elements for state in states.values()), network.config.num_hidden_layers, width)


def require_memory(field: str, value: Any, size: Size, section: str, training: Training, recall: Recall) -> None:
    """Refuse a stage that needs more memory than there is, counting only what it cannot do without.

    That is: weights and gradients in fp32; for each token of a pass and each layer the tensors that its backward pass
    is made from (what is normed, projected and read, LAYER_TENSORS of the model's width; with gradient checkpointing
    the layer's input alone), and its state; and the random numbers that recall data is drawn with. Sharded training is
    compared with the memory of the host, where each process holds all weights once, and taken for checkpointed. Of
    sequences that processes share, each has its slice, and the whole state.

    Args:
        field, value: what the model comes from, for errors.
        section: the recipe's name of the section `training`.

    Raises:
        UserError: there is less.
    """
    groups = max(1, int(os.environ.get("WORLD_SIZE", "1")) // training.sequence_parallel)
    sequences = training.sequences_per_device or training.tokens_per_step // training.sequence_length // groups
    length = tokens_of_pass(training)
    is_sharded = bool(training.trainer.get("fsdp"))
    of_weights = (4 if is_sharded or training.train_only_expanded else 8) * size.weights
    kept = size.layers * size.width * (1 if is_sharded or training.gradient_checkpointing else LAYER_TENSORS)
    bytes_of_number = 2 if compute_in_bf16(training.precision) else 4
    of_step = sequences * (bytes_of_number * length * kept + 4 * size.state)
    if training.weights.mqar:
        rows = max(training.tokens_per_step // length for length, _ in recall.shapes)
        of_step += 12 * rows * max(recall.num_keys, recall.num_values)
    memory = host_memory()
    if torch.cuda.is_available() and not is_sharded:
        memory = torch.cuda.get_device_properties(0).total_memory
    if of_weights + of_step <= memory:
        return
    needed = f"at least {(of_weights + of_step) / 2**30:,.1f} GiB of memory, and there are {memory / 2**30:,.1f}"
    if of_weights > of_step:
        problem = f"makes {size.weights:,} weights; to train them takes {needed}"
        raise UserError(field, value, problem, "make the model smaller")
    problem = f"a pass over {sequences} sequences, each with a state of {size.state:,} numbers, takes {needed}"
    remedy = "lower it, set sequences_per_device or backpropagation_length, or make the model smaller"
    raise UserError(f"{section}.tokens_per_step", training.tokens_per_step, problem, remedy)


OF_RECOMPUTED, OF_KEPT, OF_KEPT_COMPILED = 6.0, 6.0, 4.3
"""Bytes of activations for each token and output of a projection: of the block that is computed again, in bf16; and of
each that keeps its own, with norms, gates and decays in fp32. Fitted to the peaks in docs/results/training.md and
docs/results/scaling.md."""


def peak_memory_of(size: Size, training: Training, outputs: int, vocabulary: int, processes: int) -> int:
    """Bytes at the peak of a training step on one GPU, predicted.

    Weights and AdamW's two moments in fp32; the input of each block; the activations of the blocks that keep them, or
    of one that is computed again; the logits of a chunk and their gradient. One process has its gradients only when the
    activations are gone; several have room for them all the time, in which they are reduced.

    Args:
        outputs: of all projections of the model together, the head's included.
        vocabulary: outputs of the head.
        processes: GPUs that share a step, a multiple of `sequence_parallel`; with FSDP they share the weights too.
    """
    is_sharded = bool(training.trainer.get("fsdp"))
    with_gradients = 16 * size.weights // (processes if is_sharded else 1)
    of_weights = with_gradients if processes > 1 else 12 * size.weights
    sequences = training.tokens_per_step // training.sequence_length
    groups = processes // training.sequence_parallel
    rows = min(training.sequences_per_device or sequences, max(1, sequences // groups))
    tokens = rows * tokens_of_pass(training)
    carried = 8 * rows * size.state if training.backpropagation_length is not None else 0  # two segments' states, fp32
    of_blocks = outputs - vocabulary
    of_stream = 2 if training.residual_precision == "bf16" else 4
    inputs = of_stream * tokens * size.width * size.layers
    if training.gradient_checkpointing:
        activations = int(OF_RECOMPUTED * tokens * of_blocks / size.layers)
    else:
        is_cut = training.sequence_parallel > 1 or training.backpropagation_length is not None
        compiled = training.compile is not False and not is_cut
        activations = int((OF_KEPT_COMPILED if compiled else OF_KEPT) * tokens * of_blocks)
        inputs -= 4 * tokens * size.width * size.layers  # they are among the activations, which were measured in fp32
    of_loss = 8 * min(training.loss_chunk, tokens) * vocabulary
    total = max(with_gradients, of_weights + inputs + activations + of_loss + carried)
    if isinstance(training.activation_memory, int):
        return max(total, training.activation_memory)
    return total
