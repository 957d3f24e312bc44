import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from statex.data import mixture
from statex.data.mixture import TrainingBatches, combined_seed, gradient_accumulation_steps, text_tokens
from statex.data.tokens import prepare_tokens
from statex.errors import UserError
from statex.recipe import Training
from statex.settings import Data, Recall, TextSource


def training(**values):
    values = {
        "steps": 100,
        "warmup_steps": 1,
        "tokens_per_step": 1024,
        "sequence_length": 128,
        "weights": {"text": 2, "mqar": 2, "passkey": 1},
    } | values
    return Training.model_validate(values)


@pytest.fixture(scope="session")
def prepared(data, tokenizer, tmp_path_factory):
    return prepare_tokens(data, tokenizer, tmp_path_factory.mktemp("tokens"), 10**9)


def made(data, settings, tokenizer, prepared, **options):
    return TrainingBatches(data, settings, tokenizer, tokens=prepared, **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_the_shapes_and_labels_of_their_kind(data, tokenizer, prepared):
    batches = made(data, training(), tokenizer, prepared)
    assert batches.gradient_accumulation_steps == 1
    kinds = [batches.kind_of_step(step) for step in range(30)]
    assert set(kinds) == {"text", "mqar", "passkey"}
    lengths = set()
    for kind, batch in zip(kinds, take(batches, 30), strict=True):
        ids, labels = batch["input_ids"], batch["labels"]
        assert set(batch) == {"input_ids", "labels"}
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.numel() == 1024
        scored = labels != -100
        assert torch.equal(ids[scored], labels[scored])
        if kind == "mqar":
            lengths.add(ids.shape[1])
            assert ids.min() >= 288  # reserved recall tokens only
            assert (scored.sum(dim=1) == ids.shape[1] // 4).all()
        else:
            assert ids.shape == (8, 128)
            assert scored.all() if kind == "text" else (scored.sum(dim=1) < 7).all()
    assert lengths == {16, 32}


def test_the_share_of_steps_follows_the_weights(data, tokenizer, prepared):
    batches = made(data, training(), tokenizer, prepared)
    kinds = [batches.kind_of_step(step) for step in range(5000)]
    assert kinds.count("text") / 5000 == pytest.approx(0.4, abs=0.03)
    assert kinds.count("passkey") / 5000 == pytest.approx(0.2, abs=0.03)


def test_the_same_recipe_gives_the_same_batches_and_another_seed_others(data, tokenizer, prepared):
    first = take(made(data, training(), tokenizer, prepared), 12)
    other_arm = training(learning_rate=1.0, steps=50)
    assert_equal(first, take(made(data, other_arm, tokenizer, prepared), 12))
    reseeded = data.model_copy(update={"seed": 8})
    other = take(made(reseeded, training(), tokenizer, prepared), 12)
    assert any(a["input_ids"].shape != b["input_ids"].shape or (a["input_ids"] != b["input_ids"]).any()
               for a, b in zip(first, other, strict=True))  # fmt: skip


def test_each_seed_of_the_run_gives_another_order_of_the_same_text(data, tokenizer, prepared):
    settings = training(weights={"text": 1})
    runs = [take(made(data, settings, tokenizer, prepared, seed=seed), 4) for seed in (0, 0, 1, 2)]
    assert_equal(runs[0], runs[1])
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert not torch.equal(runs[one][0]["input_ids"], runs[other][0]["input_ids"])
    pairs = {combined_seed(data_seed, seed) for data_seed in range(20) for seed in range(20)}
    assert len(pairs) == 400  # data.seed = 1 with seed 0 differs from data.seed = 0 with seed 1


def test_iterating_again_begins_again(data, tokenizer, prepared):
    batches = made(data, training(), tokenizer, prepared, start_step=3)
    assert_equal(take(batches, 5), take(batches, 5))


@pytest.mark.parametrize("start", [1, 2, 7, 13, 29, 40])
def test_resuming_at_any_step_gives_what_would_have_come(data, tokenizer, prepared, start):
    settings = training(sequences_per_device=4)
    whole = take(made(data, settings, tokenizer, prepared), 2 * 45)
    resumed = made(data, settings, tokenizer, prepared, start_step=start)
    assert_equal(whole[2 * start :], take(resumed, 2 * (45 - start)))


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 2), (2, 4), (4, 1), (8, None)])
def test_ranks_and_micro_batches_share_the_global_batch(data, tokenizer, prepared, world_size, per_device):
    steps = 12
    settings = training(sequences_per_device=per_device)
    whole = take(made(data, training(), tokenizer, prepared), steps)
    ranks = [made(data, settings, tokenizer, prepared, rank=r, world_size=world_size) for r in range(world_size)]
    M = gradient_accumulation_steps(settings, world_size)
    assert M == ranks[0].gradient_accumulation_steps == 8 // world_size // (per_device or 8 // world_size)
    parts = [take(rank, steps * M) for rank in ranks]
    for step, batch in enumerate(whole):
        for name, tensor in batch.items():
            shared = torch.empty_like(tensor)
            for r, m in itertools.product(range(world_size), range(M)):
                part = parts[r][step * M + m][name]
                assert part.is_contiguous()
                shared[r + world_size * m :: world_size * M] = part
            assert torch.equal(shared, tensor)


