"""flash-linear-attention's own models, enlarged in place: plan, surgery, folders, and what the layers compute.

Its kernels are replaced by references, so that all of this runs on a CPU; tests/gpu/test_fla_modules.py runs them.
"""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

import fla_models
import statex
from commands import run
from common import EXPANDED, UNTOUCHED, base_type, distance, logits, make_mamba2, mixer, tokens
from fla_models import CONFIGURATIONS, HYBRID, make_fla
from statex.evaluation.reader import Reader
from statex.expansion.plan import plan_expansion
from statex.expansion.state_use import layer_state, new_state_energy
from statex.expansion.stored import stored_plan
from statex.families import ALL_FAMILIES, FAMILIES, family_of
from statex.models.documents import document_arguments
from statex.training.loss import chunked_loss

pytestmark = pytest.mark.skipif("gsa" not in FAMILIES, reason="needs flash-linear-attention")
TYPES = tuple(CONFIGURATIONS)
PRESERVED = tuple(name for name in TYPES if "preserve" in ALL_FAMILIES[name].methods)
CASES = [
    (name, configuration, init, method)
    for name in TYPES
    for configuration in CONFIGURATIONS[name]
    for init, methods in ALL_FAMILIES[name].methods.items()
    for method in methods
]
each_case = pytest.mark.parametrize(("name", "configuration", "init", "method"), CASES)
each_type = pytest.mark.parametrize("name", TYPES)


@pytest.fixture(autouse=True, scope="module")
def cpu():
    with fla_models.on_the_cpu():
        yield


def expanded(name, configuration="plain", **expansion):
    model = make_fla(name, configuration)
    statex.expand(model, **{"layers": [EXPANDED], "factor": 2, "seed": 3} | expansion)
    return model


@each_case
def test_plan_surgery_and_folder(name, configuration, init, method, tmp_path):
    model = make_fla(name, configuration)
    untouched = {key: value.clone() for key, value in mixer(model, UNTOUCHED).state_dict().items()}
    expansion = statex.ExpansionConfig(layers=[EXPANDED], factor=2, init=init, method=method)
    planned = plan_expansion(model.config, expansion)
    plan = statex.expand(model, expansion)
    assert plan == planned
    before, after = plan.layers[0].before, plan.layers[0].after
    assert after.elements == 2 * before.elements
    assert statex.state_report(model).total_elements == 3 * before.elements
    shapes = {edit.name: edit.after for edit in plan.layers[0].tensors}
    prefix = f"model.layers.{EXPANDED}.attn."
    assert {key: list(value.shape) for key, value in mixer(model).named_parameters(prefix=prefix[:-1])} == {
        key: shape for key, shape in shapes.items() if key.startswith(prefix)
    }
    assert all(torch.equal(value, mixer(model, UNTOUCHED).state_dict()[key]) for key, value in untouched.items())

    model.save_pretrained(tmp_path / "expanded")
    ids = tokens()
    wanted = logits(model, ids)
    assert wanted.isfinite().all()
    for load in (statex.load, AutoModelForCausalLM.from_pretrained):
        found = load(tmp_path / "expanded").eval()
        assert type(found) is type(model)
        assert torch.equal(logits(found, ids), wanted)
    assert statex.inspect(tmp_path / "expanded").state.total_elements == 3 * before.elements


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("configuration", ["plain", "everything"])
@pytest.mark.parametrize("name", PRESERVED)
def test_preserve_keeps_the_function_and_every_new_row_learns(name, configuration, factor):
    model = make_fla(name, configuration)
    ids = tokens(length=70)  # more than FLA runs token by token
    before = logits(model, ids)
    for _ in range(2):  # a layer that has grown grows again
        statex.expand(model, layers=[EXPANDED], factor=factor, init="preserve")
    assert distance(logits(model, ids), before) < 2e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = tokens(batch=4)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    for tensor, parameter in mixer(model).named_parameters():
        assert bool(parameter.grad.flatten(1).any(1).all() if parameter.ndim > 1 else parameter.grad.any()), tensor


