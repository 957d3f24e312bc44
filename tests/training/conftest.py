"""Text, a tokenizer and tiny models to train."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from statex.data.tokenizer import train_tokenizer
from statex.models.scratch import make_model
from statex.recipe import Training
from statex.settings import Data
from tiny_recipe import CONFIGS, HYBRIDS, MAMBAS, TRAINING, data_values, write_text


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests compare weights bit by bit: they, and what they start, run on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    return Data.model_validate(data_values(write_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="session")
def tokenizer(data):
    return train_tokenizer(data.text, data.tokenizer, data.recall)


@pytest.fixture(scope="session")
def make(tokenizer) -> Callable[..., PreTrainedModel]:
    """make("mamba2", hidden_size=32): a tiny model, the same at each call."""

    def make_tiny(family: str, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        return make_model(family, (CONFIGS | HYBRIDS | MAMBAS)[family] | fields, tokenizer)

    return make_tiny


@pytest.fixture(params=list(CONFIGS))
def family(request) -> str:
    return request.param


@pytest.fixture
def settings() -> Callable[..., Training]:
    """settings(steps=8): the tiny training section with changes."""

    def training_section(**changes: Any) -> Training:
        return Training.model_validate(TRAINING | changes)

    return training_section