@pytest.mark.parametrize(("world_size", "size", "per_device"), [(2, 2, 4), (4, 2, 1), (8, 4, None), (4, 4, 8)])
def test_groups_share_the_global_batch_and_their_ranks_its_sequences(
    data, tokenizer, prepared, world_size, size, per_device
):
    """Joined again, slices are the global batch, with what stands before each border predicting what stands behind."""
    steps, groups = 8, world_size // size
    packed = data.model_copy(update={"reset_state_at_documents": True})
    settings = training(sequences_per_device=per_device, sequence_parallel=size)
    whole = take(made(packed, training(), tokenizer, prepared), steps)
    ranks = [made(packed, settings, tokenizer, prepared, rank=r, world_size=world_size) for r in range(world_size)]
    M = gradient_accumulation_steps(settings, world_size)
    assert 8 // groups // (per_device or 8 // groups) == M
    parts = [take(rank, steps * M) for rank in ranks]
    for step, batch in enumerate(whole):
        batch["shift_labels"] = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)
        for name, tensor in batch.items():
            shared = torch.empty_like(tensor)
            for g, m in itertools.product(range(groups), range(M)):
                slices = [parts[size * g + part][step * M + m][name] for part in range(size)]
                assert all(each.is_contiguous() and each.shape == slices[0].shape for each in slices)
                shared[g + groups * m :: groups * M] = torch.cat(slices, dim=1)
            assert torch.equal(shared, tensor)


def test_seq_idx_comes_with_the_option_only(data, tokenizer, prepared):
    with_borders = data.model_copy(update={"reset_state_at_documents": True})
    settings = training(weights={"text": 1, "mqar": 1})
    plain = take(made(data, settings, tokenizer, prepared), 8)
    for batch, same in zip(take(made(with_borders, settings, tokenizer, prepared), 8), plain, strict=True):
        borders = batch.pop("seq_idx")
        assert_equal([batch], [same])
        assert borders.dtype == torch.int32
        assert borders.shape == batch["input_ids"].shape
        changes = borders.diff(dim=1)
        ends = batch["input_ids"][:, :-1] == tokenizer.eos_token_id  # a new document follows each end and nothing else
        assert torch.equal(changes == 1, ends)
        assert (borders[:, 0] == 0).all()


def test_through_a_data_loader(data, tokenizer, prepared):
    batches = made(data, training(), tokenizer, prepared)
    assert_equal(take(DataLoader(batches, batch_size=None), 4), take(batches, 4))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_take_turns(data, tokenizer, workers, prepared):
    batches = made(data, training(sequences_per_device=4), tokenizer, prepared, start_step=3)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    assert_equal(take(loader, 11), take(batches, 11))


def test_the_text_read_is_what_is_prepared(data, tokenizer):
    settings = training(steps=3000)
    batches = TrainingBatches(data, settings, tokenizer, seed=4)
    of_text = [step for step in range(3000) if batches.kind_of_step(step) == "text"]
    assert text_tokens(data, settings, 4) == 1024 * len(of_text)
    limits = (2999, 0, 1024, 5, 2048)
    assert [batches.num_text_steps(step) for step in limits] == [sum(s < limit for s in of_text) for limit in limits]
    assert text_tokens(data, training(weights={"text": 0, "mqar": 1}), 4) == 0


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({}, 3, r"tokens_per_step = 1024: its 8 sequences of 128 tokens do not divide among 3 processes"),
        ({"sequences_per_device": 3}, 1, r"sequences_per_device = 3: does not divide the 8 sequences"),
        ({"sequences_per_device": 8}, 2, r"sequences_per_device = 8: does not divide the 4 sequences"),
        ({"weights": {"text": 0, "passkey": 1}, "sequence_length": 64}, 1, "too short for passkey sequences"),
        ({"tokens_per_step": 1 << 20, "sequence_length": 1 << 20}, 1, "longer than the whole training text"),
        ({"tokens_per_step": 128, "sequence_length": 16}, 8, r"data\.recall\.shapes = 32: .* fewer than 8 sequences"),
        ({"sequence_parallel": 2}, 3, r"sequence_parallel = 2: does not divide the number of processes, which is 3"),
        ({"sequence_parallel": 2}, 6, r"do not divide among 3 times 2 processes; give a multiple of 384"),
        ({"sequence_parallel": 2, "sequences_per_device": 3}, 2, r"the 8 sequences of a step on each 2 processes"),
    ],
)
def test_what_does_not_fit_fails_at_once(data, tokenizer, values, world_size, message):
    values = {"weights": {"text": 1, "mqar": 1}} | values
    with pytest.raises(UserError, match=message):
        TrainingBatches(data, training(**values), tokenizer, world_size=world_size)


def test_a_late_step_is_found_as_fast_as_an_early_one(data, tokenizer, prepared, monkeypatch):
    """The kinds of earlier steps are drawn once, not at each step: 150,000 of them would take 50 ms."""
    batches = made(data, training(), tokenizer, prepared)
    last = 200 * 1024 + 5
    batches.num_text_steps(last)
    drawn = []
    kinds_of_block = mixture._kinds_of_block
    monkeypatch.setattr(mixture, "_kinds_of_block", lambda *which: drawn.append(which) or kinds_of_block(*which))
    batches.num_text_steps(last + 1)
    assert len(drawn) == 1


def test_missing_text_and_too_many_keys_fail_at_once(data, tokenizer, foreign_tokenizer, tmp_path):
    missing = Data(text=TextSource(files=[str(tmp_path / "none.txt")]))
    with pytest.raises(UserError, match="no file matches"):
        TrainingBatches(missing, training(weights={"text": 1}), tokenizer)
    wide = data.model_copy(update={"recall": Recall(num_keys=17, num_values=16, shapes=[(16, 4)])})
    with pytest.raises(UserError, match="num_keys"):
        TrainingBatches(wide, training(), tokenizer)
    # a stage without text does not open it
    TrainingBatches(missing, training(weights={"text": 0, "mqar": 1}), foreign_tokenizer)
