"""The kernels of whole sequences, interpreted on a CPU in fp32, against the chunked recurrences in fp64.

What the interpreter does not show: bf16, and what compiling makes of the kernels; tests/gpu does.
"""

from functools import partial

import pytest
import torch
from recurrence_inputs import assert_close, delta_inputs, gla_inputs, kda_inputs, output_state_gradients, ssd_inputs

from statex.ops.gated_delta import chunk_gated_delta
from statex.ops.gla import chunk_gla
from statex.ops.ssd import chunk_ssd

CASES = [(decay, None) for decay in ("weak", "moderate", "channels", "strong")]
CASES += [("typical", borders) for borders in (None, [0, 1, 90, 90, 150], [0, 0, 64, 128])]
TINY = {"log_decay", "dt", "A"}  # their gradients at strong decay: below the rounding of the terms that cancel in them


@pytest.fixture(autouse=True)
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU: tests/gpu has more cases")
    pytest.importorskip("triton")


@pytest.fixture
def descriptors(monkeypatch):
    """Read tiles by descriptors where bf16 would."""
    from statex.ops import triton_layout
    from statex.ops.gated_delta import fused_launch as gated_delta
    from statex.ops.gla import triton_launch as gla
    from statex.ops.ssd import triton_launch as ssd

    def in_any_dtype(layout, dtype, *sizes_and_tiles):
        return triton_layout.use_descriptors(layout, torch.bfloat16, *sizes_and_tiles)

    for module in (gated_delta, gla, ssd):
        monkeypatch.setattr(module, "use_descriptors", in_any_dtype)


@pytest.fixture
def fused(monkeypatch):
    """The fused kernels of the gated delta rule in fp32, too: the interpreter has no bf16."""
    from statex.ops.gated_delta import triton

    monkeypatch.setattr(triton, "fits", lambda v, log_decay, key_dim: log_decay.ndim == 3)


def segmented(inputs: dict, borders: list[int] | None) -> tuple[dict, dict]:
    """Inputs of one row with an initial state for each segment, and the options that say so."""
    if borders is None:
        return inputs, {}
    state = inputs["initial_state"]
    state = torch.randn(len(borders) - 1, *state.shape[1:], dtype=state.dtype)
    return inputs | {"initial_state": state}, {"cu_seqlens": torch.tensor(borders)}


def tokens_and_batch(decay: str, borders: list[int] | None) -> tuple[int, int]:
    if borders is not None:
        return borders[-1], 1
    return 130, 2 if decay == "typical" else 1


def assert_same(kernels, reference, inputs, borders, but=frozenset()):
    inputs, options = segmented(inputs, borders)
    wanted = output_state_gradients(reference, inputs, torch.float64, **options)
    wanted = {name: x for name, x in wanted.items() if name not in but}
    assert_close(output_state_gradients(kernels, inputs, torch.float32, **options), wanted, 1e-4)


@pytest.mark.parametrize(("decay", "borders"), CASES)
def test_gla(decay, borders):
    from statex.ops.gla.triton import triton_gla

    tokens, batch = tokens_and_batch(decay, borders)
    inputs = gla_inputs(tokens, decay, batch, heads=2, key_dim=20, value_dim=24)
    assert_same(triton_gla, chunk_gla, inputs, borders, TINY if decay == "strong" else frozenset())


@pytest.mark.parametrize(("decay", "borders"), CASES)
def test_ssd(decay, borders):
    from statex.ops.ssd.triton import triton_ssd

    tokens, batch = tokens_and_batch(decay, borders)
    inputs = ssd_inputs(tokens, decay, batch, heads=4, groups=2, head_dim=20, state_size=24)
    assert_same(triton_ssd, chunk_ssd, inputs, borders, TINY if decay == "strong" else frozenset())


@pytest.mark.parametrize("make_inputs", [delta_inputs, kda_inputs])
@pytest.mark.parametrize(("decay", "borders"), [("weak", None), ("strong", None), ("typical", [0, 1, 70, 70, 90])])
def test_gated_delta(make_inputs, decay, borders):
    from statex.ops.gated_delta.triton import triton_gated_delta

    inputs = make_inputs(90, decay, batch=1, heads=2, key_dim=20, value_dim=24)
    assert_same(triton_gated_delta, chunk_gated_delta, inputs, borders)


@pytest.mark.parametrize("kind", ["weak", "moderate", "strong", "tokens"])
@pytest.mark.parametrize("kernels", ["fused", "walked"])
def test_gated_delta_at_every_beta_and_decay(kind, kernels, request):
    from statex.ops.gated_delta.triton import triton_gated_delta

    if kernels == "fused":
        request.getfixturevalue("fused")
    inputs = delta_inputs(80, kind, batch=2, heads=1, key_dim=20, value_dim=24, most=2.0)
    inputs["beta"][:, ::3] = 0
    assert_same(triton_gated_delta, chunk_gated_delta, inputs, None)


