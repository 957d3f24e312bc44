"""Commands in this process, and what they are given."""

import sys
from pathlib import Path

import pytest
import torch

from statex.cli import main
from statex.data.tokenizer import train_tokenizer
from statex.models.scratch import make_model
from statex.settings import Data
from tiny_recipe import CONFIGS, EVALUATION, TRAINING, data_values, write_recipe, write_text


@pytest.fixture
def call(monkeypatch, capsys):
    """call("inspect", "x"): exit status, standard output and standard error of a command in this process."""

    def call_main(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["statex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call_main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return Data.model_validate(data_values(write_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def models(data, tmp_path_factory) -> dict[str, Path]:
    """A folder of each family, with the same tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(data.text, data.tokenizer, data.recall)
    folders = {}
    for family, config in CONFIGS.items():
        folders[family] = tmp_path_factory.mktemp("models") / family
        make_model(family, config, tokenizer).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture
def gla(models) -> Path:
    return models["statex_gla"]


@pytest.fixture
def recipe(data, models, tmp_path) -> Path:
    """A recipe that only measures a checkpoint: all stages in a second."""
    values = {
        "name": "measured", "output": str(tmp_path / "runs"),
        "models": {"gla": {"checkpoint": str(models["statex_gla"])}},
        "arms": {"base": {"kind": "base"}}, "training": TRAINING, "data": data.model_dump(exclude_none=True),
        "evaluation": EVALUATION,
    }  # fmt: skip
    return write_recipe(tmp_path / "recipe.toml", values)
