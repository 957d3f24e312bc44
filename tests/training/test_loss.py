"""The chunked cross-entropy against torch's, and how it is put into a model and taken out again."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from common import HYBRIDS, VOCABULARY, make_hybrid, make_xlstm
from statex.errors import UserError
from statex.training.loss import chunked_loss, linear_cross_entropy

N, D, V = 50, 8, 33


def problem(dtype=torch.float32):
    """Hidden states, a head and targets of which some are ignored, the last chunk's all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, N // 2, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (2, N // 2), generator=generator)
    targets[0, ::3] = -100
    targets[1, -5:] = -100
    return hidden, weight, targets


def torch_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, N, 4 * N])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_value_and_gradients_are_torch_s(dtype, tolerance, chunk, masked):
    hidden, weight, targets = problem(dtype)
    loss, expected = (
        linear_cross_entropy(hidden, weight, targets, chunk=chunk, masked=masked), torch_loss(hidden, weight, targets)
    )  # fmt: skip
    assert loss.dtype == dtype
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert (loss - expected).abs() <= tolerance * expected.abs()


@pytest.mark.parametrize(("frozen", "index"), [("weight", 0), ("hidden", 1)])
def test_what_needs_no_gradient_gets_none(frozen, index):
    hidden, weight, targets = problem()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    trained = (hidden, weight)[index]
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=7), trained)
    (theirs,) = torch.autograd.grad(torch_loss(hidden, weight, targets), trained)
    torch.testing.assert_close(ours, theirs)


def test_without_gradients_and_without_scored_tokens():
    hidden, weight, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, chunk=7)
    torch.testing.assert_close(loss, torch_loss(hidden, weight, targets).detach())
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_under_autocast_it_computes_in_bf16_and_leaves_fp32_gradients():
    hidden, weight, targets = problem()
    expected = torch.autograd.grad(torch_loss(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=7)
    assert loss.dtype == torch.float32
    assert (loss - torch_loss(hidden, weight, targets)).abs() < 1e-2 * loss
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() < 1e-2 * theirs.norm()


class Largest(TorchDispatchMode):
    """The most rows of `width` numbers that any tensor made within it has."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and self.width in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return result


def test_never_are_there_logits_of_more_than_a_chunk():
    hidden, weight, targets = problem()
    with Largest(V) as largest:
        linear_cross_entropy(hidden, weight, targets, chunk=9).backward()
    assert largest.rows == 9  # D is smaller, so this is not the weight
    with Largest(V) as largest:
        torch_loss(hidden, weight, targets).backward()
    assert largest.rows == N


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :11] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("head", ["tied", "untied", "frozen"])
def test_a_model_s_loss_and_gradients_stay_what_they_were(make, family, head):
    model = make(family, tie_word_embeddings=head == "tied")
    model.get_output_embeddings().weight.requires_grad_(head != "frozen")
    inputs = batch(model.config.vocab_size)
    expected = model(**inputs).loss
    expected.backward()
    theirs = gradients(model)
    model.zero_grad(set_to_none=True)
    with chunked_loss(model, chunk=16):
        loss = model(**inputs).loss
    loss.backward()
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(loss, expected)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_loss_of_other_families_stays_what_it_was(family):
    """Some have factors before or behind their heads."""
    model, inputs = make_hybrid(family, **next(iter(HYBRIDS[family][1].values()))), batch(VOCABULARY)
    expected = model(**inputs).loss
    with chunked_loss(model, chunk=16):
        torch.testing.assert_close(model(**inputs).loss, expected)


def test_a_soft_cap_on_logits_is_part_of_the_loss_and_its_gradients():
    model, inputs = make_xlstm(output_logit_soft_cap=2.0), batch(VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    expected = model(**inputs).loss
    expected.backward()
    theirs = gradients(model)
    model.zero_grad(set_to_none=True)
    with chunked_loss(model, chunk=16):
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, ours in gradients(model).items():
        assert (ours - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def test_a_head_that_is_not_linear_is_refused():
    model = make_hybrid("bamba")
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCABULARY)
    problem = "is not a linear layer without a bias"
    with pytest.raises(UserError, match=problem), chunked_loss(model, chunk=16):
        pass


def test_a_loss_made_from_all_logits_is_refused():
    model = make_hybrid("bamba", z_loss_coefficient=0.1)
    with pytest.raises(UserError, match=r"z_loss_coefficient = 0\.1"), chunked_loss(model, chunk=16):
        pass


def test_a_model_makes_no_logits_of_more_than_a_chunk(make, family):
    model = make(family)
    inputs = batch(model.config.vocab_size)
    with chunked_loss(model, chunk=20), Largest(model.config.vocab_size) as largest:
        model(**inputs).loss.backward()
    assert largest.rows == 20 > model.config.hidden_size


def test_the_number_of_scored_tokens_of_a_whole_step_divides_where_it_is_given(make, family):
    model = make(family)
    inputs = batch(model.config.vocab_size)
    with chunked_loss(model, chunk=16):
        mean, share = model(**inputs).loss, model(**inputs, num_items_in_batch=torch.tensor(200)).loss
    scored = 40 - 11 + 39
    torch.testing.assert_close(share, mean * scored / 200)


def test_a_model_is_afterwards_as_it_was(make, family):
    model = make(family)
    inputs = batch(model.config.vocab_size)
    head = model.get_output_embeddings()
    before = dict(model.__dict__), dict(head.__dict__), model(**inputs)
    with chunked_loss(model, 16):
        assert model(**inputs).logits.shape[-1] == model.config.hidden_size
    assert (model.__dict__, head.__dict__) == before[:2]
    with pytest.raises(ValueError), chunked_loss(model, 16):
        model()
    assert (model.__dict__, head.__dict__) == before[:2]
    assert torch.equal(model(**inputs).logits, before[2].logits)


def test_a_loss_function_and_a_head_of_the_user_s_own_are_put_back(make, family):
    def own_loss(*args, **kwargs):
        return torch.tensor(5.0)

    def own_forward(hidden):
        return F.linear(hidden, head.weight) * 2

    model = make(family)
    head = model.get_output_embeddings()
    model.loss_function, head.forward = own_loss, own_forward
    with chunked_loss(model, 16):
        assert model(**batch(model.config.vocab_size)).loss != 5
    assert model.loss_function is own_loss
    assert head.forward is own_forward
    assert model(**batch(model.config.vocab_size)).loss == 5
