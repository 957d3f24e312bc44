"""When the steps of a training are captured; tests/gpu has what capturing does."""

import pytest
import torch
from transformers import Qwen3NextConfig

from statex.errors import UserError
from statex.settings import Data
from statex.training.captured import captures, check_capture

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "data", "named"),
    [
        ({"gradient_checkpointing": True}, {}, "gradient_checkpointing"),
        ({}, {"reset_state_at_documents": True}, "reset_state_at_documents"),
        ({"sequence_parallel": 2}, {}, "sequence_parallel"),
        ({"backpropagation_length": 8}, {}, "backpropagation_length"),
        ({"trainer": {"torch_empty_cache_steps": 2}}, {}, "torch_empty_cache_steps"),
        ({"trainer": {"optim": "lomo"}}, {}, "lomo"),
        ({}, {}, "a CPU"),
    ],
)
def test_what_cannot_be_captured_is_refused_where_it_is_asked_for(settings, changes, data, named):
    data = Data.model_validate(data)
    with pytest.raises(UserError, match=named) as error:
        check_capture("training", settings(cuda_graphs=True, **changes), data, device=torch.device("cpu"))
    assert error.value.field == "training.cuda_graphs"
    for value in ("auto", False):
        check_capture("training", settings(cuda_graphs=value, **changes), data)


def test_neither_several_processes_nor_other_families_are_captured(settings, make):
    asked = settings(cuda_graphs=True)
    with pytest.raises(UserError, match="2 processes"):
        captures(make("statex_gla").config, asked, Data(), CUDA, 2)
    with pytest.raises(UserError, match="qwen3_next, in whose steps"):
        captures(Qwen3NextConfig(num_hidden_layers=4), asked, Data(), CUDA, 1)
    assert captures(make("mamba2").config, asked, Data(), CUDA, 1)


def test_by_default_one_gpu_captures(settings, make, family):
    config, data = make(family).config, Data()
    assert captures(config, settings(), data, CUDA, 1)
    assert not captures(config, settings(), data, CUDA, 2)
    assert not captures(config, settings(), data, torch.device("cpu"), 1)
    assert not captures(config, settings(cuda_graphs=False), data, CUDA, 1)
    assert not captures(config, settings(gradient_checkpointing=True), data, CUDA, 1)
    assert not captures(config, settings(), Data(reset_state_at_documents=True), CUDA, 1)
