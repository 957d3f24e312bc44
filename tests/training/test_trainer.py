"""Parameter groups, schedules, precision and memory settings of training, and what a stage leaves behind."""

import json
import math
from glob import glob
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from statex.data.mixture import TrainingBatches
from statex.data.tokens import prepare_tokens
from statex.errors import UserError
from statex.expansion.state_use import layer_state, new_entries
from statex.expansion.stored import stored_plan
from statex.families import family_of
from statex.models.caches import cache_of
from statex.models.dispatch import statex_ops
from statex.models.expanded import expand, reinitialize
from statex.settings import TextSource
from statex.training.arguments import training_arguments
from statex.training.trainer import StatexTrainer, freeze_all_but_expanded, train
from tiny_recipe import CONFIGS, MAMBAS


@pytest.fixture
def trainer_of(data, tokenizer, tmp_path):
    """trainer_of(model, training): a trainer that has not begun."""

    def build(model, training) -> StatexTrainer:
        plan = stored_plan(model.config)
        return StatexTrainer(
            model=model,
            args=training_arguments(training, tmp_path, seed=0),
            output=tmp_path,
            processing_class=tokenizer,
            data=data,
            training=training,
            fresh_tensors=plan.fresh_tensors if plan else set(),
            tokens=prepare_tokens(data, tokenizer, tmp_path / "tokens", 10**6),
        )

    return build


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "trained" / "model.safetensors")


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


def test_fresh_tensors_get_the_multiplier_and_vectors_no_decay(make, family, settings, trainer_of):
    model = make(family)
    plan = expand(model, layers=[1], init="inherit")
    training = settings(learning_rate=1e-3, fresh_learning_rate_multiplier=3, weight_decay=0.1)
    optimizer = trainer_of(model, training).create_optimizer()
    of_parameter = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert 0 < len(plan.fresh_tensors) < len(of_parameter)
    for name, tensor in model.named_parameters():
        group = of_parameter[id(tensor)]
        assert group["lr"] == pytest.approx(3e-3 if name in plan.fresh_tensors else 1e-3), name
        assert group["weight_decay"] == (0.1 if tensor.ndim >= 2 else 0), name
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {training.betas}


def test_a_stored_plan_gives_the_same_groups(make, family, settings, trainer_of, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(family)
    expand(model, every=1, init="preserve")
    model.save_pretrained(tmp_path / "model")
    training = settings(fresh_learning_rate_multiplier=3)
    rates = [
        [(group["lr"], len(group["params"])) for group in trainer_of(each, training).create_optimizer().param_groups]
        for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    ]
    assert rates[0] == rates[1]
    assert len(rates[0]) > 2


@pytest.mark.parametrize("kind", ["expand", "reinitialize"])
def test_only_the_expanded_layers_are_trained(make, family, settings, data, tokenizer, tmp_path, kind):
    model = make(family)
    expand(model, layers=[1]) if kind == "expand" else reinitialize(model, [1])
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    train(model, tokenizer, data, settings(train_only_expanded=True), tmp_path)
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    # The layer's mixer, and its pre-norm, which re-initialising resets
    assert changed
    assert all("layers.1." in name and ("mixer" in name or "attn" in name or "norm" in name) for name in changed)
    assert not any("mlp" in name for name in changed)
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert stored_plan(model.config).fresh_tensors <= trainable
    assert changed == trainable


def test_a_model_without_plan_has_nothing_to_train_alone(make, family):
    with pytest.raises(UserError, match="no expanded layers; expand it first"):
        freeze_all_but_expanded(make(family), None)


@pytest.mark.parametrize(("floor", "multiplier"), [(0.0, 1.0), (0.1, 3.0)])
def test_the_cosine_reaches_what_the_recipe_says(make, settings, trainer_of, floor, multiplier):
    model = make("mamba2")
    expand(model, layers=[0])
    training = settings(
        steps=20, warmup_steps=4, learning_rate=1e-2, min_learning_rate_ratio=floor,
        fresh_learning_rate_multiplier=multiplier,
    )  # fmt: skip
    inherited, fresh = rates_of(trainer_of(model, training), training.steps)
    assert inherited[:5] == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3, 1e-2])
    expected = [
        1e-2 * (floor + (1 - floor) * (1 + math.cos(math.pi * step / 16)) / 2) for step in range(17)
    ]  # after the warm-up
    assert inherited[4:] == pytest.approx(expected)
    assert inherited[-1] == pytest.approx(floor * 1e-2)
    assert fresh == pytest.approx([multiplier * rate for rate in inherited])


