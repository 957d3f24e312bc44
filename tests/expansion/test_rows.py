"""Growing tensors by named blocks of rows."""

import pytest
import torch

from statex.expansion.rows import grow
from statex.families import Segment, TensorRows


def grown(segments, old, num_rows, dim=0, seed=0):
    shape = list(old.shape)
    shape[dim] = num_rows
    fresh = 100 + torch.arange(float(torch.Size(shape).numel())).view(shape)
    return grow(old, fresh, TensorRows(tuple(segments), dim), torch.Generator().manual_seed(seed)), fresh


OLD = torch.arange(12.0).view(6, 2)


def test_new_rows_come_behind_the_old_ones_of_their_block():
    new, fresh = grown([Segment("q", 3, 2, 3)], OLD, 9)
    for block in range(3):
        assert torch.equal(new[3 * block : 3 * block + 2], OLD[2 * block : 2 * block + 2])
        assert torch.equal(new[3 * block + 2], fresh[3 * block + 2])


def test_zero_and_copy():
    segments = [Segment("z", 1, 2, 2), Segment("B", 1, 2, 5, fill="copy"), Segment("C", 2, 1, 2, fill="zero")]
    new, _ = grown(segments, OLD, 11)
    assert torch.equal(new[:2], OLD[:2])
    assert torch.equal(new[2:7], OLD[[2, 3, 2, 3, 2]])
    assert torch.equal(new[7:], torch.stack([OLD[4], torch.zeros(2), OLD[5], torch.zeros(2)]))


def test_scale_is_on_old_and_new_rows_of_its_segment():
    new, _ = grown([Segment("z", 1, 2, 2), Segment("B", 1, 4, 8, fill="copy", scale=0.5)], OLD, 10)
    assert torch.equal(new, torch.cat([OLD[:2], 0.5 * OLD[2:], 0.5 * OLD[2:]]))


def test_noise_is_a_share_of_the_old_rows_own_size():
    old = 3 * torch.randn(64, 50)
    new, _ = grown([Segment("B", 4, 16, 32, fill="copy", noise=0.3)], old, 128)
    blocks, before = new.view(4, 32, 50), old.view(4, 16, 50)
    assert torch.equal(blocks[:, :16], before)
    assert abs((blocks[:, 16:] - before).std() / old.std() - 0.3) < 0.03
    again, _ = grown([Segment("B", 4, 16, 32, fill="copy", noise=0.3)], old, 128)
    other, _ = grown([Segment("B", 4, 16, 32, fill="copy", noise=0.3)], old, 128, seed=1)
    assert torch.equal(again, new)
    assert not torch.equal(other, new)


def test_order_of_blocks():
    new, _ = grown([Segment("q", 3, 2, 2, order=(2, 0, 1))], OLD, 6)
    assert torch.equal(new, OLD[[4, 5, 0, 1, 2, 3]])


def test_columns_grow_like_rows():
    rows, _ = grown([Segment("q", 3, 2, 4, fill="zero")], OLD, 12)
    columns, _ = grown([Segment("q", 3, 2, 4, fill="zero")], OLD.T, 12, dim=1)
    assert torch.equal(columns, rows.T)
    assert columns.is_contiguous()


@pytest.mark.parametrize(("fill", "value"), [("fresh", None), ("zero", 0.0)])
def test_a_tensor_that_is_new(fill, value):
    fresh = torch.randn(6, 2)
    new = grow(None, fresh, TensorRows((Segment("q", 3, 0, 2, fill=fill),)), torch.Generator())
    assert torch.equal(new, fresh if value is None else torch.zeros(6, 2))
    assert new.data_ptr() != fresh.data_ptr()


def test_vectors_and_filters():
    bias, _ = grown([Segment("B", 2, 2, 4, fill="zero")], torch.arange(4.0), 8)
    assert torch.equal(bias, torch.tensor([0.0, 1, 0, 0, 2, 3, 0, 0]))
    filters, _ = grown([Segment("B", 1, 4, 8, fill="copy")], torch.randn(4, 1, 3), 8)
    assert filters.shape == (8, 1, 3)


def test_dtype_is_that_of_the_fresh_tensor():
    new = grow(OLD.bfloat16(), torch.zeros(12, 2), TensorRows((Segment("q", 3, 2, 4),)), torch.Generator())
    assert new.dtype == torch.float32


@pytest.mark.parametrize("segments", [[Segment("q", 2, 2, 3)], [Segment("q", 3, 1, 3)]])
def test_segments_must_cover_both_tensors(segments):
    with pytest.raises(AssertionError, match="do not cover"):
        grown(segments, OLD, 9)
