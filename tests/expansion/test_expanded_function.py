"""Behaviour matrix, first part: what an expansion does to the tensors, the state and the function of a model."""

import copy
import re

import pytest
import torch

import statex
from common import (
    CASES,
    EXPANDED,
    HYBRIDS,
    UNTOUCHED,
    Case,
    base_type,
    distance,
    logits,
    make_gla,
    make_mamba2,
    mixer,
    state_after,
    tokens,
)
from naive_models import gla_mixer
from statex.families import falcon_mamba, family_of, jamba, mamba_type
from statex.families.mamba2_type import Mamba2TypeFamily

every_case = pytest.mark.parametrize("case", CASES, ids=str)
BASE_STATE = {"gla": 32 * 16, "mamba2": 4 * 8 * 16}
PRESERVING = [case for case in CASES if case.init == "preserve"]


def preserving(*families):
    return pytest.mark.parametrize("case", [case for case in PRESERVING if case.family in families], ids=str)


@every_case
def test_plan_counts_what_the_model_holds(case):
    model = case.model()
    before = state_after(model, tokens())
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    plan = case.expand(model)
    (layer,) = plan.layers
    assert [layer.before.elements, layer.after.elements] == [before[EXPANDED], state_after(model, tokens())[EXPANDED]]
    assert layer.after.elements == plan.factor * layer.before.elements
    family, factor = statex.FAMILIES[base_type(model)], case.factor
    assert plan.factor == (factor or family.default_factor(model.config, layer.before))

    parameters = dict(model.named_parameters())
    prefix = statex.FAMILIES[plan.model_type].mixer_name(model.config, EXPANDED) + "."
    in_plan = {edit.name: edit for edit in layer.tensors}
    assert {name for name in in_plan if name.startswith(prefix)} == {n for n in parameters if n.startswith(prefix)}
    for name, edit in in_plan.items():
        assert (edit.before, edit.after) == (shapes.get(name), list(parameters[name].shape))

    report = statex.state_report(model)
    assert [state.elements for state in report.layers] == state_after(model, tokens())
    assert report.total_elements_before == sum(before)
    assert report.total_bytes == 4 * report.total_elements
    assert report.to_dict() == statex.state_report(model.config).to_dict()


@every_case
def test_only_what_the_plan_calls_fresh_changes(case):
    model = case.model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fresh = case.expand(model).fresh_tensors
    after = dict(model.named_parameters())
    changed = {name for name, p in after.items() if name not in before or not torch.equal(before[name], p)}
    assert changed == fresh
    assert not [name for name in changed if not re.search(rf"(layers|blocks)\.{EXPANDED}\.", name)]
    assert any(re.search(rf"(layers|blocks)\.{UNTOUCHED}\.", name) for name in before)


@pytest.mark.parametrize("case", PRESERVING, ids=str)
def test_preserve_leaves_the_logits_equal(case):
    ids = tokens()
    exact = 1e-6 if case.family == "jamba" else 1e-10  # its norms are in fp32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, exact)):
        model = case.model().to(dtype)
        with statex.statex_ops():
            before = logits(model, ids)
        case.expand(model)
        assert distance(logits(model, ids), before) < tolerance


def test_preserve_keeps_weights_of_double_precision():
    model = make_gla().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-9 * torch.randn_like(parameter)  # no longer a number of fp32
    before = logits(model, tokens())
    statex.expand(model, layers=[EXPANDED], factor=2, init="preserve")
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-12, atol=1e-12)