@pytest.mark.parametrize("decay_steps", [None, 6])
def test_warm_up_stable_decay_reaches_what_the_recipe_says(make, settings, trainer_of, decay_steps):
    model = make("mamba2")
    expand(model, layers=[0])
    training = settings(
        steps=20, warmup_steps=4, learning_rate=1e-2, min_learning_rate_ratio=0.1, schedule="wsd",
        decay_steps=decay_steps,
    )  # fmt: skip
    rates, _ = rates_of(trainer_of(model, training), training.steps)
    decay = decay_steps or 4
    assert rates[0] < rates[1] < rates[2] < rates[3] < rates[4]
    assert rates[4 : 21 - decay] == pytest.approx([1e-2] * (17 - decay))
    assert all(before > after for before, after in zip(rates[20 - decay : -1], rates[21 - decay :], strict=True))
    assert rates[-1] == pytest.approx(1e-3)


def rates_of(trainer, steps: int) -> tuple[list[float], list[float]]:
    """The learning rates of inherited and of fresh matrices, before each step and after the last."""
    trainer.create_optimizer_and_scheduler(steps)
    fresh = {id(tensor) for name, tensor in trainer.model.named_parameters() if name in trainer.fresh_tensors}
    rates: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 1):
        for group in trainer.optimizer.param_groups:
            if group["params"][0].ndim >= 2:
                rates[id(group["params"][0]) in fresh].append(group["lr"])
        if step < steps:
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
    return rates


def test_bf16_computes_over_fp32_master_weights(make, family, settings, data, tokenizer, tmp_path):
    seen = set()
    model = make(family)
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    inner = model.get_submodule("backbone.layers.0.mixer.in_proj" if family == "mamba2" else "model.layers.0.mlp")
    inner.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    summary = train(model, tokenizer, data, settings(precision="bf16", save_every=1), tmp_path)
    assert torch.bfloat16 in seen
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert math.isfinite(summary.final_loss)


