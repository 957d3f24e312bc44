"""How much of its new state an expanded model uses: the new entries' share of the energy, and the state's rank.

Letters: B rows, H heads, K key and V value dimension of a layer's state [B, H, K, V].
"""

from typing import Any

import torch
import torch.nn.functional as F

from statex.expansion.edits import LayerChange
from statex.families import FAMILIES


def new_entries(layer: LayerChange) -> torch.Tensor:
    """(H, K, V) of an expanded layer's state: True at the entries that the state before expansion did not have.

    Where heads were merged these are the blocks off the diagonal, in which one old head's keys meet another's values;
    where keys were added to each head, the rows behind the old ones.
    """
    old = torch.ones(layer.before.key_dim, layer.before.value_dim, dtype=torch.bool)
    for step in layer.steps:
        old = torch.block_diag(*[old] * (step.before.num_heads // step.after.num_heads))
        old = F.pad(old, (0, step.after.value_dim - old.shape[1], 0, step.after.key_dim - old.shape[0]))
    return ~old.expand(layer.after.num_heads, -1, -1)


def layer_state(cache: Any, layer: LayerChange, model_type: str) -> torch.Tensor:
    """[B, H, K, V], the layer's state in a model's cache."""
    family = FAMILIES[model_type]
    view = family.state_matrices(family.cached_state(cache, layer.index))
    expected = (layer.after.num_heads, layer.after.key_dim, layer.after.value_dim)
    assert tuple(view.shape[1:]) == expected, f"layer {layer.index}: state {tuple(view.shape)}, plan {expected}"
    return view


def new_state_energy(states: torch.Tensor, layer: LayerChange) -> torch.Tensor:
    """(B,) the new entries' share of the sum of squares of [B, H, K, V]; 0 for zeros."""
    energy = states.float().square()
    total = energy.sum(dim=(1, 2, 3)).clamp_min(1e-30)
    return (energy * new_entries(layer).to(states.device)).sum(dim=(1, 2, 3)) / total


def effective_rank(states: torch.Tensor) -> torch.Tensor:
    """(B,) exp of the entropy of the normalised singular values of [B, H, K, V], averaged over heads; 0 for zeros.

    Source: Roy and Vetterli 2007.
    """
    values = torch.linalg.svdvals(states.float().cpu())
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(dim=-1)
    return torch.where(values.sum(dim=-1) > 0, entropy.exp(), 0.0).mean(dim=-1)
