"""An expansion gives the very numbers that it always gave: hashes of whole models, stored before the plan was changed.

`tests/fixtures/plans/NAME.json` is config.json as the first version wrote it, `tests/fixtures/numbers.json` has the
hashes.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import statex
from common import make_gla, make_mamba2, make_rwkv7

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODELS = {
    "gla": lambda: make_gla(num_heads=8, num_kv_heads=4, use_short_conv=True, feature_map="silu"),
    "mamba2": lambda: make_mamba2(n_groups=2, use_bias=True),
    "rwkv7": make_rwkv7,
}
EXPANSIONS = {
    "reinit": {"init": "reinit", "factor": 2},
    "inherit": {"init": "inherit", "factor": 2},
    "preserve": {"init": "preserve", "factor": 3},
    "preserve-rank": {"init": "preserve", "factor": 2, "rank": 3},
}
NAMES = [f"{family}-{change}" for family in ("gla", "mamba2") for change in [*EXPANSIONS, "control"]]
NAMES.remove("mamba2-preserve-rank")
NAMES.append("rwkv7-inherit")  # its fresh weights are orthogonalised, not everywhere to the last bit alike


def base(family):
    """A model whose weights depend on no initialisation of transformers'."""
    model, generator = MODELS[family](), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def changed(name):
    """The model of a fixture, expanded (or re-initialised) in both layers."""
    family, change = name.split("-", 1)
    model = base(family)
    if change == "control":
        statex.reinitialize(model, [0, 1], seed=5)
    else:
        statex.expand(model, layers=[0, 1], seed=5, **EXPANSIONS[change])
    return model


def hash_of(tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_numbers():
    """A hash of this machine's random numbers, which torch does not promise to be any other machine's."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(99, generator=generator), torch.rand(99, generator=generator).log()]
    return hash_of({str(index): tensor for index, tensor in enumerate(drawn)})


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_first_version(name):
    stored = json.loads((FIXTURES / "numbers.json").read_text())
    if random_numbers() != stored["random numbers"]:
        pytest.skip("this machine's random numbers are others")
    assert hash_of(dict(changed(name).named_parameters())) == stored[name]
