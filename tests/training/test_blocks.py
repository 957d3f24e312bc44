"""Compiled blocks, and blocks that keep their activations, train as the plain ones do."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common import distance
from statex import expand
from statex.errors import UserError
from statex.models.dispatch import statex_ops
from statex.models.scratch import make_config
from statex.training import activations
from statex.training.activations import KeepActivations
from statex.training.arguments import training_arguments
from statex.training.blocks import TrainingBlocks, check_compile
from statex.training.trainer import train
from statex.training.trial import try_training


@pytest.fixture
def tiny_compiler(monkeypatch):
    """The graphs are made and run without generating code, which would take minutes."""
    compile_fully = torch.compile

    def compile_quickly(function, **options):
        return compile_fully(function, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(make, family, data, tokenizer, folder, section):
    model = make(family)
    expand(model, layers=[1], init="preserve")
    train(model, tokenizer, data, section, folder)
    return load_file(folder / "trained" / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "gradient_checkpointing"),
    [("statex_gla", True), ("bamba", False), ("olmo_hybrid", False)],
)
def test_compiled_blocks_train_as_plain_ones(
    make, family, settings, data, tokenizer, tmp_path, tiny_compiler, gradient_checkpointing
):
    """Text with documents and recall data, of other lengths."""
    packed = data.model_copy(update={"reset_state_at_documents": True})
    weights = [
        trained(
            make, family, packed, tokenizer, tmp_path / str(compiled),
            settings(
                steps=2, compile=compiled, gradient_checkpointing=gradient_checkpointing, watch_state_every=2
            ),
        )
        for compiled in (False, True)
    ]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()
    assert max(distance(weights[1][name], wanted) for name, wanted in weights[0].items()) < 1e-4


def test_the_model_is_left_as_it_was(make, family):
    model = make(family)
    blocks = TrainingBlocks(model, compiled=True, recomputed=True)
    with blocks.running():
        assert all("forward" in block.__dict__ for block in blocks.blocks)
        forwards = [block.forward for block in blocks.blocks]
        with blocks.plain():
            assert not any("forward" in block.__dict__ for block in blocks.blocks)
        assert [block.forward for block in blocks.blocks] == forwards
    assert len(blocks.blocks) == 2
    assert not any("forward" in block.__dict__ for block in blocks.blocks)


def recomputed_forwards(make, num_kept):
    """Calls of each mixer in a forward and a backward pass."""
    model = make("statex_gla").train()
    blocks = TrainingBlocks(model, compiled=False, recomputed=True)
    blocks.num_kept = num_kept
    calls = [0, 0]
    for index, block in enumerate(blocks.blocks):

        def count(*_, index=index):
            calls[index] += 1

        block.attn.register_forward_pre_hook(count)
    ids = torch.arange(8)[None]
    with blocks.running():
        model(ids, labels=ids).loss.backward()
    return calls


def test_the_last_blocks_keep_their_activations(make):
    assert [recomputed_forwards(make, kept) for kept in (0, 1, 2)] == [[2, 2], [2, 1], [1, 1]]


def test_compiled_blocks_keep_less_where_memory_is_short(make, monkeypatch):
    """Numbers kept for the backward pass, by the partition of torch's own compiler, and the same gradients."""
    compile_fully, kept, gradients = torch.compile, [], []
    options = {"backend": "aot_eager_decomp_partition"}
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_fully(function, **given | options))
    for recomputed in (False, True):
        torch._dynamo.reset()
        model, saved = make("statex_gla").train(), []
        blocks = TrainingBlocks(model, compiled=True, recomputed=recomputed)
        blocks.num_kept = len(blocks.blocks)
        ids = torch.arange(24).view(2, 12)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x) or x, lambda x: x)
        with blocks.running(), keep:
            model(ids, labels=ids, use_cache=False).loss.backward()
        kept.append(sum(x.numel() for x in saved))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch._dynamo.reset()
    assert kept[1] < 0.95 * kept[0]
    assert distance(gradients[1], gradients[0]) < 1e-5


def stream_of(model, seen):
    """From now on, dtypes of what each block is given and returns, and of the gradient of the latter, go to `seen`."""

    def note(block, given, returned):
        output = returned[0] if isinstance(returned, tuple) else returned
        seen.add(("in", block.index, given[0].dtype))
        seen.add(("out", block.index, output.dtype))
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.add(("gradient", block.index, gradient.dtype)))

    for index, block in enumerate(TrainingBlocks(model, compiled=False, recomputed=False).blocks):
        block.index = index
        block.register_forward_hook(note)


