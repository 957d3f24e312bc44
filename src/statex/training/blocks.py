"""How a model's blocks run in training: each compiled as one graph, as torchtitan does, their activations kept or
computed again in the backward pass, and what they hand on in fp32 or bf16.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config
from accelerate.logging import get_logger
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from statex.errors import UserError
from statex.families import family_of
from statex.recipe import Training

logger = get_logger(__name__)  # of the main process alone

MOST_GRAPHS = 64
"""Graphs of one forward: one a shape of layer, kept or computed again, with and without documents, for text and for
recall data."""


def compiles(config: PreTrainedConfig, training: Training, device: torch.device) -> bool:
    """Whether the blocks of a model are compiled; "auto": on a GPU, where the family's are by default, and whole
    sequences."""
    if training.compile != "auto":
        return training.compile
    could = device.type == "cuda" and family_of(config).compiled_by_default
    if could and training.sequence_parallel > 1:
        logger.warning("blocks are not compiled: states that come from another process are in no graph")
        return False
    if could and training.backpropagation_length is not None:
        logger.warning("blocks are not compiled: states that are carried from segment to segment are in no graph")
        return False
    return could


def check_compile(section: str, training: Training, config: PreTrainedConfig) -> None:
    """Raise UserError where a section asks for compiled blocks of a family whose blocks make no one graph."""
    if training.compile is True and not family_of(config).blocks_compile:
        problem = f"does not go with {config.model_type}: its blocks do not make one graph each"
        raise UserError(f"{section}.compile", True, problem, 'leave it out, or use "auto"')


class TrainingBlocks:
    """The blocks of a model in their order, those without a recurrence included.

    Gradient checkpointing is called here and not by transformers' layers, so that it lies inside of the compiled graph:
    what the backward pass does not need is then not computed again.

    Args:
        compiled: compile each block's forward. The hooks of sharded training stay around it; what cannot become one
            graph is an error of torch.compile, never a slower run.
        recomputed: begin with all activations computed again; compiled blocks that keep theirs keep none that follow
            from others elementwise.
        stream: dtype of the residual stream from the first block to the last, under autocast to it; the model's last
            norm gets it in fp32. None: as the blocks leave it.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool, recomputed: bool, stream: torch.dtype | None = None):
        self.compiled, self.stream, self.short_of_memory = compiled, stream, recomputed
        path = family_of(model.config).mixer_path.partition(".{}")[0]
        self.blocks = list(model.get_submodule(path).children())
        self.num_kept = 0 if recomputed else len(self.blocks)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside this context, the model's blocks run so."""
        run = torch.compile(_run, fullgraph=True) if self.compiled else _run
        with self._compiler_settings() if self.compiled else nullcontext():
            for index, block in enumerate(self.blocks):
                block.forward = self._forward(run, index, block)
            try:
                yield
            finally:
                for block in self.blocks:
                    del block.forward

    @contextmanager
    def _compiler_settings(self) -> Iterator[None]:
        # torch would cut each block at the borders of DDP's buckets, for gradients to be reduced while it is computed
        settings = {"recompile_limit": MOST_GRAPHS, "optimize_ddp": False}
        # It keeps what a product reads in the backward pass, as the output of a norm or of SwiGLU. Where memory decides
        # how many blocks keep anything, these are made again by a kernel that reads their inputs in any case: in a GLA
        # of 1.3B that is a third of what a block keeps
        cut = {"ban_recompute_materialized_backward": not self.short_of_memory}
        with torch._dynamo.config.patch(settings), torch._functorch.config.patch(cut):
            yield

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within it, inside of `running`, they run as their classes say, neither compiled nor computed again."""
        forwards = [vars(block).pop("forward") for block in self.blocks]
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.forward = forward

    def _forward(self, run: Callable, index: int, block: nn.Module) -> Callable:
        own = type(block).forward

        @functools.wraps(own)
        def forward(*args: Any, cu_seqlens: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if cu_seqlens is not None:
                if self.compiled:  # for any number of documents, not first for that of the first batch
                    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
                kwargs["cu_seqlens"] = cu_seqlens
            # The last blocks keep theirs: the backward pass has freed them when it computes the others again
            recompute = index < len(self.blocks) - self.num_kept and block.training and torch.is_grad_enabled()
            if self.stream is None:
                return run(own, block, recompute, None, *args, **kwargs)
            # Into the first block and out of the last it is cast here, so that they share the graph of those between
            hidden, *others = args
            outputs = run(own, block, recompute, self.stream, hidden.to(self.stream), *others, **kwargs)
            return _with_stream(outputs, torch.float32) if index == len(self.blocks) - 1 else outputs

        return forward


def _run(
    forward: Callable, block: nn.Module, recompute: bool, stream: torch.dtype | None, *args: Any, **kwargs: Any
) -> Any:
    if recompute:
        outputs = checkpoint(functools.partial(forward, block, **kwargs), *args, use_reentrant=False)
    else:
        outputs = forward(block, *args, **kwargs)
    return outputs if stream is None else _with_stream(outputs, stream)


def _with_stream(outputs: Any, dtype: torch.dtype) -> Any:
    """What a block returns, its hidden states, which are all of it or come first, in another dtype."""
    if isinstance(outputs, tuple):
        return outputs[0].to(dtype), *outputs[1:]
    return outputs.to(dtype)
