"""Reading in pieces, in batches and from a copied state gives what one plain forward pass gives."""

import pytest
import torch
from tiny_models import VOCABULARY, make_falcon_h1, make_gla, make_mamba2
from transformers import MambaConfig, MambaForCausalLM

from statex.errors import UserError
from statex.evaluation.reader import Reader


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 100), generator=torch.Generator().manual_seed(0))


def with_biases(model):
    """The model with biases of the input projections that are not 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj.bias"):
            torch.nn.init.normal_(parameter)
    return model


def make_biased_mamba2():
    return with_biases(make_mamba2(use_bias=True))


def make_biased_falcon_h1():
    return with_biases(make_falcon_h1(mamba_proj_bias=True))


def plain_nll(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("piece", [None, 1, 7, 64])
def test_pieces_equal_the_whole(model, ids, piece):
    torch.testing.assert_close(Reader(model, piece).next_token_nll(ids), plain_nll(model, ids), atol=1e-4, rtol=1e-4)


def test_only_what_is_asked_is_scored(model, ids):
    targets = torch.full_like(ids[:, 1:], -100)
    targets[0, 40], targets[2, 97:] = ids[0, 41], ids[2, 98:]
    nll, right = Reader(model, 16).score(ids[:, :-1], targets)
    whole = plain_nll(model, ids)
    torch.testing.assert_close(nll[0, 40], whole[0, 40], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nll[2, 97:], whole[2, 97:], atol=1e-4, rtol=1e-4)
    assert (nll != 0).sum() == 3
    assert not right[1].any()


def test_right_padding_changes_nothing(model, ids):
    padded = ids.clone()
    padded[0, 60:] = 0
    torch.testing.assert_close(
        Reader(model).next_token_nll(padded)[0, :59], plain_nll(model, ids[:1, :60])[0], atol=1e-4, rtol=1e-4
    )


def test_batch_of_1_equals_batch_of_3(model, ids):
    reader = Reader(model)
    single = torch.cat([reader.next_token_nll(row[None]) for row in ids])
    torch.testing.assert_close(reader.next_token_nll(ids), single, atol=1e-4, rtol=1e-4)


def test_shared_prefill_equals_separate_prefill(model, ids):
    reader = Reader(model, 16)
    context, questions = ids[:1, :80], ids[:, 80:]
    _, state = reader.read(context.tolist())
    shared = reader.score(questions[:, :-1], questions[:, 1:], reader.copy_state(state, [0, 0, 0]))[0]
    again = reader.score(questions[:, :-1], questions[:, 1:], reader.copy_state(state, [0, 0, 0]))[0]
    separate = reader.next_token_nll(torch.cat([context.expand(3, -1), questions], dim=1))[:, 80:]
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared, again, atol=0, rtol=0)


@pytest.mark.parametrize("piece", [None, 16])
def test_left_padding_changes_nothing(model, ids, piece):
    reader = Reader(model, piece)
    prompts = [ids[0].tolist(), ids[1, :93].tolist(), ids[2, :40].tolist()]
    logits, state = reader.read(prompts)
    with torch.no_grad():
        for row, prompt in zip(logits, prompts, strict=True):
            whole = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(row, whole, atol=1e-4, rtol=1e-4)
    together = reader.generate(logits, state, 12)
    alone = [reader.generate(*reader.read([prompt]), 12)[0] for prompt in prompts]
    assert together == alone
    for prompt, tokens in zip(prompts, alone, strict=True):
        given = torch.tensor([prompt + tokens])
        with torch.no_grad():
            greedy = model(input_ids=given).logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        assert greedy.tolist() == tokens


def test_rows_of_a_padded_state_can_be_chosen(model, ids):
    reader = Reader(model)
    _, state = reader.read([ids[0].tolist(), ids[1, :60].tolist()])
    logits, _ = reader.read([[7, 8]] * 3, reader.copy_state(state, [1, 0, 1]))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*ids[1, :60].tolist(), 7, 8]])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[2], expected, atol=1e-4, rtol=1e-4)


def test_a_finished_row_is_not_continued(model, ids):
    reader = Reader(model)
    rows = reader.generate(*reader.read(ids[:2].tolist()), 5, lambda row, tokens: row == 0 and len(tokens) == 2)
    assert [len(row) for row in rows] == [2, 5]


def test_only_attention_has_a_limit(model):
    limits = {"llama": 160, "falcon_h1": 160}
    assert Reader(model).max_context() == limits.get(model.config.model_type)


def test_a_model_that_cannot_continue_several_tokens_is_read_whole_then_one_by_one(ids):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8))
    reader = Reader(model, 16)
    assert not reader.supports_chunked_continuation
    _, state = reader.read(ids[:, :60].tolist())
    behind = reader.score(ids[:, 60:-1], ids[:, 61:], state)[0]
    torch.testing.assert_close(behind, plain_nll(model, ids)[:, 60:], atol=1e-4, rtol=1e-4)


def test_the_other_models_can(model):
    assert Reader(model).supports_chunked_continuation


def test_a_model_without_cache_is_refused():
    class Bare(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UserError, match="cache"):
        Reader(Bare())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_million_tokens_take_no_more_memory_than_64_thousand():
    model = make_gla().cuda()
    peaks = []
    for length in (1 << 16, 1 << 20):
        ids = torch.randint(0, VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))
        torch.cuda.reset_peak_memory_stats()
        assert torch.isfinite(Reader(model).next_token_nll(ids)).all()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("make", [make_biased_mamba2, make_biased_falcon_h1])
def test_padding_stays_nothing_where_the_projection_has_a_bias(make):
    """Otherwise a prompt's scores would depend on the prompts it is read with."""
    reader = Reader(make())
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (2, 3, 9)]
    together, state = reader.read(prompts)
    continued = reader.generate(together, state, 4)
    for row, prompt in enumerate(prompts):
        alone, state = reader.read([prompt])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
        assert continued[row] == reader.generate(alone, state, 4)[0]
