"""Several segments packed in one row (cu_seqlens) against one call a segment."""

from itertools import pairwise

import pytest
import torch
from recurrence_inputs import (
    assert_close,
    delta_inputs,
    distance,
    generalized_delta_inputs,
    gla_inputs,
    kda_inputs,
    output_state_gradients,
    selective_scan_inputs,
    ssd_inputs,
)

from statex.ops.gated_delta import chunk_gated_delta, naive_gated_delta
from statex.ops.generalized_delta import chunk_generalized_delta, naive_generalized_delta
from statex.ops.gla import chunk_gla, naive_gla
from statex.ops.selective_scan import chunk_selective_scan, naive_selective_scan
from statex.ops.ssd import chunk_ssd, naive_ssd

CASES = {
    "gated_delta": (delta_inputs, naive_gated_delta, chunk_gated_delta),
    "kda": (kda_inputs, naive_gated_delta, chunk_gated_delta),
    "generalized_delta": (generalized_delta_inputs, naive_generalized_delta, chunk_generalized_delta),
    "gla": (gla_inputs, naive_gla, chunk_gla),
    "selective_scan": (selective_scan_inputs, naive_selective_scan, chunk_selective_scan),
    "ssd": (ssd_inputs, naive_ssd, chunk_ssd),
}
BORDERS = {
    "one": [0, 90],
    "uneven": [0, 1, 4, 20, 21, 90],
    "equal": [0, 30, 60, 90],
    "empty": [0, 0, 40, 40, 90, 90],
}


def packed_inputs(make_inputs, borders):
    inputs = make_inputs(borders[-1], batch=1)
    states = inputs["initial_state"]
    inputs["initial_state"] = torch.randn(len(borders) - 1, *states.shape[1:], dtype=states.dtype)
    return inputs


def one_by_one(recurrence, borders):
    """The recurrence on packed inputs, as one call a segment."""

    def run(initial_state, output_final_state, **inputs):
        fixed = {name: inputs.pop(name) for name in ("A", "D") if name in inputs}
        outputs, states = [], []
        for s, (start, end) in enumerate(pairwise(borders)):
            state = initial_state[s : s + 1]
            if end > start:
                tokens = {name: x[:, start:end] for name, x in inputs.items()}
                output, state = recurrence(**tokens, **fixed, initial_state=state, output_final_state=True)
                outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return run


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("version", [1, 2], ids=["naive", "chunk"])
def test_segments_equal_separate_calls(op, borders, version):
    make_inputs, naive, *_ = CASES[op]
    recurrence = CASES[op][version]
    inputs = packed_inputs(make_inputs, borders)
    wanted = output_state_gradients(one_by_one(naive, borders), inputs, torch.float64)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    assert_close(output_state_gradients(recurrence, inputs, torch.float64, cu_seqlens=cu_seqlens), wanted, 1e-10)
    assert_close(output_state_gradients(recurrence, inputs, torch.float32, cu_seqlens=cu_seqlens), wanted, 1e-5)


@pytest.mark.parametrize("op", CASES)
def test_segments_start_from_zero_without_an_initial_state(op):
    make_inputs, naive, chunk = CASES[op]
    inputs = make_inputs(50, batch=1)
    del inputs["initial_state"]
    output, state = chunk(**inputs, cu_seqlens=torch.tensor([0, 20, 50]))
    assert state is None
    tokens = {name: x if name in ("A", "D") else x[:, 20:] for name, x in inputs.items()}
    assert distance(output[:, 20:], naive(**tokens)[0]) < 1e-10
