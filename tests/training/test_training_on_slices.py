"""Sequences shared by processes: two of them train what one does, and what cannot be cut is refused beforehand."""

import json
from glob import glob
from pathlib import Path

import pytest
import stopping
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import run_ranks
from common import HYBRIDS, make_hybrid, make_rwkv7, make_xlstm
from delta_models import ALL_MODELS, make_delta
from statex.errors import UserError
from statex.recipe import merged, parse_recipe
from statex.run import run_recipe
from statex.run.preflight import check_recipe
from statex.settings import Data
from statex.training.arguments import training_arguments
from statex.training.blocks import compiles
from statex.training.slices import check_slices
from tiny_recipe import CONFIGS, EVALUATION, data_values, write_recipe


@pytest.fixture
def values(make, tokenizer, data, settings, tmp_path) -> dict:
    """A recipe of short documents and recall data over two checkpoints, each with an expanded layer."""
    for family in CONFIGS:
        make(family).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    lines = [line for path in glob(data.text.files[0]) for line in Path(path).read_text().splitlines() if line.strip()]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    section = data_values(str(tmp_path / "short.jsonl")) | {"reset_state_at_documents": True}
    section["recall"]["shapes"] = [[16, 4], [24, 3]]
    training = settings(steps=8, sequences_per_device=2, report_to=["tensorboard"], watch_state_every=3)
    return {
        "name": "run", "output": str(tmp_path / "one"), "data": section,
        "models": {family: {"checkpoint": str(tmp_path / family)} for family in CONFIGS},
        "arms": {
            "preserve": {"kind": "statex", "expansion": {"layers": [1], "init": "preserve"}},
            "segments": {
                "kind": "statex", "expansion": {"layers": [1], "init": "preserve"}, "models": ["statex_gla"],
                "training": {"backpropagation_length": 8},
            },
        },
        "training": training.model_dump(exclude_none=True), "evaluation": EVALUATION | {"suites": ["mqar"]},
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_that_share_sequences_train_what_one_does(values, tmp_path):
    """GLA to its end, also in segments, and Mamba2 half of the way, from where one process resumes with whole ones."""
    one, two = (parse_recipe(values | {"output": str(tmp_path / name)}) for name in ("one", "two"))
    run_recipe(one, evaluation=False)
    recipe = write_recipe(tmp_path / "two.toml", values | {"output": two.output})
    stopped = run_ranks(stopping.main, "train", recipe, "--set", "training.sequence_parallel=2")
    assert stopped.returncode != 0
    assert "the same command resumes" in stopped.stderr, stopped.stderr
    assert (two.folder / "mamba2" / "preserve-seed0" / "checkpoints" / "checkpoint-4").exists()
    run_recipe(two, evaluation=False)
    arms = (("statex_gla", "preserve", 2, 8), ("statex_gla", "segments", 2, 8), ("mamba2", "preserve", 1, 4))
    for family, arm, processes, steps in arms:
        ours, theirs = (each.folder / family / f"{arm}-seed0" for each in (two, one))
        summary = json.loads((ours / "training.json").read_text())
        assert (summary["num_processes"], summary["steps"]) == (processes, steps)
        use = ("new_state_energy_layer_1", "effective_rank_layer_1")
        for name in ("loss", "grad_norm", "grad_norm_fresh", "grad_norm_inherited", *use):
            assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), (family, name)
        weights, wanted = (load_file(each / "trained" / "model.safetensors") for each in (ours, theirs))
        before = load_file(ours / "expanded" / "model.safetensors")
        assert weights.keys() == wanted.keys()
        for name in wanted:
            assert (weights[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), (family, name)
            assert not torch.equal(weights[name], before[name])


def logged(folder: Path, name: str) -> dict[int, float]:
    """What was logged, by step."""
    events = EventAccumulator(str(folder / "logs")).Reload()
    return {event.step: event.value for event in events.Scalars(f"train/{name}")}


OURS = {
    "statex_rwkv7": (make_rwkv7, "token shift"),
    "statex_xlstm": (make_xlstm, "mLSTM"),
}


CUT = ("mamba", "falcon_mamba")
"""Those among the hybrids that have nothing to keep their sequences whole."""


@pytest.mark.parametrize("family", CUT)
def test_sequences_of_the_first_mamba_can_be_cut(family, data, settings):
    model = make_hybrid(family)
    check_slices(settings(sequence_parallel=2), data, model)
    check_slices(settings(backpropagation_length=16), data, model)


@pytest.mark.parametrize("family", [*(each for each in HYBRIDS if each not in CUT), *ALL_MODELS, *OURS])
def test_models_whose_sequences_stay_whole_are_refused(family, data, settings):
    if family in OURS:
        model = OURS[family][0]()
    else:
        make_model = make_delta if family in ALL_MODELS else make_hybrid
        model = make_model(family, **dict(next(iter(HYBRIDS[family][1].values())) if family in HYBRIDS else {}))
    check_slices(settings(), data, model)
    with pytest.raises(UserError) as caught:
        check_slices(settings(sequence_parallel=2), data, model)
    with pytest.raises(UserError) as in_segments:
        check_slices(settings(backpropagation_length=16), data, model)
    assert in_segments.value.field == "training.backpropagation_length"
    assert in_segments.value.problem == caught.value.problem
    reason = OURS[family][1] if family in OURS else "attention"
    assert caught.value.field == "training.sequence_parallel"
    assert caught.value.problem.startswith(f"{family} has ")
    assert reason in caught.value.problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 64, "sequence_parallel": 32}, r"training\.sequence_length = 64: leaves .* than the 3"),
        ({"weights": {"mqar": 1}, "sequence_parallel": 8}, r"data\.recall\.shapes = 20: does not divide among .* = 8"),
        ({"weights": {"facts": 1}, "sequence_parallel": 4}, r"data\.forms\.lengths = 18: does not divide among .* = 4"),
    ],
)  # fmt: skip
def test_sequences_without_equal_slices_are_refused(make, family, data, settings, changes, message):
    other = {"forms": {"lengths": [18]}, "recall": {"shapes": [[20, 4]]}}
    data = Data.model_validate(merged(data.model_dump(exclude_none=True), other))
    with pytest.raises(UserError, match=message):
        check_slices(settings(**changes), data, make(family))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel": 3}, "sequence_parallel = 3: does not divide sequence_length = 32; change one of them"),
        ({"sequence_parallel": 2, "compile": True}, "compile = True: does not go with sequence_parallel"),
    ],
)
def test_sections_that_contradict_themselves(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_noise_that_follows_from_the_length_is_refused(settings, tmp_path, monkeypatch):
    section = settings(sequence_parallel=2, trainer={"neftune_noise_alpha": 5.0})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"neftune_noise_alpha = 5\.0: is noise whose size follows from the length"):
        training_arguments(section, tmp_path, seed=0)


