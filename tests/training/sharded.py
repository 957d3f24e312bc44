"""Trains recipes in FSDP2 ranks, forked, for importing torch and transformers takes longer than the training."""

import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from commands import import_statex
from statex.recipe import Recipe, load_recipe
from statex.run import run_recipe
from statex.training.trainer import StatexTrainer


def kill_at(step: int) -> None:
    """Have this process killed as it begins a step of a stage that has not been resumed."""
    original = StatexTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.start_step == 0 and self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    StatexTrainer.training_step = training_step


def shard_on_a_cpu() -> None:
    """Have accelerate shard models on a CPU as it does on an accelerator; there it would leave them whole."""
    set_device, training_step = PartialState.set_device, StatexTrainer.training_step

    def as_an_accelerator(self):
        set_device(self)
        self.distributed_type = DistributedType.MULTI_MUSA

    def with_shards(self, model, *args, **kwargs):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return training_step(self, model, *args, **kwargs)

    PartialState.set_device, StatexTrainer.training_step = as_an_accelerator, with_shards


def train(recipe: Recipe, ranks: int | None, step: int | None = None) -> list[int]:
    """Train a recipe in forked processes, as torchrun starts them or, None, in one without it; their exit codes,
    negative where a signal ended one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks or 1):
        child = os.fork()
        if child == 0:
            if ranks is not None:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                shard_on_a_cpu()
            if step is not None:
                kill_at(step)
            run_recipe(recipe, evaluation=False)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(whole: Path, alone: Path, die_at: int, *killed: tuple[Path, Sequence[int]]) -> None:
    """Two ranks train the recipe `whole`; then one process trains `alone`, which says the same without FSDP. Then two
    ranks train each one of `killed`, which says the same and has one stage of training, and are killed (SIGKILL) as
    they begin step `die_at`, counted from 0. For each number beside it that many ranks resume in a copy of what is
    left, `OUTPUT-by-4`."""
    import_statex()
    assert train(load_recipe(whole), 2) == [0, 0]
    assert train(load_recipe(alone), None) == [0]
    for path, numbers in killed:
        recipe = load_recipe(path)
        assert train(recipe, 2, die_at) == [-signal.SIGKILL] * 2
        for ranks in numbers:
            copy = recipe.model_copy(update={"output": f"{recipe.output}-by-{ranks}"})
            shutil.copytree(recipe.output, copy.output)
            assert train(copy, ranks) == [0] * ranks