def test_gated_delta_after_everything_is_forgotten(fused):
    from statex.ops.gated_delta.triton import triton_gated_delta

    inputs = delta_inputs(80, batch=1, heads=2)
    inputs["log_decay"][:, 30] = -torch.inf
    wanted, wanted_state = chunk_gated_delta(**inputs, output_final_state=True)
    inputs = {name: x.float().requires_grad_() for name, x in inputs.items()}
    output, state = triton_gated_delta(**inputs, output_final_state=True)
    assert_close({"output": output, "state": state}, {"output": wanted, "state": wanted_state}, 1e-5)
    (state.sum() + output.sum()).backward()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize(
    ("tokens", "dims", "borders", "described"),
    [
        (70, (256, 160), None, False),  # two blocks of keys, two tiles of values
        (70, (256, 160), None, True),
        (70, (300, 16), None, False),  # three, the last not whole
        (128, (512, 32), None, False),
        (128, (512, 32), None, True),
        (192, (64, 64), [0, 64, 64, 192], True),
        (80, (64, 64), [0, 1, 70, 70, 80], False),
    ],
    ids=str,
)
def test_fused_gated_delta_on_the_tiles_of_bf16(tokens, dims, borders, described, request, monkeypatch):
    from statex.ops.gated_delta import fused_launch
    from statex.ops.gated_delta.triton_fused import fused_gated_delta

    if described:
        request.getfixturevalue("descriptors")
    tiles = fused_launch.tiles
    monkeypatch.setattr(fused_launch, "tiles", lambda *dims: tiles(*dims[:2], torch.bfloat16))
    inputs = delta_inputs(tokens, "typical", 1, heads=1, key_dim=dims[0], value_dim=dims[1])
    assert_same(partial(fused_gated_delta, scale=0.3), partial(chunk_gated_delta, scale=0.3), inputs, borders)


def test_the_fused_kernels_of_gated_delta_are_for_what_was_tried_on_a_gpu():
    from statex.ops.gated_delta.triton_fused import fits

    values = {dtype: torch.empty(1, 1, 2, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    a_head, a_channel = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 4)
    assert fits(values[torch.bfloat16], a_head, 128)
    assert not fits(values[torch.bfloat16], a_head, 129)
    assert not fits(torch.empty(1, 1, 2, 129, dtype=torch.bfloat16), a_head, 64)
    assert not fits(values[torch.bfloat16], a_channel, 64)
    assert not fits(values[torch.float32], a_head, 64)


@pytest.mark.parametrize(("tokens", "dims"), [(5, (8, 8)), (64, (128, 40)), (70, (512, 16)), (65, (640, 8))], ids=str)
def test_gated_delta_at_every_key_dimension(tokens, dims):
    from statex.ops.gated_delta.triton import triton_gated_delta

    inputs = delta_inputs(tokens, "tokens", 1, heads=1, key_dim=dims[0], value_dim=dims[1])
    assert_same(triton_gated_delta, chunk_gated_delta, inputs, None)


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_gated_delta_of_some_heads_at_a_time(heads_at_once, monkeypatch):
    from statex.ops.gated_delta import triton

    inputs = kda_inputs(20, "typical", 1, heads=3)
    split = [slice(start, min(start + heads_at_once, 3)) for start in range(0, 3, heads_at_once)]
    monkeypatch.setattr(triton, "_groups", lambda *_: split)
    assert_same(triton.triton_gated_delta, chunk_gated_delta, inputs, None)


def test_heads_are_taken_as_many_at_a_time_as_memory_allows():
    from statex.ops.gated_delta.triton import _groups

    few, many = (torch.empty(1, num_tokens, 32, 128, device="meta") for num_tokens in (1024, 65536))
    assert _groups(few, few, few[..., 0]) == [slice(0, 32)]
    for log_decay, least, most in ((many[..., 0], 2, 6), (many, 6, 32)):
        groups = _groups(many, many, log_decay)
        assert [i for group in groups for i in range(32)[group]] == list(range(32))
        assert least <= len(groups) <= most


@pytest.mark.parametrize(("tokens", "batch", "borders"), [(150, 1, None), (128, 2, None), (384, 1, [0, 0, 128, 384])])
def test_gla_by_descriptors(tokens, batch, borders, descriptors):
    from statex.ops.gla.triton import triton_gla

    inputs = gla_inputs(tokens, "typical", batch, heads=2 if tokens == 150 else 1, key_dim=128, value_dim=128)
    assert_same(triton_gla, chunk_gla, inputs, borders)


@pytest.mark.parametrize(("tokens", "batch", "borders"), [(150, 1, None), (128, 2, None), (512, 1, [0, 0, 256, 512])])
def test_ssd_by_descriptors(tokens, batch, borders, descriptors):
    from statex.ops.ssd.triton import triton_ssd

    heads, groups = (4, 2) if tokens == 150 else (2, 1)
    inputs = ssd_inputs(tokens, "typical", batch, heads, groups, head_dim=64, state_size=128)
    assert_same(triton_ssd, chunk_ssd, inputs, borders)


def test_parameters_of_ssd_may_lie_apart_in_memory():
    from statex.ops.ssd.triton import triton_ssd

    inputs = {name: x.float() for name, x in ssd_inputs(70).items()}
    apart = {name: torch.stack([inputs[name], inputs[name]], 1)[:, 0] for name in ("A", "D")}
    assert torch.equal(triton_ssd(**inputs)[0], triton_ssd(**inputs | apart)[0])


def test_borders_that_leave_tokens_out_are_refused():
    from statex.ops.gla.triton import triton_gla

    inputs = {name: x.float() for name, x in gla_inputs(70, batch=1).items()}
    with pytest.raises(ValueError, match="from 0 to T = 70"):
        triton_gla(**inputs, cu_seqlens=torch.tensor([0, 60]))
