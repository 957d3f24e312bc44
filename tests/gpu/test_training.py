"""A small model trained on the kernels follows the loss of the same model trained on the PyTorch path."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config

pytest.importorskip("triton")

from statex.models.dispatch import statex_ops
from statex.models.gla.configuration import GLAConfig
from statex.ops import use_backend

pytestmark = pytest.mark.gpu

NUM_STEPS = 50
NOISE = 0.05  # nats between two bf16 runs of the same training


def gla():
    return GLAConfig(hidden_size=256, num_hidden_layers=2, num_heads=2, vocab_size=128)


def mamba2():
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64, "state_size": 128}
    return Mamba2Config(**sizes, n_groups=1, vocab_size=128)


def losses_of_training(make_config, backend):
    """Losses of NUM_STEPS steps on sequences that can be learnt: each token is the previous one plus three."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    with use_backend(backend), statex_ops():
        for _ in range(NUM_STEPS):
            first = torch.randint(128, (8, 1), generator=generator)
            tokens = ((first + 3 * torch.arange(300)) % 128).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("make_config", [gla, mamba2])
def test_loss_follows_the_torch_path(make_config):
    kernels, plain = (losses_of_training(make_config, backend) for backend in ("triton", "torch"))
    assert plain[-1] < plain[0] - 0.5, "the PyTorch path must learn for the comparison to say anything"
    assert (kernels - plain).abs().max() < NOISE