def gradients_after(model, num_steps, seed=0):
    """Gradients of the expanded mixer after `num_steps` steps of AdamW on random tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    ids = tokens(batch=4, length=24, seed=seed)
    for step in range(num_steps + 1):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        if step < num_steps:
            optimizer.step()
    return {name: parameter.grad for name, parameter in mixer(model).named_parameters()}


def dead_rows(gradient):
    """How many rows have no gradient at all."""
    return int((gradient.flatten(1) == 0).all(1).sum()) if gradient.ndim > 1 else int((gradient == 0).sum())


def new_rows_gla(config, gradients):
    """Rows that `preserve` added, by tensor: behind the old ones of each head."""
    parts = {}
    for name, gradient in gradients.items():
        if "low_rank" in name:
            parts[name] = gradient
        elif name.split(".")[0] in ("q_proj", "k_proj", "q_conv1d", "k_conv1d") or name.startswith("gk_proj.1"):
            num_heads = config.num_heads if name.startswith("q") else config.num_kv_heads
            parts[name] = gradient.unflatten(0, (num_heads, -1))[:, config.key_dim // config.num_heads :].flatten(0, 1)
    return {name: part for name, part in parts.items() if len(part)}


def new_rows_mamba2(config, gradients):
    """Rows that an expansion added, by tensor and B or C: behind the old ones of each group."""
    parts, family = {}, family_of(config)
    state, num_groups = family.geometry(config), getattr(config, family.names.num_groups)
    inner = state.num_heads * state.value_dim
    for name, gradient in gradients.items():
        if name.startswith("in_proj"):
            b_and_c = gradient[2 * inner : -state.num_heads]
        elif name.startswith("conv1d"):
            b_and_c = gradient[inner:]
        else:
            continue
        for letter, rows in zip("BC", b_and_c.chunk(2)):
            parts[f"{name}: {letter}"] = rows.unflatten(0, (num_groups, -1))[:, state.key_dim :].flatten(0, 1)
    return parts


LATER = ("rwkv7", "reinit")
"""Whose low-rank projections begin with a half that is 0 (test_rwkv7_family.py)."""


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.init != "preserve" and (case.family, case.init) != LATER], ids=str
)
def test_every_fresh_row_learns_at_once(case):
    model = case.model()
    fresh = {re.split(rf"(?:layers|blocks)\.{EXPANDED}\.", name)[1] for name in case.expand(model).fresh_tensors}
    gradients = gradients_after(model, 0)
    for name, gradient in gradients.items():
        if any(path.endswith(f".{name}") for path in fresh):
            assert dead_rows(gradient) == 0, name


@preserving("gla")
def test_which_new_rows_learn_when_gla_is_preserved(case):
    model = case.model()
    config = model.config
    case.expand(model)
    first = new_rows_gla(config, gradients_after(copy.deepcopy(model), 0))
    alive = "q_low_rank.1.weight" if case.rank else "q_proj.weight"
    for name, gradient in first.items():
        assert dead_rows(gradient) == (0 if name == alive else len(gradient)), name
    for num_steps in (1, 2):
        later = new_rows_gla(config, gradients_after(copy.deepcopy(model), num_steps))
        assert {name: dead_rows(gradient) for name, gradient in later.items()} == dict.fromkeys(first, 0)


@preserving("mamba2", *(family for family in HYBRIDS if isinstance(statex.FAMILIES[family], Mamba2TypeFamily)))
def test_which_new_rows_learn_when_mamba2_is_preserved(case):
    model = case.model()
    config = model.config
    case.expand(model)
    first = new_rows_mamba2(config, gradients_after(copy.deepcopy(model), 0))
    alive = {"in_proj.weight: C", "in_proj.bias: C", "conv1d.bias: C"}
    for name, gradient in first.items():
        assert dead_rows(gradient) == (0 if name in alive else len(gradient)), name
    for num_steps in (1, 2):
        later = new_rows_mamba2(config, gradients_after(copy.deepcopy(model), num_steps))
        assert {name: dead_rows(gradient) for name, gradient in later.items()} == dict.fromkeys(first, 0)


@preserving("mamba", "jamba")
def test_every_new_row_learns_within_two_steps_when_mamba_is_preserved(case):
    model = case.model()
    N = family_of(model.config).geometry(model.config).key_dim
    case.expand(model)
    for name, gradient in gradients_after(model, 1).items():
        new = {"A_log": gradient[:, N:].mT if gradient.ndim == 2 else gradient, "x_proj.weight": gradient}
        new |= {f"{letter}_layernorm.weight": gradient[N:] for letter in "bc"}
        if name in new:
            assert dead_rows(new[name]) == 0, name


def test_falcon_mamba_cannot_be_preserved():
    model = Case("falcon_mamba", "untied", "inherit").model()
    before = logits(model, tokens())
    with pytest.raises(statex.UserError, match=r"init = 'preserve': would change the old channels of B and C: .*norms"):
        statex.expand(model, layers=[EXPANDED], init="preserve")
    assert torch.equal(logits(model, tokens()), before)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_inherit_without_noise_keeps_the_function_of_a_mamba(family, monkeypatch):
    """Copies of B and C, scaled where a scale tells, read what the old ones did."""
    for module in (mamba_type, falcon_mamba, jamba):
        monkeypatch.setattr(module, "INHERIT_NOISE", 0.0)
    model = Case(family, next(iter(HYBRIDS[family][1])), "inherit").model()
    before = logits(model, tokens())
    statex.expand(model, layers=[EXPANDED], factor=3, init="inherit")
    assert distance(logits(model, tokens()), before) < 1e-5


def copies(tensor, config, after):
    """B and C rows of in_proj as [letter, group, copy, row, ...]."""
    inner = config.hidden_size * config.expand
    rows = tensor[2 * inner : -config.num_heads]
    return rows.unflatten(0, (2, config.n_groups, after // config.state_size, config.state_size))


@pytest.mark.parametrize("configuration", ["1-group", "2-groups", "bias"])
def test_copies_diverge(configuration):
    """Rows that `inherit` repeats for Mamba2 must not stay each other's twins (METHOD.md: bare copies do)."""
    case = Case("mamba2", configuration, "inherit", factor=3)
    model = case.model()
    old = copies(mixer(model).in_proj.weight.detach().clone(), model.config, model.config.state_size)
    config = copy.copy(model.config)
    case.expand(model)
    after = 3 * config.state_size
    start = copies(mixer(model).in_proj.weight.detach().clone(), config, after)
    assert torch.equal(start[:, :, :1], old)
    noise = (start[:, :, 1:] - old).std() / old.std()
    assert 0.2 < noise < 0.4
    gradient = copies(gradients_after(model, 2)["in_proj.weight"], config, after)
    learnt = copies(mixer(model).in_proj.weight.detach(), config, after) - start
    for other in (1, 2):
        assert (gradient[:, :, other] - gradient[:, :, 0]).norm() > 0.1 * gradient[:, :, 0].norm()
        assert (learnt[:, :, other] - learnt[:, :, 0]).norm() > 0.1 * learnt[:, :, 0].norm()


