"""Recipes that cannot be run are refused before anything is written, with the key that is wrong."""

from pathlib import Path

import pytest

from statex.errors import UserError
from statex.recipe import parse_recipe
from statex.run import run_recipe
from statex.run.preflight import prepare_run
from tiny_recipe import changed, recipe_values, times, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


MISTAKES = {
    "suite": ("evaluation.suites=[mqar,x]", "evaluation.suites = "),
    "unknown suite": ('evaluation.suites=["mqra"]', "evaluation.suites = 'mqra': is not a suite; known suites: mqar,"),
    "factor": ("arms.reinit.expansion.factor=3", "arms.reinit.expansion.factor = 3: "),
    "layer": ("arms.reinit.expansion={ layers = [7] }", "arms.reinit.expansion.layers = 7: is not a recurrent layer"),
    "control's layer": ("arms.control.expansion={ layers = [7] }", "arms.control.expansion.layers = 7: is not a rec"),
    "rank": ("arms.preserve.expansion.rank=1000", "arms.preserve.expansion.rank = 1000: "),
    "family": ("models.gla.family=lstm", "models.gla.family = 'lstm': is unknown; known families: "),
    "configuration": (
        "models.gla.config.hidden=3",
        "models.gla.config.hidden = 3: is not a field of the architecture of",
    ),
    "vocabulary": ("models.gla.config.vocab_size=9", "models.gla.config.vocab_size = 9: follows from the tokenizer"),
    "sizes": ("models.mamba2.config.num_heads=3", "models.mamba2.config.n_groups = 2: does not divide num_heads = 3"),
    "type of a size": ('models.mamba2.config.hidden_size="x"', "models.mamba2.config.hidden_size = 'x': "),
    "GLA's sizes": ("models.gla.config.num_heads=3", "is not divisible by num_heads = 3"),
    "missing text": ('data.text.files=["none/*.txt"]', "data.text.files = 'none/*.txt': no file matches; give a path"),
    "missing text of evaluation": (
        'evaluation.text.files=["none/*.txt"]',
        "evaluation.text.files = 'none/*.txt': no file matches; give a path",
    ),
    "short text": (
        "training={ steps = 3, warmup_steps = 0, sequence_length = 1000000, tokens_per_step = 1000000 }",
        "training.sequence_length = 1000000: is longer than the whole training text",
    ),
    "short text of pre-training": (
        "models.gla.pretraining={ steps = 3, warmup_steps = 0, sequence_length = 1000000, tokens_per_step = 1000000 }",
        "models.gla.pretraining.sequence_length = 1000000: is longer than the whole training text",
    ),
    "recall": ("data.recall.shapes=[[512,4]]", "data.recall.shapes = 512: tokens_per_step gives fewer than 1"),
    "recall of evaluation": ("evaluation.mqar.num_keys=9", "evaluation.mqar.num_keys = 9: the tokenizer has only 8"),
    "needle too short": (
        'evaluation={ suites = ["offline"], mqar = { num_keys = 8, num_values = 8, num_pairs = [2] }, '
        "niah_single_3 = { lengths = [700, 90] } }",
        "evaluation.niah_single_3.lengths = 90: is too short for the needles, the question and the answer",
    ),
    "passkey too short": (
        'evaluation={ suites = ["passkey"], passkey = { lengths = [30] } }',
        "evaluation.passkey.lengths = 30: is too short for the needle, the question and the answer; give at least",
    ),
    "text too short for a needle": (
        'evaluation={ suites = ["niah_multikey"], niah_multikey = { lengths = [900000] } }',
        "is too short a haystack for",
    ),
    "documents too short": (
        "evaluation.nll_by_position.length=900000",
        "evaluation.nll_by_position.length = 900000: no held-out document has that many tokens",
    ),
    "vocabulary too small": (
        "data.recall.num_keys=60",
        "data.tokenizer.vocab_size = 300: 256 bytes, <|endoftext|> and",
    ),
    "trainer": ("training.trainer.dataloader_num_workers=2", "training.trainer.dataloader_num_workers = 2: cannot be"),
    "arm's trainer": ("arms.lpt.training.trainer.max_steps=2", "arms.lpt.training.trainer.max_steps = 2: has a key of"),
    "logger": ('training.report_to=["x"]', "training.report_to = 'x': is unknown or not installed; install it"),
    "divisor": ("training.sequences_per_device=3", "training.sequences_per_device = 3: does not divide the 4"),
    "sharding of one process": ("training.trainer.fsdp=full_shard", "training.trainer.fsdp = 'full_shard': shares a"),
    "optimizer": (
        "training.trainer.optim=adamw_bnb_8bit",
        "training.trainer = {'optim': 'adamw_bnb_8bit'}: can",
    ),
    "optimizer of an arm": (
        "arms.lpt.training.trainer.optim_args=x",
        "arms.lpt.training.trainer = {'optim_args': ",
    ),
    "numbers of a model": ("models.gla.config.norm_eps=-1.0", "models.gla.config.norm_eps = -1.0: "),
    "groups": ("models.mamba2.config.n_groups=3", "models.mamba2.config.n_groups = 3: does not divide num_heads"),
    "weights": ("models.gla.config.hidden_size=100000", "weights; to train them takes at least"),
    "weights of an arm": ("arms.preserve.expansion.factor=1000000000", "arms.preserve.expansion = {'every': 1, "),
    "keys": ("data.recall.num_keys=1000000", "data.tokenizer.vocab_size = 300: 256 bytes, <|endoftext|> and 1000008"),
    "folder that is a file": (
        "output=/dev/null/x",
        "output = '/dev/null/x/tiny': ",
    ),
    "no pre-training": ("models.x={ family = 'mamba2' }", "models.x.pretraining = None: is missing; say how the model"),
    "no checkpoint": ("models.x={ checkpoint = '/none' }", "models.x.model = '/none': is not a folder here and could"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_before_anything_is_written(text, tmp_path, mistake):
    override, message = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe(changed(recipe_values(text, tmp_path), override)))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{}/file/x", "/file is not a folder; change output or name"),
        ("{}/" + "x" * 250, "has a part longer than"),
        ("{}/loop/x", "/loop is not a folder; change output or name"),
        ("/proc/none", "cannot be the folder of a run ("),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(text, tmp_path, output, message):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = times(tmp_path)
    values = recipe_values(text, Path(output.format(tmp_path)), ["statex_gla"])
    with pytest.raises(UserError, match="output = ") as caught:
        prepare_run(parse_recipe(values))
    assert message in str(caught.value)
    assert times(tmp_path) == before


def test_the_folder_of_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"exists and is not the folder of a run; give this run another name, or remove"
    ):
        run_recipe(parse_recipe(recipe_values(text, tmp_path)))
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["notes.txt"]
