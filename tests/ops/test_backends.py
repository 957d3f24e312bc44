"""The public recurrences: what they refuse, and which backend they take."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import torch
from recurrence_inputs import delta_inputs, gla_inputs, kda_inputs, ssd_inputs

from statex.ops import backends, gated_delta, gated_delta_step, gla, gla_step, ssd, ssd_step, use_backend
from statex.ops.gated_delta import chunk_gated_delta, step_gated_delta
from statex.ops.generalized_delta import chunk_generalized_delta
from statex.ops.gla import chunk_gla, step_gla
from statex.ops.ssd import chunk_ssd, step_ssd

ON_GPU = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"))


@pytest.fixture(autouse=True)
def fresh_choices():
    """Forget what was imported and logged, before and after."""
    for cached in (backends._import_triton, backends._log_once):
        cached.cache_clear()
    yield
    for cached in (backends._import_triton, backends._log_once):
        cached.cache_clear()


@pytest.fixture
def triton_gla(monkeypatch):
    """A module that offers Triton functions of gla."""
    module = ModuleType("statex.ops.gla.triton")
    module.triton_gla = module.triton_gla_step = lambda *args, **options: "triton"
    monkeypatch.setitem(sys.modules, "statex.ops.gla.triton", module)
    return module.triton_gla


def test_public_functions_are_the_chunked_and_the_step_versions():
    inputs = gla_inputs(30)
    assert torch.equal(gla(**inputs)[0], chunk_gla(**inputs)[0])
    q, k, v, log_decay, state = inputs.values()
    states = state.clone(), state.clone()
    got = gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], states[0], scale=0.5)
    assert torch.equal(got, step_gla(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], states[1], scale=0.5))
    assert torch.equal(*states)

    inputs = ssd_inputs(30)
    assert torch.equal(ssd(**inputs)[0], chunk_ssd(**inputs)[0])
    x, dt, A, B, C, D, state = inputs.values()
    states = state.clone(), state.clone()
    got = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], states[0], D=D)
    assert torch.equal(got, step_ssd(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], states[1], D=D))
    assert torch.equal(*states)

    for make_inputs in (delta_inputs, kda_inputs):
        inputs = make_inputs(30)
        assert torch.equal(gated_delta(**inputs)[0], chunk_gated_delta(**inputs)[0])
        *tokens, state = inputs.values()
        tokens, states = [x[:, 0] for x in tokens], (state.clone(), state.clone())
        got = gated_delta_step(*tokens, states[0], scale=0.5)
        assert torch.equal(got, step_gated_delta(*tokens, states[1], scale=0.5))
        assert torch.equal(*states)


GLA_MISTAKES = {
    "q": torch.zeros(2, 30, 3),
    "k": torch.zeros(2, 30, 3, 9),
    "v": torch.zeros(2, 29, 3, 5),
    "log_decay": torch.zeros(2, 30, 3, 1),
    "initial_state": torch.zeros(2, 3, 5, 8),
}
DELTA_MISTAKES = GLA_MISTAKES | {"beta": torch.zeros(2, 30, 3, 8), "log_decay": torch.zeros(2, 30, 3, 5)}
SSD_MISTAKES = {
    "x": torch.zeros(2, 0, 4, 6),
    "dt": torch.zeros(2, 30, 4, 1),
    "A": torch.zeros(2),
    "B": torch.zeros(2, 30, 3, 8),
    "C": torch.zeros(2, 30, 1, 8),
    "D": torch.zeros(4, 6),
    "initial_state": torch.zeros(2, 4, 8, 6),
}


@pytest.mark.parametrize("name", GLA_MISTAKES)
def test_gla_names_the_argument_of_a_wrong_shape(name):
    with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
        gla(**gla_inputs(30) | {name: GLA_MISTAKES[name]})


@pytest.mark.parametrize("name", DELTA_MISTAKES)
def test_gated_delta_names_the_argument_of_a_wrong_shape(name):
    for make_inputs in (delta_inputs, kda_inputs):
        with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
            gated_delta(**make_inputs(30) | {name: DELTA_MISTAKES[name]})


@pytest.mark.parametrize("name", ["k", "log_decay", "v", "beta", "state"])
def test_gated_delta_step_names_the_argument_of_a_wrong_shape(name):
    for make_inputs in (delta_inputs, kda_inputs):
        *tokens, state = make_inputs(1).values()
        inputs = dict(zip(("q", "k", "v", "log_decay", "beta"), (x[:, 0] for x in tokens), strict=True))
        inputs["state"] = state
        with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
            gated_delta_step(**inputs | {name: inputs[name][:, :2]})


@pytest.mark.parametrize("name", SSD_MISTAKES)
def test_ssd_names_the_argument_of_a_wrong_shape(name):
    with pytest.raises(ValueError, match=rf"^{name} has .*expected"):
        ssd(**ssd_inputs(30) | {name: SSD_MISTAKES[name]})


@pytest.mark.parametrize("name", ["k", "log_decay", "v", "state"])
def test_gla_step_names_the_argument_of_a_wrong_shape(name):
    q, k, v, log_decay, state = gla_inputs(1).values()
    inputs = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "log_decay": log_decay[:, 0], "state": state}
    with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
        gla_step(**inputs | {name: inputs[name][:, :2]})


@pytest.mark.parametrize("name", ["dt", "A", "C", "D", "state", "dt_bias"])
def test_ssd_step_names_the_argument_of_a_wrong_shape(name):
    x, dt, A, B, C, D, state = ssd_inputs(1).values()
    inputs = {"x": x[:, 0], "dt": dt[:, 0], "A": A, "B": B[:, 0], "C": C[:, 0], "state": state, "D": D, "dt_bias": D}
    with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
        ssd_step(**inputs | {name: inputs[name][..., :1]})


@pytest.mark.parametrize("borders", [[0, 10], [1, 30], [0, 20, 10, 30], [30]])
def test_cu_seqlens_must_rise_from_zero_to_the_end(borders):
    inputs = gla_inputs(30, batch=1)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match=r"^cu_seqlens is .*expected"):
        gla(**inputs, cu_seqlens=torch.tensor(borders))


def test_cu_seqlens_needs_one_row_integers_and_a_state_a_segment():
    cu_seqlens = torch.tensor([0, 10, 30])
    with pytest.raises(ValueError, match="batch is 2, expected 1"):
        gla(**gla_inputs(30), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="expected int32 or int64"):
        gla(**gla_inputs(30, batch=1), cu_seqlens=cu_seqlens.float())
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 3, 8, 5\), expected \(2, 3, 8, 5\)"):
        gla(**gla_inputs(30, batch=1), cu_seqlens=cu_seqlens)


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is unknown; use one of auto, torch, triton"):
        gla(**gla_inputs(3), backend="cuda")
    with pytest.raises(ValueError, match="backend='fast' is unknown"), use_backend("fast"):
        pass


def test_triton_on_a_cpu_is_refused():
    message = r"backend='triton' needs CUDA tensors, got a tensor on cpu; .*torch"
    with pytest.raises(ValueError, match=message):
        ssd(**ssd_inputs(3), backend="triton")
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        ssd(**ssd_inputs(3))


def test_the_argument_wins_over_the_context():
    with use_backend("triton"):
        gla(**gla_inputs(3), backend="torch")


def test_contexts_nest_and_end():
    with use_backend("triton"):
        with use_backend("torch"):
            gla(**gla_inputs(3))
        with pytest.raises(ValueError, match="CUDA"):
            gla(**gla_inputs(3))
    gla(**gla_inputs(3))


def test_auto_takes_triton_on_a_gpu_where_it_is_offered(triton_gla):
    assert backends.choose("gla", "auto", ON_GPU) is triton_gla
    assert backends.choose("generalized_delta", "auto", ON_GPU) is chunk_generalized_delta  # it has no kernel
    fp64 = SimpleNamespace(device=ON_GPU.device, dtype=torch.float64)
    assert backends.choose("gla", "auto", fp64) is chunk_gla
    assert backends.choose("gla", "auto", torch.zeros(1)) is chunk_gla
    with use_backend("torch"):
        assert backends.choose("gla", "auto", ON_GPU) is chunk_gla


def test_a_context_holds_for_the_threads_of_autograd():
    """Gradient checkpointing on a GPU computes the forward again in one."""
    with use_backend("torch"), ThreadPoolExecutor(1) as threads:
        assert threads.submit(backends._choose_backend, "gla", "auto", ON_GPU.device, torch.float32).result() == "torch"


def test_triton_that_is_not_offered_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(backends.TRITON, "gla", ("statex.ops.gla.nowhere", "triton_gla"))
    with pytest.raises(ValueError, match=r"not available for gla: No module named .*nowhere.*install statex"):
        backends.choose("gla", "triton", ON_GPU)
    assert backends.choose("gla", "auto", ON_GPU) is chunk_gla


def test_all_kernels_that_are_offered_exist():
    """None is left out in silence because its name was mistyped."""
    pytest.importorskip("triton")
    assert [op for op in backends.TRITON if backends._import_triton(op) is not None] == []


def test_the_backend_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="statex.ops"):
        for _ in range(3):
            gla(**gla_inputs(3))
        ssd(**ssd_inputs(3))
    assert [record.getMessage() for record in caplog.records] == [
        "gla runs on the torch backend",
        "ssd runs on the torch backend",
    ]
