"""Trains a recipe in two FSDP2 ranks: `sharded.py WHOLE ALONE DIE_AT KILLED RANKS [KILLED RANKS ...]`.

First both ranks train the recipe WHOLE; then one process trains ALONE, which says the same without FSDP. Then two ranks
train each KILLED, which says the same and has one stage of training, and are killed (SIGKILL) as they begin step
DIE_AT, counted from 0. For each number of RANKS ("1,2,4") that many resume in a copy of what is left, `OUTPUT-by-4`.

Processes are forked, for importing torch and transformers takes longer than the training.
"""

import os
import shutil
import signal
import socket
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from statex.recipe import Recipe, load_recipe
from statex.run import run_recipe
from statex.training.trainer import StatexTrainer


def die_at(step: int) -> None:
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
                die_at(step)
            run_recipe(recipe, evaluation=False)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(whole: str, alone: str, step: str, *killed: str) -> None:
    assert train(load_recipe(whole), 2) == [0, 0]
    assert train(load_recipe(alone), None) == [0]
    for path, numbers in zip(killed[::2], killed[1::2], strict=True):
        recipe = load_recipe(path)
        assert train(recipe, 2, int(step)) == [-signal.SIGKILL] * 2
        for ranks in map(int, numbers.split(",")):
            copy = recipe.model_copy(update={"output": f"{recipe.output}-by-{ranks}"})
            shutil.copytree(recipe.output, copy.output)
            assert train(copy, ranks) == [0] * ranks


if __name__ == "__main__":
    main(*sys.argv[1:])