STREAM = {(what, index, torch.bfloat16) for what, index in (("in", 1), ("out", 0), ("gradient", 0))}
STREAM |= {("in", 0, torch.float32), ("out", 1, torch.float32), ("gradient", 1, torch.float32)}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["statex_gla", "mamba2", "bamba", "olmo_hybrid"])
def test_between_blocks_the_residual_stream_is_in_bf16(make, family, recomputed):
    losses, gradients, seen = [], [], set()
    for stream in (None, torch.bfloat16):
        fields = {"residual_in_fp32": True} if family == "mamba2" else {}
        model = make(family, **fields).train()
        if stream is not None:
            stream_of(model, seen)
        ids = torch.arange(24).view(2, 12)
        blocks = TrainingBlocks(model, compiled=False, recomputed=recomputed, stream=stream)
        with statex_ops(), blocks.running():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert seen == STREAM
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    assert distance(gradients[1], gradients[0]) < 0.05


@pytest.mark.parametrize(
    "changes", [{"compile": True, "gradient_checkpointing": True}, {"backpropagation_length": 16}], ids=str
)
def test_training_with_the_stream_in_bf16(make, settings, data, tokenizer, tmp_path, tiny_compiler, changes):
    model, seen = make("statex_gla"), set()
    stream_of(model, seen)
    section = settings(steps=2, precision="bf16", residual_precision="bf16", **changes)
    train(model, tokenizer, data, section, tmp_path)
    assert seen == STREAM


def test_a_stream_in_bf16_is_refused_where_nothing_is_computed_in_it(settings, tmp_path):
    with pytest.raises(ValueError, match=r"residual_precision = 'bf16': does not go with precision = \"fp32\""):
        settings(residual_precision="bf16", precision="fp32")
    section = settings(residual_precision="bf16")  # auto: fp32 on a CPU
    with pytest.raises(UserError, match=r"training.residual_precision = 'bf16': is for training that computes in bf16"):
        training_arguments(section, tmp_path, seed=0)
    try_training(section, False, is_started=False)


class Memory:
    """That of a GPU on which a step peaks at 50 bytes and each block's forward leaves 1, or 11 where it keeps all."""

    def __init__(self, blocks):
        self.blocks, self.allocated = blocks, 0

    def forward(self):
        for index, block in enumerate(self.blocks.blocks):
            for hook in block._forward_pre_hooks.values():
                hook(block, ())
            self.allocated += 11 if index >= len(self.blocks.blocks) - self.blocks.num_kept else 1
            for hook in block._forward_hooks.values():
                hook(block, (), None)


@pytest.mark.parametrize(("memory", "kept"), [(1000, 4), (75, 2), (50, 0), (10, 0)])
def test_as_many_blocks_keep_theirs_as_fit(make, monkeypatch, memory, kept):
    blocks = TrainingBlocks(make("statex_gla", num_hidden_layers=4), compiled=False, recomputed=True)
    gpu = Memory(blocks)
    monkeypatch.setattr(activations, "peak_memory", lambda device: 50)
    monkeypatch.setattr(activations, "allocated_memory", lambda device: gpu.allocated)
    monkeypatch.setattr(activations, "reset_peak_memory", lambda device: None)
    callback, state = KeepActivations(blocks, memory, torch.device("cuda")), SimpleNamespace(global_step=7)
    callback.on_train_begin(None, state, None)
    numbers = []
    for _ in range(6):
        callback.on_step_begin(None, state, None)
        gpu.forward()
        numbers.append(blocks.num_kept)
        state.global_step += 1
        callback.on_step_end(None, state, None)
    assert numbers == [0, 0, 0, 1, kept, kept]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks.blocks)


@pytest.mark.parametrize(("value", "wanted"), [("1KiB", 1024), ("60 GB", 60 * 10**9), (7, 7), ("most", "most")])
def test_sizes_of_memory(settings, value, wanted):
    assert settings(gradient_checkpointing=True, activation_memory=value).activation_memory == wanted


@pytest.mark.parametrize("value", ["60 Gb", "much", 0, -1, 1.5, True, "1e9GiB", "nan"])
def test_sizes_that_are_invalid(settings, value):
    with pytest.raises((UserError, ValueError), match="activation_memory"):
        settings(gradient_checkpointing=True, activation_memory=value)


def test_activation_memory_alone_is_refused(settings):
    with pytest.raises(ValueError, match=r"activation_memory = 'most': has no effect without gradient_checkpointing"):
        settings(activation_memory="most")


def test_a_family_whose_blocks_do_not_compile_is_refused(settings, tokenizer, monkeypatch):
    from statex.families import FAMILIES

    config = make_config("statex_gla", {"hidden_size": 16, "num_heads": 2}, tokenizer)
    check_compile("training", settings(compile=True), config)
    monkeypatch.setattr(type(FAMILIES["statex_gla"]), "blocks_compile", False)
    check_compile("training", settings(), config)
    with pytest.raises(UserError, match=r"training.compile = True: does not go with statex_gla"):
        check_compile("training", settings(compile=True), config)