@pytest.mark.parametrize("configuration", ["2-heads", "8-heads", "conv-kv-heads"])
def test_inherit_keeps_the_size_of_gla_outputs(configuration):
    """Within a factor of 1.5, by the norm over each merged head."""
    case = Case("gla", configuration, "inherit")
    model = case.model()
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = mixer(model)(x)
        case.expand(model)
        ratio = mixer(model)(x).norm() / before.norm()
    assert 1 / 1.5 < ratio < 1.5


@pytest.mark.parametrize("configuration", ["1-group", "2-groups", "no-conv-bias"])
def test_inherit_keeps_the_size_of_mamba2_readings(configuration):
    """Within a factor of 1.5, of what is read from the state, before the gated norm and without the skip D."""
    case = Case("mamba2", configuration, "inherit", factor=4)
    model = case.model()
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    sizes = []
    with torch.no_grad(), statex.statex_ops():
        for step in ("before", "after"):
            if step == "after":
                case.expand(model)
            mixer(model).D.zero_()
            hook = mixer(model).norm.register_forward_pre_hook(lambda _, args: sizes.append(args[0].norm()))
            mixer(model)(x)
            hook.remove()
    assert 1 / 1.5 < sizes[1] / sizes[0] < 1.5


@pytest.mark.parametrize("factor", [2, 4])
def test_merged_heads_hold_the_old_ones_as_their_diagonal(factor):
    """With num_kv_heads, each block of a merged query head faces its own key head's block.

    Read as heads of the old size again, in the order of the merged tensors, the mixer is the old one exactly.
    """
    model = make_gla(num_heads=8, num_kv_heads=4, use_short_conv=True).double()
    config = model.config.to_dict()
    x = torch.randn(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K, V, groups = 2, 4, 2
    with torch.no_grad():
        before = mixer(model)(x[None])[0]
        statex.expand(model, layers=[EXPANDED], factor=factor, init="inherit")
        merged = {name: tensor.detach() for name, tensor in mixer(model).named_parameters()}
        old_norm = merged["g_norm_swish_gate.weight"][:V]
        assert torch.equal(merged["g_norm_swish_gate.weight"], old_norm.repeat(factor))
        merged["g_norm_swish_gate.weight"] = old_norm
        key_heads = [first + j for first in range(0, 4, factor) for _query in range(groups) for j in range(factor)]
        after = gla_mixer(merged, x, config, (8, K, V), key_heads=key_heads, scale=K**-0.5)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", ["reinit", "inherit", "preserve"])
def test_the_released_code_s_faults_with_groups_are_absent(init):
    """New B and C rows belong to their group: each group's old rows stay in front of its own new ones."""
    model = make_mamba2(n_groups=2)
    config, old = copy.copy(model.config), mixer(model).in_proj.weight.detach().clone()
    statex.expand(model, layers=[EXPANDED], factor=2, init=init)
    new = mixer(model).in_proj.weight.detach()
    kept = torch.equal(copies(new, config, 16)[:, :, 0], copies(old, config, 8)[:, :, 0])
    assert kept == (init != "reinit")


def test_dtype_and_device_of_every_tensor_stay():
    for make in (make_gla, make_mamba2):
        for init in ("reinit", "inherit", "preserve"):
            model = make().to(torch.bfloat16)
            statex.expand(model, layers=[EXPANDED], factor=2, init=init)
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
            assert logits(model, tokens()).isfinite().all()


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_another_model_s_configuration_is_not_changed(make):
    model = make()
    shared = model.config
    other = type(model)(shared)
    fields = shared.to_dict()
    statex.expand(model, layers=[EXPANDED], factor=2)
    assert other.config is shared
    assert shared.to_dict() == fields
    assert model.config is not shared
    assert not any(getattr(module, "config", None) is shared for module in model.modules())
    assert logits(other, tokens()).isfinite().all()


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_a_seed_decides_the_fresh_weights(make):
    def weights(seed):
        model = make(num_hidden_layers=3)
        torch.rand(seed + 1)  # the global generator has no say
        statex.expand(model, layers=[0, 2], factor=2, seed=seed)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    in_proj = "model.layers.{}.attn.q_proj.weight" if make is make_gla else "backbone.layers.{}.mixer.in_proj.weight"
    assert not torch.equal(first[in_proj.format(0)], first[in_proj.format(2)])


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_the_global_generator_is_left_alone(make):
    model = make()
    state = torch.get_rng_state()
    statex.expand(model, layers=[EXPANDED], factor=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_reinit_draws_from_the_model_s_own_initialisation():
    model = make_gla(use_short_conv=True, initializer_range=0.05, num_heads=4)
    statex.expand(model, layers=[EXPANDED])
    fresh = mixer(model)
    assert abs(fresh.v_proj.weight.std() / 0.05 - 1) < 0.1
    assert torch.equal(fresh.gk_proj[1].bias, torch.zeros_like(fresh.gk_proj[1].bias))
    assert fresh.q_conv1d.weight.abs().max() <= 0.5
    assert torch.equal(fresh.g_norm_swish_gate.weight, torch.ones(32))
    assert torch.equal(model.model.layers[EXPANDED].attn_norm.weight, torch.ones(32))
    assert not torch.equal(model.model.layers[EXPANDED].mlp_norm.weight, torch.ones(32))


def test_reinit_keeps_mamba2_s_time_scales():
    model = make_mamba2(rescale_prenorm_residual=True)
    before = {name: parameter.clone() for name, parameter in mixer(model).named_parameters()}
    statex.expand(model, layers=[EXPANDED])
    after = dict(mixer(model).named_parameters())
    for name in ("dt_bias", "A_log", "D"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(model.backbone.layers[EXPANDED].norm.weight, torch.ones(32))
    bound = 64**-0.5 / 2**0.5  # Kaiming's, divided once by the square root of the number of layers
    assert 0.9 * bound < after["out_proj.weight"].abs().max() <= bound
