"""Processes with a GPU each, by NCCL: slices compute what whole sequences do, and training does what one GPU does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tiny_recipe import recipe_values, write_recipe, write_text

SEVERAL = torch.cuda.device_count() >= 2
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not SEVERAL, reason="needs two GPUs")]

TESTS = Path(__file__).parents[1]
FAMILIES = ("gla", "mamba2")
CONFIGS = {
    "gla": {"hidden_size": 64, "num_heads": 4, "intermediate_size": 64},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16},
}
LOSS = {"ddp": 1e-4, "fsdp": 1e-4, "slices": 5e-4}  # relative; kernels cut slices into other chunks
WEIGHTS = 5e-3  # relative; AdamW makes whole steps of what rounding leaves of small gradients


def started(*arguments: str | Path, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in so many processes of torchrun, or in one without it."""
    path = os.pathsep.join([*map(str, (TESTS, TESTS / "ops", TESTS / "training")), *filter(None, sys.path)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes is not None else []), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes is None:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("script", [TESTS / "ops" / name for name in ("sliced.py", "models_on_slices.py")], ids=str)
def test_slices_compute_what_the_whole_does(script):
    done = started(script, processes=2)
    print(done.stdout)  # the largest differences
    assert done.returncode == 0, done.stderr[-5000:]


def values(folder: Path, name: str, **training) -> dict:
    """A recipe that trains both families from scratch, expands a layer of each and trains again, in fp32."""
    made = recipe_values(write_text(folder / "text"), folder / name)
    section = {"precision": "fp32", "compile": False, "cuda_graphs": False, "sequence_length": 128}
    section |= {"tokens_per_step": 512, "sequences_per_device": 1, "weights": {"text": 1.0}, "learning_rate": 2e-3}
    for family in FAMILIES:
        made["models"][family]["config"] |= CONFIGS[family]
        made["models"][family]["pretraining"] |= section
    made["arms"] = {"preserve": {"kind": "statex", "expansion": {"layers": [1], "init": "preserve"}}}
    made["training"] |= section | {"steps": 8, "report_to": ["tensorboard"]} | training
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """What one GPU trains."""
    recipe = write_recipe(folder / "one.toml", values(folder, "one"))
    done = started("-m", "statex", "train", recipe)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "one" / "tiny"


@pytest.mark.parametrize(
    ("way", "training", "resumed_by"),
    [
        ("ddp", {}, None),
        ("fsdp", {"trainer": {"fsdp": True}, "gradient_checkpointing": True}, 1),
        ("slices", {"sequence_parallel": 2}, None),
    ],
)
def test_two_gpus_train_what_one_does(one, folder, way, training, resumed_by):
    """GLA to its end, and Mamba2 half of the way, from where one GPU resumes."""
    recipe = write_recipe(folder / f"{way}.toml", values(folder, way, **training))
    stopped = started(TESTS / "training" / "stopping.py", "train", recipe, processes=2)
    assert stopped.returncode != 0
    two = folder / way / "tiny"
    assert (two / "mamba2" / "preserve-seed0" / "checkpoints" / "checkpoint-4").exists(), stopped.stderr[-5000:]
    if way == "slices":
        write_recipe(recipe, values(folder, way))  # whole sequences from here on
    resumed = started("-m", "statex", "train", recipe, processes=resumed_by)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    for family in FAMILIES:
        ours, theirs = (each / family / "preserve-seed0" for each in (two, one))
        losses, wanted = logged(ours, "loss"), logged(theirs, "loss")
        print(way, family, {step: (losses[step], wanted[step]) for step in wanted})
        assert losses == pytest.approx(wanted, rel=LOSS[way]), family
        weights, wanted = (load_file(each / "trained" / "model.safetensors") for each in (ours, theirs))
        assert weights.keys() == wanted.keys()
        for name in wanted:
            assert (weights[name] - wanted[name]).norm() <= WEIGHTS * wanted[name].norm(), (family, name)


def logged(folder: Path, name: str) -> dict[int, float]:
    """What was logged, by step."""
    events = EventAccumulator(str(folder / "logs")).Reload()
    return {event.step: event.value for event in events.Scalars(f"train/{name}")}
