"""Models of odd configurations are refused before anything is allocated, or tried with a few tokens."""

import pytest
import torch

from common import HYBRIDS, make_hybrid
from statex.data.tokenizer import train_tokenizer
from statex.errors import UserError
from statex.expansion.config import ExpansionConfig
from statex.expansion.plan import plan_expansion
from statex.models import trial
from statex.models.expanded import expand
from statex.models.scratch import make_config
from statex.models.trial import model_without_memory, try_model
from statex.recipe import Training
from statex.settings import Data, Recall
from statex.training.memory import require_memory, size_of
from tiny_recipe import CONFIGS, TRAINING, data_values, write_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    data = Data.model_validate(data_values(write_text(tmp_path_factory.mktemp("text"))))
    return train_tokenizer(data.text, data.tokenizer, data.recall)


def check(tokenizer, family, **fields) -> None:
    """What the preflight of a run does with a model made from scratch."""
    config = make_config(family, CONFIGS[family] | fields, tokenizer)
    size = size_of(model_without_memory("config", fields, config))
    require_memory("config", fields, size, "training", Training.model_validate(TRAINING), Recall())
    try_model("config", fields, config, size.weights + size.state)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("whole", [10**9, 0])
def test_hybrids_are_tried_whole_or_not_at_all(family, whole, monkeypatch):
    """One of their layers does not stand for the others, nor does a list of their kinds fit it."""
    monkeypatch.setattr(trial, "WHOLE", whole)
    config = make_hybrid(family, **next(iter(HYBRIDS[family][1].values()))).config
    try_model("config", family, config, 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_runs_is_accepted_and_draws_nothing(tokenizer, family):
    before = torch.get_rng_state()
    check(tokenizer, family)
    check(tokenizer, family, num_hidden_layers=9)  # of which one is tried
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("statex_gla", "conv_size", 0, "config.conv_size = 0: is not a number from 1 to 256; give one."),
        ("statex_gla", "expand_v", 0.0, "config.expand_v = 0.0: Input should be greater than 0"),
        ("statex_gla", "initializer_range", -1.0, "Input should be greater than or equal to 0"),
        (
            "statex_gla",
            "dtype",
            "float16",
            "config.dtype = 'float16': is not a field of the architecture of statex_gla",
        ),
        ("statex_gla", "dtype", "nonsense", "is not a field of the architecture"),
        ("statex_gla", "hidden_size", 100_000, "weights; to train them takes at least"),
        ("statex_gla", "hidden_size", 10**12, "Input should be less than 2147483648"),
        ("statex_gla", "hidden_size", 0, "config.hidden_size = 0: Input should be greater than or equal to 1"),
        ("statex_gla", "hidden_size", -16, "Input should be greater than or equal to 1"),
        ("statex_gla", "num_hidden_layers", 10**30, "is not a number from 1 to 256"),
        ("statex_gla", "num_hidden_layers", 0, "is not a number from 1 to 256"),
        ("statex_gla", "num_hidden_layers", True, "Input should be a valid integer"),
        ("statex_gla", "norm_eps", -1.0, "Input should be greater than 0"),
        ("statex_gla", "norm_eps", 0.0, "Input should be greater than 0"),
        ("statex_gla", "hidden_act", "nonsense", "is not an activation that transformers knows"),
        ("statex_gla", "pad_token_id", 10**12, "follows from the tokenizer"),
        ("statex_gla", "expansion", {}, "is set by the arms; remove it."),
        ("mamba2", "state_size", 0, "Input should be greater than or equal to 1"),
        ("mamba2", "n_groups", 3, "does not divide num_heads = 4"),
        ("mamba2", "n_groups", 0, "Input should be greater than or equal to 1"),
        ("mamba2", "conv_kernel", 0, "is not a number from 1 to 256"),
        ("mamba2", "conv_kernel", 10**6, "is not a number from 1 to 256"),
        ("mamba2", "chunk_size", 10**7, "config.chunk_size = 10000000: is not a number from 1 to 65536"),
        ("mamba2", "hidden_act", "nonsense", "is not an activation that transformers knows"),
        ("mamba2", "hidden_act", "gelu", "makes a model that fails (hidden_act = 'gelu': "),
        ("mamba2", "layer_norm_epsilon", -1.0, "Input should be greater than 0"),
        ("mamba2", "time_step_min", -1.0, "Input should be greater than 0"),
        ("mamba2", "id2label", 3, "is not a field of the architecture of mamba2"),
        ("mamba2", "num_labels", 10**8, "is not a field of the architecture of mamba2"),
        ("mamba2", "quantization_config", {"load_in_8bit": True}, "is not a field of the architecture of mamba2"),
        ("mamba2", "text_config", {"a": 1}, "is not a field of the architecture of mamba2"),
    ],
)
def test_what_cannot_run_is_refused_without_being_allocated(tokenizer, family, field, value, message):
    with pytest.raises(UserError) as caught:
        check(tokenizer, family, **{field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("fields", [{"factor": 10**9}, {"factor": 2, "rank": 2**31 - 1}])
def test_an_expansion_is_sized_from_its_plan(tokenizer, fields):
    config = make_config("statex_gla", CONFIGS["statex_gla"], tokenizer)
    network = model_without_memory("config", {}, config)
    plan = plan_expansion(network, ExpansionConfig(every=1, init="preserve", **fields))
    with pytest.raises(UserError, match=r"expansion = .* weights; to train them takes at least .* GiB of memory"):
        require_memory(
            "expansion", fields, size_of(network, plan), "training", Training.model_validate(TRAINING), Recall()
        )


@pytest.mark.parametrize("family", CONFIGS)
def test_the_size_of_a_plan_is_that_of_the_expanded_model(tokenizer, family):
    config = make_config(family, CONFIGS[family], tokenizer)
    network = model_without_memory("config", {}, config)
    expansion = ExpansionConfig(every=1, init="preserve", factor=3)
    planned = size_of(network, plan_expansion(network, expansion))
    expand(network, expansion)
    assert planned == size_of(network)


def test_a_step_that_no_memory_holds_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("statex.training.memory.host_memory", lambda: 16 * 2**30)
    network = model_without_memory("config", {}, make_config("mamba2", CONFIGS["mamba2"], tokenizer))
    training = Training.model_validate(TRAINING | {"tokens_per_step": 2**26})
    with pytest.raises(UserError, match=r"training.tokens_per_step = 67108864: a pass over 2097152 sequences, .* GiB"):
        require_memory("config", {}, size_of(network), "training", training, Recall())
    in_parts = training.model_copy(update={"sequences_per_device": 8})
    require_memory("config", {}, size_of(network), "training", in_parts, Recall())
    of_one = {"tokens_per_step": 2**22, "sequence_length": 2**22, "weights": {"text": 1}}
    longer = Training.model_validate(TRAINING | of_one)
    monkeypatch.setattr("statex.training.memory.host_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"a pass over 1 sequences, .* or backpropagation_length,"):
        require_memory("config", {}, size_of(network), "training", longer, Recall())
    in_segments = longer.model_copy(update={"backpropagation_length": 2**16})
    require_memory("config", {}, size_of(network), "training", in_segments, Recall())
