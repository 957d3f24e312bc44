"""What a recipe's training will take, estimated before it starts: tokens, operations, memory, GPU hours, money.

N: parameters, without embeddings that are only looked up.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from statex.benchmarking.ops import FLOPS_PER_SECOND
from statex.recipe import Recipe, Training
from statex.run.arms import CHANGED_KINDS, plan_of_arm
from statex.run.inputs import Inputs
from statex.run.preflight import check_recipe
from statex.run.selection import Selection, chains_of
from statex.training.memory import Size, peak_memory_of, size_of

MFU = 0.45
PRODUCT_PER_SECOND = FLOPS_PER_SECOND["H200"]
"""The basis of hours where no throughput is given: the bf16 matrix product of an H100 or H200, and the share of it that
training steps of 1.3B models reach (docs/results/training.md; small models reach less)."""
GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class StageCost:
    """A stage of training, of one model and arm, for all seeds.

    Args:
        arm: its name; None for pre-training.
        parameters, state: number of the model's parameters, and of its state's elements at batch 1.
        steps, tokens: of one seed.
        operations: floating-point, of one seed: 6 N a token, 2 N more where all activations are recomputed, and 7
        products with the state, 3 more where processes share sequences.
        memory: bytes at the peak, by the number of GPUs, a multiple of `sequence_parallel`, as that many share the
        activations. Weights, gradients and optimizer state are shared by FSDP alone.
        hours: of one GPU, for all seeds.
    """

    model: str
    arm: str | None
    parameters: int
    state: int
    steps: int
    tokens: int
    operations: float
    memory: dict[int, int]
    hours: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def costs(
    recipe: Recipe, selection: Selection | None = None, *, tokens_per_second: float | None = None
) -> list[StageCost]:
    """What the training stages of a recipe take; the recipe is checked as before a run, and nothing is written.

    Args:
        selection: the part of the recipe; default: all.
        tokens_per_second: of one GPU, as `statex bench training` or the log of a run reports it; default: from MFU.

    Raises:
        UserError: what `check_recipe` raises.
    """
    inputs = check_recipe(recipe, is_started=False)
    return list(_costs(recipe, selection, inputs, tokens_per_second))


def _costs(
    recipe: Recipe, selection: Selection | None, inputs: Inputs, tokens_per_second: float | None
) -> Iterator[StageCost]:
    chains = chains_of(recipe, selection)
    for name in dict.fromkeys(chain.model for chain in chains):
        network, seeds = inputs.outline(name).network, sum(chain.model == name for chain in chains)
        stages: list[tuple[str | None, Training]] = []
        pretraining = recipe.models[name].pretraining
        if pretraining is not None:
            stages.append((None, pretraining))
        arms = dict.fromkeys(arm for chain in chains if chain.model == name for arm in chain.arms)
        stages += [(arm, recipe.arm_training(arm)) for arm in arms if recipe.arms[arm].kind != "base"]
        for arm, training in stages:
            plan = plan_of_arm(network, recipe.arms[arm]) if arm and recipe.arms[arm].kind in CHANGED_KINDS else None
            yield _cost(name, arm, network, size_of(network, plan), training, seeds, tokens_per_second)


def _cost(
    model: str,
    arm: str | None,
    network: Any,
    size: Size,
    training: Training,
    seeds: int,
    tokens_per_second: float | None,
) -> StageCost:
    tokens = training.steps * training.tokens_per_step
    looked_up = 0 if network.config.tie_word_embeddings else network.get_input_embeddings().weight.numel()
    products = 7 if training.sequence_parallel == 1 else 10
    is_recomputed = training.gradient_checkpointing and training.activation_memory == "least"
    of_token = (8 if is_recomputed else 6) * (size.weights - looked_up) + 2 * products * size.state
    seconds = tokens / tokens_per_second if tokens_per_second else of_token * tokens / (MFU * PRODUCT_PER_SECOND)
    outputs = sum(module.out_features for module in network.modules() if isinstance(module, nn.Linear))
    vocabulary = network.get_output_embeddings().weight.shape[0]
    counts = [gpus for gpus in GPUS if gpus % training.sequence_parallel == 0] or [training.sequence_parallel]
    memory = {gpus: peak_memory_of(size, training, outputs, vocabulary, gpus) for gpus in counts}
    return StageCost(
        model, arm, size.weights, size.state, training.steps, tokens, of_token * tokens, memory, seeds * seconds / 3600
    )