@pytest.mark.parametrize(("name", "configuration"), [(name, each) for name in TYPES for each in CONFIGURATIONS[name]])
def test_generation_with_a_cache_equals_generation_without(name, configuration):
    init, methods = list(FAMILIES[name].methods.items())[1]
    model = expanded(name, configuration, init=init, method=methods[0])
    ids, options = tokens(length=9), {"max_new_tokens": 6, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)
    cache = model(ids, use_cache=True).past_key_values
    step = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    whole = logits(model, torch.cat([ids, ids[:, :1]], dim=1))
    assert distance(step[:, -1], whole[:, -1]) < 1e-5


@each_type
def test_left_padding_and_packed_documents(name):
    model = expanded(name, init="inherit")
    ids = tokens(batch=1, length=12)
    wanted = logits(model, ids)
    padded, mask = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    padded[:, 4:], mask[:, 4:] = ids, 1
    padded[1, :4], mask[1, :4] = 7, 1
    assert distance(logits(model, padded, attention_mask=mask)[:1, 4:], wanted) < 1e-5
    packed = torch.cat([tokens(batch=1, length=4, seed=5), ids], dim=1).repeat(2, 1)
    seq_idx = (torch.arange(16) >= 4).long().repeat(2, 1)
    found = logits(model, packed, seq_idx=seq_idx)
    assert distance(found[:, 4:], wanted.repeat(2, 1, 1)) < 1e-5
    assert distance(logits(model, packed[:1], cu_seqlens=torch.tensor([0, 4, 16]))[:, 4:], wanted) < 1e-5
    every = model(packed, seq_idx=seq_idx, output_hidden_states=True).hidden_states
    assert {one.shape for one in every} == {(2, 16, 32)}
    assert [type(one) for one in model.model(packed, seq_idx=seq_idx, return_dict=False)] == [torch.Tensor]
    with pytest.raises(ValueError, match="packed documents cannot be padded"):
        logits(model, packed, seq_idx=seq_idx, attention_mask=mask)
    cache = model(ids, use_cache=True).past_key_values
    for given in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="packed documents cannot be continued from a cache"):
            model(packed, seq_idx=seq_idx, **given)


def test_arguments_that_nothing_reads_are_refused():
    """FLA's loss reads none of transformers' other keywords of a loss."""
    model, ids = expanded("gsa"), tokens(batch=1, length=4)
    for name in ("cash", "shift_labels", "ignore_index"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(ids, labels=ids, **{name: ids})
    with pytest.raises(ValueError, match="has no attention weights"):
        model.model(ids, None, None, None, False, True)


@each_type
def test_a_state_is_continued_by_several_tokens(name):
    model, ids = expanded(name, init="inherit"), tokens(length=41)
    reader = Reader(model, piece=16)
    assert reader.supports_chunked_continuation
    logs = logits(model, ids).log_softmax(-1)[:, :-1]
    wanted = -logs.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(reader.next_token_nll(ids), wanted, rtol=1e-4, atol=1e-4)


@each_type
def test_training_reduces_the_loss(name):
    model = expanded(name, init="reinit").train()
    ids = tokens(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)


@each_type
def test_the_state_in_the_cache(name):
    init, methods = next(iter(FAMILIES[name].methods.items()))
    model = expanded(name, init=init, method=methods[0])
    cache = model(tokens(batch=3), use_cache=True).past_key_values
    (layer,) = stored_plan(model.config).layers
    state = layer_state(cache, layer, name)
    assert bool(state.abs().amax(dim=(0, 3)).all())  # every key or slot is written, in every head
    assert (new_state_energy(state, layer) > 0).all()


@each_type
@pytest.mark.parametrize("is_expanded", [False, True])
def test_the_loss_in_chunks(name, is_expanded, monkeypatch):
    model, ids = (expanded if is_expanded else make_fla)(name).train(), tokens()
    found = []
    for context in (nullcontext(), chunked_loss(model, chunk=16)):
        with context:
            model.zero_grad()
            loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(30)).loss
            loss.backward()
        found.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert "_compute_logits_and_loss" not in vars(model)
    with monkeypatch.context() as another:
        another.delattr("fla.models.modeling_utils.FLAPreTrainedModel._compute_logits_and_loss")
        with pytest.raises(statex.UserError, match="in another way, not known here"), chunked_loss(model, chunk=16):
            pass
    model.config.use_l2warp = True
    with pytest.raises(statex.UserError, match="use_l2warp = True: adds a loss"), chunked_loss(model, chunk=16):
        pass


