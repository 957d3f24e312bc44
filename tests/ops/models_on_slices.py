"""Whole models, expanded, on slices of sequences against whole sequences, in the ranks of torchrun or forked ones."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from recurrence_inputs import assert_close, distance
from sliced import BOUND, of_rank, under_torchrun
from torch import Tensor

import statex
from common import VOCABULARY, make_gla, make_hybrid, make_mamba2
from delta_models import make_delta
from statex.models.dispatch import statex_ops
from statex.ops import sequence_parallel, use_backend

MODELS = {
    "gla": partial(make_gla, use_short_conv=True, hidden_size=64, num_heads=4),
    "mamba2": partial(make_mamba2, hidden_size=64, num_heads=8, state_size=16, n_groups=2),
    "qwen3_next": partial(make_delta, "qwen3_next", layer_types=["linear_attention"] * 3),
    "mamba": partial(make_hybrid, "mamba", hidden_size=64),
}
TOKENS = 192


def computed(model, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the sum of the cross-entropies."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach()} | gradients


def check(backend: str) -> None:
    for name, make in MODELS.items():
        with torch.device("cpu"):
            model = make()
            statex.expand(model, layers=[1], init="preserve")
        model.to(torch.get_default_device())
        ids, targets = (torch.randint(VOCABULARY, (2, TOKENS)) for _ in range(2))
        with statex_ops(), use_backend(backend):
            wanted = computed(model, ids, targets)
            with sequence_parallel(dist.group.WORLD):
                got = computed(model, of_rank(ids), of_rank(targets))
        wanted["logits"] = of_rank(wanted["logits"])
        for gradient in (value for key, value in got.items() if key != "logits"):
            dist.all_reduce(gradient)
        assert_close(got, wanted, 2 * BOUND[backend])
        distances = torch.tensor([distance(got[key], wanted[key]) for key in wanted])  # logits first
        dist.all_reduce(distances, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(f"{name} by {backend}: logits {distances[0]:.1e}, gradients {distances[1:].max():.1e}")


def check_backends() -> None:
    check("torch")
    if torch.cuda.is_available():
        check("triton")


if __name__ == "__main__":
    under_torchrun(check_backends)
