"""Training whose steps are CUDA graphs, against the same steps launched kernel by kernel."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Mamba2Config

pytest.importorskip("triton")

from statex.models.gla.configuration import GLAConfig
from statex.recipe import Training
from statex.settings import Data
from statex.training import trainer as training_module
from statex.training.arguments import training_arguments
from statex.training.loader import TimedLoader
from statex.training.trainer import StatexTrainer

pytestmark = pytest.mark.gpu

STEPS = 8
LENGTHS = (512, 128)  # of text and of recall data, in turn


def gla():
    return GLAConfig(hidden_size=256, num_hidden_layers=2, num_heads=2, vocab_size=128)


def mamba2():
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64, "state_size": 128}
    return Mamba2Config(**sizes, n_groups=1, vocab_size=128)


class WithBatches(StatexTrainer):
    """Two micro-batches a step, of two shapes in turn, some tokens of which are not scored."""

    def get_train_dataloader(self) -> DataLoader:
        generator, batches = torch.Generator().manual_seed(0), []
        for step in range(STEPS):
            for _ in range(2):
                length = LENGTHS[step % 2]
                ids = torch.randint(128, (1024 // length, length), generator=generator)
                ignored = torch.rand(ids.shape, generator=generator) < 0.3
                batches.append({"input_ids": ids, "labels": torch.where(ignored, -100, ids)})
        return TimedLoader(batches, self.args.device, workers=0)


def trained(config, folder, **changes):
    section = Training(
        steps=STEPS, tokens_per_step=2048, sequence_length=512, sequences_per_device=2, learning_rate=1e-2,
        warmup_steps=1, save_every=STEPS, log_every=1, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).cuda()
    trainer = WithBatches(
        model=model, args=training_arguments(section, folder, seed=0, quiet=True), output=folder, processing_class=None,
        data=Data(), training=section, fresh_tensors=set(),
    )  # fmt: skip
    trainer.train_to_the_end()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def captured(monkeypatch):
    """What captures the steps of the trainings to come."""
    made = []

    class Recorded(training_module.CapturedSteps):
        def __init__(self, model):
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(training_module, "CapturedSteps", Recorded)
    return made


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("config", [gla, mamba2])
def test_captured_steps_train_as_others(config, compiled, captured, tmp_path):
    found, wanted = (
        trained(config(), tmp_path / str(graphs), cuda_graphs=graphs, compile=compiled, precision="fp32")
        for graphs in (True, False)
    )
    assert [len(steps.graphs) for steps in captured] == [2]
    torch.testing.assert_close(found[0], wanted[0], atol=2e-3, rtol=0)
    for name, weight in wanted[1].items():
        assert (found[1][name] - weight).norm() < 2e-3 * weight.norm(), name


@pytest.mark.parametrize("config", [gla, mamba2])
def test_they_are_the_default_and_train_in_bf16(config, captured, tmp_path):
    found, _ = trained(config(), tmp_path / "captured", compile=False)
    wanted, _ = trained(config(), tmp_path / "launched", compile=False, cuda_graphs=False)
    assert [len(steps.graphs) for steps in captured] == [2]
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)