def test_a_model_in_bf16_is_refused(make, settings, data, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"model.dtype = 'torch.bfloat16': is too coarse .*dtype=torch.float32"):
        train(make("mamba2").bfloat16(), tokenizer, data, settings(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_optimizer_moments_are_fp32(make, settings, trainer_of):
    trainer = trainer_of(make("statex_gla"), settings(precision="bf16"))
    trainer.train()
    dtypes = {value.dtype for state in trainer.optimizer.state.values() for value in state.values() if value.ndim}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("expanded", [False, True])
def test_gradient_checkpointing_changes_nothing(make, family, settings, data, tokenizer, tmp_path, expanded):
    forwards = {}
    for name, gradient_checkpointing in (("without", False), ("with", True)):
        model = make(family)
        if expanded:
            expand(model, every=1, init="preserve")
        count = forwards.setdefault(name, [])
        for index in range(2):
            mixer = model.get_submodule(family_of(model.config).mixer_path.format(index))
            mixer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        training = settings(steps=3, gradient_checkpointing=gradient_checkpointing)
        train(model, tokenizer, data, training, tmp_path / name)
    assert len(forwards["with"]) == 2 * len(forwards["without"]) == 2 * (3 * 2)  # steps and layers
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"), tolerance=1e-6)


@pytest.mark.parametrize("family", [*CONFIGS, *MAMBAS])
def test_each_document_has_its_own_state_where_asked(make, family, settings, data, tokenizer, trainer_of, tmp_path):
    """The loss of a packed sequence and its gradients are those of its documents, each read alone."""
    paragraphs = [text for path in glob(data.text.files[0]) for text in Path(path).read_text().split("\n\n")]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    short = data.model_copy(
        update={"text": TextSource(files=[str(tmp_path / "short.jsonl")]), "reset_state_at_documents": True}
    )
    training = settings(weights={"text": 1}, sequence_length=256, tokens_per_step=256)
    read = prepare_tokens(short, tokenizer, tmp_path / "tokens", 10**6)
    batch = next(
        batch for batch in TrainingBatches(short, training, tokenizer, tokens=read) if batch["seq_idx"].max() >= 2
    )
    ids, document = batch["input_ids"][0], batch["seq_idx"][0]
    model = make(family).train()
    total = torch.zeros(())
    for number in document.unique():
        own = ids[document == number][None]
        total = total + F.cross_entropy(model(own).logits[0, :-1], own[0, 1:], reduction="sum")
        if number > 0:  # the packed sequence also scores each document's first token, after its end-of-text token
            before = ids[document == number - 1][None]
            total = total + F.cross_entropy(model(before).logits[0, -1:], own[0, :1], reduction="sum")
    expected = torch.autograd.grad(total / (len(ids) - 1), list(model.parameters()))
    trainer = trainer_of(model, training)
    with statex_ops():
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
    assert loss.item() == pytest.approx(total.item() / (len(ids) - 1), rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_stage_leaves_the_model_its_summary_and_no_checkpoints(make, settings, data, tokenizer, tmp_path):
    steps = []
    training = settings(steps=5, tokens_per_step=64)
    summary = train(
        make("mamba2"), tokenizer, data, training, tmp_path, progress=lambda done, total: steps.append((done, total))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained", "training.json"]
    assert json.loads((tmp_path / "training.json").read_text()) == summary.to_dict()
    assert steps == [(done, 5) for done in range(1, 6)]
    assert (summary.steps, summary.tokens, summary.num_processes) == (5, 320, 1)
    assert summary.tokens_per_second == pytest.approx(320 / summary.seconds)
    assert summary.peak_memory > 0
    names = {path.name for path in (tmp_path / "trained").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_events_of_tensorboard_are_the_arm_s_own(make, settings, data, tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = settings(report_to=["tensorboard"])
    for arm in ("lpt", "statex"):
        train(make("statex_gla"), tokenizer, data, training, tmp_path / arm)
    for arm in ("lpt", "statex"):
        events = EventAccumulator(str(tmp_path / arm / "logs")).Reload()
        steps = [event.step for event in events.Scalars("train/loss")]
        assert steps == [1, 2, 3, 4]
        logged = {"train/learning_rate", "train/tokens_per_second", "train/peak_memory_gib", "train/data_wait"}
        assert logged <= set(events.Tags()["scalars"])


def test_gradients_of_fresh_and_inherited_tensors_are_logged_apart(make, settings, trainer_of):
    model = make("statex_gla")
    expand(model, layers=[1], init="inherit")
    trainer = trainer_of(model, settings(log_every=2, max_grad_norm=1e-3))
    trainer.train_to_the_end()
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        whole = math.hypot(row["grad_norm_fresh"], row["grad_norm_inherited"])
        assert whole == pytest.approx(1e-3, rel=1e-2)  # as clipped
        assert row["grad_norm_fresh"] > 0


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"backpropagation_length": 8}], ids=str)
def test_the_use_of_the_new_state_is_watched(make, family, settings, data, tokenizer, tmp_path, trainer_of, changes):
    """After the first sequence of text, before the steps that are due; the training stays as it is."""
    model = make(family)
    expand(model, every=1, init="inherit")
    training = settings(watch_state_every=2, report_to=["tensorboard"], log_every=4, **changes)
    trainer = trainer_of(model, training)
    ids = TrainingBatches(data, training, tokenizer, tokens=trainer.tokens).first_sequence()
    with torch.no_grad(), statex_ops():
        cache = cache_of(model.eval()(input_ids=ids, use_cache=True))
    summary = trainer.train_to_the_end()
    assert [use["step"] for use in summary.state_use] == [0, 2]
    for layer in stored_plan(model.config).layers:
        state = layer_state(cache, layer, family)[0].double()  # [H, K, V]
        energy = state[new_entries(layer)].square().sum() / state.square().sum()
        shares = [values / values.sum() for values in map(torch.linalg.svdvals, state)]
        rank = sum(math.exp(-(share * share.log()).sum()) for share in shares) / len(shares)
        first, second = summary.state_use
        assert first[f"new_state_energy_layer_{layer.index}"] == pytest.approx(energy.item(), rel=1e-4)
        assert first[f"effective_rank_layer_{layer.index}"] == pytest.approx(rank, rel=1e-4)
        assert second[f"new_state_energy_layer_{layer.index}"] != first[f"new_state_energy_layer_{layer.index}"]
    unwatched = make(family)
    expand(unwatched, every=1, init="inherit")
    trainer_of(unwatched, training.model_copy(update={"watch_state_every": None})).train_to_the_end()
    assert_same(model.state_dict(), unwatched.state_dict())


def test_gradients_are_not_copied_into_buckets(make, settings, trainer_of):
    """DDP would hold them twice, 5 GB of a model of 1.3B; tests/training/test_ranks.py has what it trains."""
    assert trainer_of(make("mamba2"), settings()).accelerator.ddp_handler.gradient_as_bucket_view


def test_what_is_not_expanded_is_not_watched(make, settings, trainer_of):
    model = make("mamba2")
    reinitialize(model, [1])
    assert trainer_of(model, settings(watch_state_every=1)).train_to_the_end().state_use == []


def test_the_loss_that_is_logged_is_the_mean_over_scored_tokens(make, settings, data, tokenizer, tmp_path):
    training = settings(steps=1, warmup_steps=0, sequences_per_device=2, weights={"text": 1})
    summary = train(make("mamba2"), tokenizer, data, training, tmp_path)
    model = make("mamba2")
    read = prepare_tokens(data, tokenizer, tmp_path / "tokens", 10**6)
    batches = iter(TrainingBatches(data, training, tokenizer, tokens=read))
    with torch.no_grad():
        expected = torch.stack([model(**next(batches)).loss for _ in range(2)]).mean()
    assert summary.final_loss == pytest.approx(expected.item(), rel=1e-3)


def test_one_process_beside_idle_gpus_says_so_once(make, settings, data, tokenizer, tmp_path, monkeypatch, caplog):
    from statex.training.trial import try_training

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with caplog.at_level("WARNING"):
        try_training(settings(), False, True)  # the check before a run, whose workers may share the GPUs
        assert "GPUs" not in caplog.text
        train(make("mamba2"), tokenizer, data, settings(), tmp_path / "arm", seed=0)
    assert caplog.text.count("training on one of 4 GPUs; torchrun") == 1