@each_type
def test_layers_of_attention_are_left_alone(name, monkeypatch):
    monkeypatch.setattr("fla.layers.attn.flash_attn_func", len)  # a layer cannot be made without
    model = make_fla(name, **HYBRID)
    assert statex.expand(model, every=1, factor=2).layers[1].index == 2
    with pytest.raises(statex.UserError, match="is not a recurrent layer"):
        statex.expand(make_fla(name, **HYBRID), layers=[1])


@each_type
def test_a_folder_of_fla_s_own(name, tmp_path):
    model = make_fla(name)
    model.save_pretrained(tmp_path)
    ours = "statex_gla" if name == "gla" else name
    assert [each.init for each in statex.inspect(tmp_path).possible if each.problem is None] == [
        init for init, methods in FAMILIES[ours].methods.items() for _ in methods
    ]
    loaded, ids = statex.load(tmp_path).eval(), tokens()
    assert base_type(loaded) == ours
    assert distance(logits(loaded, ids), logits(model, ids)) < 1e-5
    packed, seq_idx = torch.cat([ids, ids], dim=1), (torch.arange(40) >= 20).int().repeat(2, 1)
    assert distance(logits(loaded, packed, seq_idx=seq_idx)[:, 20:], logits(model, ids)) < 1e-5
    if name != "gla":
        loaded.save_pretrained(tmp_path / "again")
        again = statex.load(tmp_path / "again").eval()
        assert torch.equal(logits(again, ids), logits(loaded, ids))
        with pytest.raises(ValueError, match=r"drops it; load the model with statex\.load"):
            document_arguments(model.model, packed, seq_idx)
    statex.expand(loaded, every=1, factor=2)


def load_and_expand(folder):
    model = statex.load(folder)
    for _ in range(2):
        statex.expand(model, layers=[EXPANDED], factor=2)
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)


def test_a_folder_is_loaded_and_expanded_in_a_process_that_had_no_fla(tmp_path):
    make_fla("gsa").save_pretrained(tmp_path)
    done = run(load_and_expand, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_control_of_fla_s_own_gla_becomes_statex_s(tmp_path):
    model, ids = make_fla("gla"), tokens()
    statex.reinitialize(model, layers=[EXPANDED])
    model.save_pretrained(tmp_path)
    loaded = statex.load(tmp_path).eval()
    assert stored_plan(loaded.config).kind == "reinitialize"
    assert distance(logits(loaded, ids), logits(model, ids)) < 1e-5


def test_what_cannot_be():
    for model, expansion, problem in (
        (make_fla("gsa"), {"init": "preserve"}, "new slots that the softmax"),
        (make_fla("hgrn2"), {"init": "preserve"}, "no more keys than values"),
        (make_fla("hgrn2"), {"factor": 3}, "does not divide the 4 heads"),
        (make_fla("gla", feature_map="relu"), {"init": "preserve"}, "relu"),
        (make_fla("retnet", feature_map="relu"), {"init": "preserve"}, "relu"),
        (make_fla("delta_net", qk_activation="elu"), {"init": "preserve"}, "elu"),
        (make_fla("gated_deltanet"), {"init": "inherit", "method": "merge"}, "one decay rate"),
        (make_fla("gla"), {"init": "preserve", "rank": 2}, "low-rank"),
    ):
        before = type(model)
        with pytest.raises(statex.UserError, match=problem):
            statex.expand(model, layers=[EXPANDED], **expansion)
        assert type(model) is before


def test_fla_s_own_mamba2_does_not_take_the_place_of_transformers(tmp_path):
    """Which it would in transformers' table, in whose place it is registered."""
    from fla.models import Mamba2Config

    make_mamba2().save_pretrained(tmp_path)
    for model in (statex.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(model) is Mamba2ForCausalLM
    with pytest.raises(statex.UserError, match="is here a model of flash-linear-attention's"):
        family_of(Mamba2Config())
