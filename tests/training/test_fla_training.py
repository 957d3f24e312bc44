"""flash-linear-attention's models in statex's Trainer, on references in the place of their kernels."""

import pytest
import torch

import fla_models
import statex
from statex.families import FAMILIES
from statex.training.trainer import train

pytestmark = pytest.mark.skipif("gsa" not in FAMILIES, reason="needs flash-linear-attention")


@pytest.mark.parametrize("name", ["gsa", "gated_deltanet"])
@pytest.mark.parametrize("is_expanded", [False, True])
def test_an_arm(name, is_expanded, data, tokenizer, settings, tmp_path):
    with fla_models.on_the_cpu():
        fla_models.make_fla(name, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
        model = statex.load(tmp_path / "base")
        if is_expanded:
            statex.expand(model, layers=[0], factor=2)
        apart = data.model_copy(update={"reset_state_at_documents": True})
        train(model, tokenizer, apart, settings(gradient_checkpointing=True), tmp_path / "arm")
        trained = statex.load(tmp_path / "arm" / "trained")
    assert type(trained) is type(model)
    before = statex.load(tmp_path / "base").state_dict()
    moved = [not torch.equal(value, before[key]) for key, value in trained.state_dict().items() if "mlp_norm" in key]
    assert all(moved)
