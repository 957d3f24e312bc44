"""Behaviour matrix, third part: packed documents are kept apart."""

import pytest
import torch

import statex
from common import GENERATING, HYBRIDS, Case, distance, logits, make_gla, make_hybrid, make_mamba2, tokens
from statex.models.caches import cache_argument, cache_of
from statex.models.documents import document_arguments

generating = pytest.mark.parametrize("case", GENERATING, ids=str)

LENGTHS = [[5, 1, 14], [20], [2, 9, 3, 6]]
DOCUMENTS = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS])


def document_by_document(model, ids):
    rows = [torch.cat([logits(model, part[None])[0] for part in row.split(n)]) for row, n in zip(ids, LENGTHS)]
    return torch.stack(rows)


@generating
def test_packed_documents_equal_separate_ones(case):
    model = case.expanded()
    ids = tokens(batch=3)
    assert distance(logits(model, ids, seq_idx=DOCUMENTS), document_by_document(model, ids)) < 1e-5
    assert distance(logits(model, ids), document_by_document(model, ids)) > 1e-3


@pytest.mark.parametrize("configuration", ["2-groups", "bias"])
def test_packed_documents_of_an_unexpanded_mamba2(configuration):
    """Through the base model: transformers' language-model class does not pass seq_idx on."""
    model = Case("mamba2", configuration, "inherit").model()
    ids = tokens(batch=3)
    with statex.statex_ops(), torch.no_grad():
        hidden = model.backbone(ids, seq_idx=DOCUMENTS, use_cache=False).last_hidden_state
        assert distance(model.lm_head(hidden), document_by_document(model, ids)) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_packed_documents_of_an_unexpanded_mamba(family):
    """transformers' layers hand on neither borders nor any other keyword to these mixers."""
    model = make_hybrid(family, **next(iter(HYBRIDS[family][1].values())))
    ids = tokens(batch=3)
    with statex.statex_ops(), torch.no_grad():
        wanted = document_by_document(model, ids)
        for given in ({"seq_idx": DOCUMENTS}, document_arguments(model.base_model, ids, DOCUMENTS)):
            if family == "jamba" and len(given) == 1:  # whose attention needs the other arguments, too
                continue
            hidden = model.base_model(ids, use_cache=False, **given).last_hidden_state
            assert distance(model.lm_head(hidden), wanted) < 1e-5
        with pytest.raises(ValueError, match=r"cu_seqlens: .* give that too"):
            model.base_model(ids, cu_seqlens=torch.tensor([0, 60]))
        if family != "jamba":
            with pytest.raises(ValueError, match="use_cache=False"):
                model.base_model(ids, seq_idx=DOCUMENTS)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_padding_beside_packed_documents(family):
    """Rows of unequal lengths: what stands to the left of the first document is padding."""
    model = Case(family, "untied" if family == "mamba" else "experts", "inherit").expanded()
    ids, mask = tokens(batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    documents = torch.arange(20).ge(12).long().expand(2, -1) + mask
    got = logits(model, ids, attention_mask=mask, seq_idx=documents)
    wanted = torch.cat([logits(model, part)[0] for part in (ids[1:, 4:12], ids[1:, 12:])])
    assert distance(got[1, 4:], wanted) < 1e-5


@generating
def test_packed_documents_have_the_gradients_of_separate_ones(case):
    model = case.expanded()
    ids = tokens(batch=3)
    weight = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0))

    def gradients(output):
        model.zero_grad()
        (output * weight).sum().backward()
        return output.sum().detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    packed = gradients(model(ids, use_cache=False, seq_idx=DOCUMENTS).logits)
    rows = []
    for row, lengths in zip(ids, LENGTHS):
        rows.append(torch.cat([model(part[None], use_cache=False).logits[0] for part in row.split(lengths)]))
    apart = gradients(torch.stack(rows))
    for name, gradient in apart[1].items():
        assert distance(packed[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_packed_documents_and_a_cache_exclude_one_another(make):
    model = make()
    statex.expand(model, layers=[0], factor=2)
    ids = tokens(batch=3)
    assert cache_of(model(ids, seq_idx=DOCUMENTS)) is None
    cache = cache_of(model(ids, use_cache=True))
    with pytest.raises(ValueError, match="seq_idx"):
        model(ids, seq_idx=DOCUMENTS, use_cache=True, **{cache_argument(model): cache})


def test_packed_documents_of_mamba2_need_use_cache_false():
    """In evaluation mode transformers makes a cache by default: that must not end in silently wrong outputs."""
    model = make_mamba2()
    with statex.statex_ops(), pytest.raises(ValueError, match="use_cache=False"):
        model.backbone(tokens(batch=3), seq_idx=DOCUMENTS)


class Rows(torch.utils.data.Dataset):
    """Packed rows for a Trainer."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ids = tokens(batch=3)[index]
        return {"input_ids": ids, "labels": ids, "seq_idx": DOCUMENTS[index]}


def test_a_plain_trainer_hands_seq_idx_on(tmp_path):
    """It drops columns that the signature of the forward does not name."""
    from transformers import Trainer, TrainingArguments

    model = make_mamba2()
    statex.expand(model, layers=[0], factor=2)
    ids = tokens(batch=3)
    wanted, apart = (model(ids, labels=ids, **options).loss.item() for options in ({"seq_idx": DOCUMENTS}, {}))
    assert abs(wanted - apart) > 1e-3
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=3)
    assert Trainer(model, arguments, eval_dataset=Rows()).evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
