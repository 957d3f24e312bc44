"""What is xLSTM's alone; the behaviour matrix runs on it as on GLA."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_expanded_function import dead_rows, gradients_after
from transformers import AutoModelForCausalLM, xLSTMConfig

import statex
from common import EXPANDED, Case, distance, logits, make_xlstm, mixer, tokens
from statex.models.xlstm.mixer import running_maximum


@pytest.fixture
def folder(tmp_path):
    """A model of transformers' own with the weights of ours."""
    ours = make_xlstm()
    fields = {name: value for name, value in ours.config.to_dict().items() if name not in ("model_type", "expansion")}
    theirs = AutoModelForCausalLM.from_config(xLSTMConfig(**fields | {"autocast_kernel_dtype": "float32"}))
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_of_transformers_own_becomes_ours(folder):
    theirs, ours, ids = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        statex.load(folder).eval(),
        tokens(length=90),
    )
    assert distance(logits(ours, ids), logits(theirs, ids)) < 1e-5  # in chunks of 64, and one by one
    assert statex.inspect(folder).model_type == "statex_xlstm"
    with pytest.raises(statex.UserError, match=r"'xlstm': is transformers' own.*load its folder with statex.load"):
        statex.expand(theirs, layers=[EXPANDED])


@pytest.mark.parametrize(("fields", "words"), [
    ({"weight_mode": "fused"}, "weight_mode = 'fused': joins projections"),
    ({"use_bias": True}, "use_bias = True: gives biases"),
    ({"num_heads": 3}, "qk_dim_factor = 0.5: makes 16 channels, which is no multiple of num_heads = 3"),
])  # fmt: skip
def test_what_ours_is_not_is_refused(fields, words):
    with pytest.raises(StrictDataclassClassValidationError) as caught:
        make_xlstm(**fields)
    assert words in str(caught.value)


def test_new_queries_and_keys_learn_within_two_steps():
    case = Case("xlstm", "plain", "preserve", factor=3)
    for num_steps in range(2):
        gradients = gradients_after(case.expanded(), num_steps)
        new = {name: gradients[f"{name}.weight"].unflatten(0, (2, 24))[:, 8:].flatten(0, 1) for name in "qk"}
        assert dead_rows(new["q"]) == 0
        assert dead_rows(new["k"]) == (0 if num_steps else len(new["k"]))


def test_exact_copies_would_change_nothing():
    model, x = make_xlstm().double(), torch.randn(2, 20, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted, old = mixer(model)(x), {name: getattr(mixer(model), name).weight.clone() for name in "qk"}
        statex.expand(model, layers=[EXPANDED], init="inherit", factor=2)
        assert distance(mixer(model)(x), wanted) > 0.01
        for name, scale in (("q", 0.5), ("k", 1.0)):
            rows = old[name].unflatten(0, (2, 8)).repeat(1, 2, 1).flatten(0, 1)
            getattr(mixer(model), name).weight.copy_(scale * rows)
        assert distance(mixer(model)(x), wanted) < 1e-12


def test_the_running_maximum_begins_anew_with_each_document():
    generator = torch.Generator().manual_seed(0)
    write, forget = 5 * torch.randn(2, 9, 3, generator=generator), -torch.rand(2, 9, 3, generator=generator)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    found, m = running_maximum(write, forget, None, documents), torch.zeros(2, 3)
    for t in range(9):
        begins = documents[:, t] != documents[:, max(t - 1, 0)]
        m = torch.maximum(forget[:, t] + m.masked_fill(begins[:, None], 0.0), write[:, t])
        torch.testing.assert_close(found[:, t], m)


def test_reinit_keeps_the_gates():
    model = make_xlstm()
    kept = [mixer(model).igate_preact.bias.clone(), mixer(model).fgate_preact.weight.clone()]
    statex.expand(model, layers=[EXPANDED])
    assert torch.equal(mixer(model).igate_preact.bias, kept[0])
    assert torch.equal(mixer(model).fgate_preact.weight, kept[1])
    assert abs(mixer(model).q.weight.std() / (2 / (5 * 32)) ** 0.5 - 1) < 0.1