def test_one_process_is_refused_before_anything(values):
    values["training"] |= {"sequence_parallel": 2}
    recipe = parse_recipe(values)
    problem = "does not divide the number of processes, which is 1; start a multiple of 2 by torchrun"
    with pytest.raises(UserError, match=f"training.sequence_parallel = 2: {problem}"):
        run_recipe(recipe)
    assert not recipe.folder.exists()


@pytest.mark.parametrize(("world_size", "size"), [("4", 8), ("6", 4)])
def test_processes_that_make_no_whole_groups_are_refused(values, monkeypatch, world_size, size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    values["training"] |= {"sequence_parallel": size}
    values["data"]["recall"]["shapes"] = [[32, 4]]
    problem = f"does not divide the number of processes, which is {world_size}"
    with pytest.raises(UserError, match=f"training.sequence_parallel = {size}: {problem}"):
        check_recipe(parse_recipe(values))


def test_a_family_is_refused_beforehand(values, tokenizer, tmp_path, monkeypatch):
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    make_hybrid("bamba", **vocabulary).save_pretrained(tmp_path / "bamba")
    tokenizer.save_pretrained(tmp_path / "bamba")
    monkeypatch.setenv("WORLD_SIZE", "2")
    values["arms"]["preserve"] |= {"expansion": {"layers": [0]}, "training": {"sequence_parallel": 2}}
    del values["arms"]["segments"]
    values["models"] = {"bamba": {"checkpoint": str(tmp_path / "bamba")}}
    with pytest.raises(UserError, match=r"arms\.preserve\.training\.sequence_parallel = 2: bamba has layers of att"):
        check_recipe(parse_recipe(values))


def test_blocks_are_not_compiled_with_a_warning(make, family, settings, caplog):
    PartialState(cpu=True)
    config, gpu = make(family).config, torch.device("cuda")
    assert compiles(config, settings(), gpu)
    assert not compiles(config, settings(sequence_parallel=2), torch.device("cpu"))
    assert not caplog.records
    assert not compiles(config, settings(sequence_parallel=2), gpu)
    (record,) = caplog.records
    assert "blocks are not compiled: states that come from another process are in no graph" in record.message
