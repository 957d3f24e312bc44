"""Decoding without launching kernels one by one: a step of the model captured once as a CUDA graph.

`model.generate(..., cache_implementation="static")` compiles the step as well, which fuses its small kernels but takes
longer at first: 15 to 18 s against 2 s for a GLA of 1.3B parameters (docs/results/generation.md).
"""

import copy
from typing import Any

import torch

from statex.models.caches import cache_argument


class CapturedStep:
    """One token of every row: `step(ids)` continues `cache` by ids [B] and returns the logits [B, vocabulary].

    Args:
        model: a causal language model on a CUDA device whose layers are all recurrent, in evaluation mode.
        cache: its cache after the prompt, without padding to come; the graph reads and writes these very tensors.
        num_rows: B.

    The logits are those of the last call: the next one overwrites them. Model and cache must stay where they are.

    Raises:
        ValueError: the model is not on a CUDA device.
    """

    def __init__(self, model: Any, cache: Any, num_rows: int):
        if model.device.type != "cuda":
            raise ValueError(
                f"model is on {model.device}: a CUDA graph needs it on a CUDA device; call the model itself"
            )
        self.model = model
        self.cache_name = cache_argument(model)
        self.ids = torch.zeros((num_rows, 1), dtype=torch.long, device=model.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.device(model.device):
            self._compile_kernels(cache)
            with torch.cuda.graph(self.graph):
                self.logits = self._step(cache)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids[:, None])
        self.graph.replay()
        return self.logits

    def _step(self, cache: Any) -> torch.Tensor:
        return self.model(input_ids=self.ids, use_cache=True, **{self.cache_name: cache}).logits[:, -1]

    def _compile_kernels(self, cache: Any) -> None:
        """Take a step on a copy: nothing may be compiled or initialised while a graph is captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            trial = copy.deepcopy(cache)
            for _ in range(2):
                self._step(trial)
        torch.cuda.current_stream().wait_stream(stream)
