"""The behaviour matrix on the families of the gated delta rule, and what is theirs alone."""

import inspect

import pytest
import test_expanded_function
import test_expanded_running
import test_packed_documents
import test_persistence
import torch
from test_expanded_function import dead_rows, gradients_after
from test_packed_documents import DOCUMENTS, document_by_document

import statex
from common import EXPANDED, GENERATING, distance, logits, make_gla, make_mamba2, mixer, tokens
from delta_models import ALL_MODELS, CASES, MODELS, DeltaCase, delta_mixer, make_delta
from statex.families import FAMILIES, StateGeometry
from statex.models.documents import document_arguments

OTHERS = ("gla", "mamba2")
SOME = [CASES[2], CASES[6], CASES[8], CASES[9]]
EXCEPTIONS = {
    ("test_dtype_survives", CASES[6]),  # transformers loads OLMo's A_log in fp32, whatever the others are
    ("test_dtype_survives", CASES[8]),  # and Kimi's dt_bias
    ("test_a_model_made_from_the_configuration_alone", CASES[8]),  # A_log has one entry, whose spread is none
    ("test_a_loaded_model_trains_and_generates_on", CASES[2]),  # whose experts then run otherwise
}
every_family = pytest.mark.parametrize("family", MODELS)


def matrix():
    """Every test of the behaviour matrix that runs over cases: those over all on all of these, the others on some."""
    for module in (test_expanded_function, test_expanded_running, test_packed_documents, test_persistence):
        for name, test in vars(module).items():
            arguments = set(inspect.signature(test).parameters) if name.startswith("test_") else set()
            if "case" not in arguments or any(other in name for other in OTHERS):
                continue
            marks = {mark.args[0]: mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"}
            marked = marks.pop("case")
            if not {case.family for case in marked} & set(OTHERS):  # of the first Mamba alone
                continue
            inits = {case.init for case in marked}
            cases = CASES if inits == {case.init for case in CASES} and len(marked) > len(GENERATING) else SOME
            (option, values), *_ = [*marks.items(), (None, [None])]
            for case in cases:
                for value in values if case.init in inits and (name, case) not in EXCEPTIONS else ():
                    yield pytest.param(test, case, {option: value} if option else {}, id=f"{name}-{case}-{value}")


@pytest.mark.parametrize(("test", "case", "given"), matrix())
def test_the_behaviour_matrix(test, case, given, tmp_path):
    given = given | {"case": case, "tmp_path": tmp_path}
    test(**{name: given[name] for name in inspect.signature(test).parameters})


def new_rows(model, gradients, before):
    """Rows that an expansion added, by tensor and q or k: behind the old ones of each key head."""
    G, H = model.config.linear_num_key_heads, model.config.linear_num_value_heads
    num_values = H * model.config.linear_value_head_dim
    parts = {}
    for name, gradient in gradients.items():
        if name == "in_proj_qkvz.weight":
            q, k, _ = gradient.unflatten(0, (G, -1)).split([4 * before, 4 * before, 2 * num_values // G], dim=1)
        elif name in ("in_proj_qkv.weight", "conv1d.weight"):
            q, k = (each.unflatten(0, (G, -1)) for each in gradient[:-num_values].chunk(2))
        elif name in ("q_proj.weight", "k_proj.weight"):
            parts[f"{name}: {name[0]}"] = gradient.unflatten(0, (G, -1))[:, before:].flatten(0, 1)
            continue
        else:
            continue
        parts |= {f"{name}: {letter}": rows[:, before:].flatten(0, 1) for letter, rows in (("q", q), ("k", k))}
    return parts


@every_family
def test_which_new_rows_learn_when_it_is_preserved(family):
    case = DeltaCase(family, "grouped", "preserve", factor=4)
    first = new_rows(case.expanded(), gradients_after(case.expanded(), 0), 8)
    assert len(first) == 4
    for name, gradient in first.items():
        alive = name.endswith(": k") and "proj" in name
        assert dead_rows(gradient) == (0 if alive else len(gradient)), name
    for num_steps in (1, 2):
        later = new_rows(case.expanded(), gradients_after(case.expanded(), num_steps), 8)
        assert {name: dead_rows(gradient) for name, gradient in later.items()} == dict.fromkeys(first, 0)


@every_family
def test_a_layer_can_be_expanded_twice_and_keeps_its_function(family):
    model = make_delta(family).double()
    with statex.statex_ops():
        before = logits(model, tokens())
    for _ in range(2):
        statex.expand(model, layers=[EXPANDED], factor=2, init="preserve")
    assert mixer(model).head_k_dim == 32
    assert distance(logits(model, tokens()), before) < 1e-10


@every_family
def test_exact_copies_would_change_nothing_but_the_size_of_what_is_read(family):
    """Without the noise, an inherited layer's mixer is the old one: keys are normalised, and so is what is read."""
    model = make_delta(family).double()
    config, x = model.config, torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = delta_mixer(mixer(model).state_dict(), x, config, (4, 8, 12))
    old, new = StateGeometry(4, 8, 12), StateGeometry(4, 32, 12)
    rows = FAMILIES[family].inherited_rows(config, old, new)
    copies = mixer(model).state_dict()
    for name, tensor in mixer(model).state_dict().items():
        if name in rows:
            parts, start = [], 0
            for segment in rows[name].segments:
                end = start + segment.num_blocks * segment.before
                part = tensor[start:end].unflatten(0, (segment.num_blocks, segment.before))
                parts.append(part.repeat(1, segment.after // segment.before, *[1] * (part.ndim - 2)).flatten(0, 1))
                start = end
            copies[name] = torch.cat(parts)
    after = delta_mixer(copies, x, config, (4, 32, 12))
    assert distance(after, before) < 0.05  # what the epsilons of the norms make of it


@every_family
def test_inherit_keeps_the_size_of_what_the_mixer_makes(family):
    case = DeltaCase(family, "grouped", "inherit", factor=4)
    model, x = case.model(), torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), statex.statex_ops():
        before = mixer(model)(x)
        case.expand(model)
        ratio = mixer(model)(x).norm() / before.norm()
    assert 1 / 1.5 < ratio < 1.5


@every_family
def test_reinit_is_the_model_s_own_initialisation(family):
    model = make_delta(family, initializer_range=0.05)
    before = {name: parameter.clone() for name, parameter in mixer(model).named_parameters()}
    statex.expand(model, layers=[EXPANDED])
    after = dict(mixer(model).named_parameters())
    for name in ("dt_bias", "A_log"):
        assert torch.equal(after[name], before[name])
    for name, parameter in after.items():
        if name.endswith("proj.weight") or "in_proj" in name:
            assert abs(parameter.std() / 0.05 - 1) < 0.2, name
    (norm,) = (parameter for name, parameter in after.items() if "norm" in name)
    assert torch.equal(norm, torch.ones(12))
    fresh = 1.0 if family == "olmo_hybrid" else 0.0  # Qwen's norms multiply by 1 + weight
    assert torch.equal(model.model.layers[EXPANDED].input_layernorm.weight, torch.full((32,), fresh))


@every_family
def test_what_cannot_be_is_refused(family):
    model = make_delta(family)
    with pytest.raises(statex.UserError, match="low-rank growth exists only for GLA"):
        statex.expand(model, layers=[EXPANDED], init="preserve", rank=2)
    with pytest.raises(statex.UserError, match="the recurrent layers are 0-1"):
        statex.expand(model, layers=[2])
    with pytest.raises(statex.UserError, match="SiLU only"):
        statex.expand(make_delta(family, hidden_act="gelu"), layers=[EXPANDED])


def test_interleaved_rows_are_listed_once():
    plan = statex.expand(make_delta("qwen3_next"), layers=[EXPANDED], factor=2, init="preserve")
    assert "q: 16 new rows, fresh; k: 16 new rows, zero\n" in str(plan)


@pytest.mark.parametrize("init", ["inherit", "preserve"])
def test_merged_heads_of_kimi_start_afresh(init):
    model = make_delta("kimi_linear")
    with pytest.raises(statex.UserError, match=r'one decay rate .*use init = "reinit"'):
        statex.expand(model, layers=[EXPANDED], init=init, factor=2)
    with pytest.raises(statex.UserError, match=r"factor = 3.*use one of \[2, 4\]"):
        statex.expand(model, layers=[EXPANDED], factor=3)


def test_an_unexpanded_kimi_is_on_our_op_within_statex_ops():
    model, ids = make_delta("kimi_linear"), tokens()
    wanted = logits(model, ids)
    with statex.statex_ops():
        found = logits(model, ids)
    assert 0 < distance(found, wanted) < 1e-5


@every_family
def test_a_merged_layer_can_grow_and_a_grown_one_be_merged(family):
    model, ids = make_delta(family).double(), tokens()
    statex.expand(model, layers=[EXPANDED], method="merge", factor=2)
    before = logits(model, ids)
    statex.expand(model, layers=[EXPANDED], factor=3, init="preserve")
    assert (mixer(model).head_k_dim, mixer(model).head_v_dim, mixer(model).num_v_heads) == (48, 24, 2)
    assert distance(logits(model, ids), before) < 1e-10
    statex.expand(model, layers=[1], factor=2)
    plan = statex.expand(model, layers=[1], method="merge")
    assert (plan.factor, plan.layers[0].after) == (2, StateGeometry(2, 32, 24))
    logits(model, ids)


@every_family
def test_merging_that_cannot_be_is_refused(family):
    model = make_delta(family)
    for init in ("inherit", "preserve"):
        with pytest.raises(statex.UserError, match=r'one decay rate .*use init = "reinit", or method = "grow"'):
            statex.expand(model, layers=[EXPANDED], init=init, method="merge")
    with pytest.raises(statex.UserError, match=r"factor = 4.* the 2 heads of a layer.*use one of \[2\]"):
        statex.expand(model, layers=[EXPANDED], method="merge", factor=4)


@pytest.mark.parametrize(("make", "init", "method", "words"), [
    (make_mamba2, "reinit", "merge", "is not how a layer of mamba2 is enlarged"),
    (make_gla, "reinit", "grow", 'with init = \'reinit\'; use "merge"'),
    (make_gla, "preserve", "merge", 'use init = "reinit" or "inherit", or method = "grow"'),
])  # fmt: skip
def test_a_method_that_a_family_lacks_is_refused(make, init, method, words):
    with pytest.raises(statex.UserError) as caught:
        statex.expand(make(), layers=[EXPANDED], init=init, method=method)
    assert words in str(caught.value)


@pytest.mark.parametrize("family", ALL_MODELS)
def test_packed_documents_of_an_unexpanded_model(family):
    """Through the base model, as the Trainer does: transformers' language-model classes do not pass them on."""
    model, ids = make_delta(family), tokens(batch=3)
    with statex.statex_ops(), torch.no_grad():
        given = {"use_cache": False} | document_arguments(model.model, ids, DOCUMENTS)
        packed = model.lm_head(model.model(ids, **given).last_hidden_state)
        assert distance(packed, document_by_document(model, ids)) < 1e-5
