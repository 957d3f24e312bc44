"""Behaviour matrix, second part: parallel, step by step, generating, padded, with gradient checkpointing."""

import pytest
import torch

import statex
from common import (
    DEFINED,
    GENERATING,
    HYBRID_CASES,
    UNEXPANDED,
    Case,
    base_type,
    distance,
    logits,
    make_gla,
    make_mamba2,
    mixer,
    recurrent_layers,
    tokens,
)
from naive_models import mamba2_mixer, naive_logits
from statex.expansion.stored import layer_geometry
from statex.models.caches import cache_argument, cache_of

every_defined_case = pytest.mark.parametrize("case", DEFINED, ids=str)
generating = pytest.mark.parametrize("case", GENERATING, ids=str)


def states(model):
    """(heads, key dim, value dim) of each layer."""
    geometry = layer_geometry(model.config)
    return [(state.num_heads, state.key_dim, state.value_dim) for _, state in sorted(geometry.items())]


@torch.no_grad()
def in_pieces(model, ids, borders):
    """Logits of ids [B, T] read in pieces through the cache."""
    name, cache, outputs = cache_argument(model), None, []
    for start, end in zip([0, *borders], [*borders, ids.shape[1]], strict=True):
        output = model(ids[:, start:end], use_cache=True, **{name: cache})
        cache = cache_of(output)
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@every_defined_case
def test_an_expanded_model_is_its_definition(case):
    """Chunk, step, and both in turn, against the recurrence written out token by token."""
    model = case.expanded()
    ids = tokens()
    wanted = torch.stack([naive_logits(model, row, states(model)) for row in ids])
    assert distance(logits(model, ids), wanted) < 1e-5
    assert distance(in_pieces(model, ids, list(range(1, 20))), wanted) < 1e-5
    assert distance(in_pieces(model, ids, [7, 8, 9, 15]), wanted) < 1e-5


@generating
def test_reading_in_pieces_equals_reading_at_once(case):
    model = case.expanded()
    ids = tokens()
    wanted = logits(model, ids)
    assert distance(in_pieces(model, ids, list(range(1, 20))), wanted) < 1e-5
    assert distance(in_pieces(model, ids, [7, 8, 9, 15]), wanted) < 1e-5


NAMED_OTHERWISE = ("bamba", "granitemoehybrid", "zamba2", "nemotron_h")


@pytest.mark.parametrize("case", [case for case in HYBRID_CASES if case.family in NAMED_OTHERWISE], ids=str)
def test_a_mixer_of_the_mamba2_type_is_its_definition(case):
    """The same recurrence as Mamba2's, whatever the fields are called; Falcon-H1 multiplies what it projects."""
    family, model = statex.FAMILIES[case.family], case.expanded()
    with torch.no_grad():
        mixer(model).time_step_limit = (0.0, float("inf"))  # the definition has none
        x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
        tensors = {name: tensor.double() for name, tensor in mixer(model).state_dict().items()}
        norm = mixer(model).norm
        group_size = getattr(norm, "group_size", norm.weight.shape[0])  # older transformers norm all channels together
        config = {"layer_norm_epsilon": norm.variance_epsilon}
        config["n_groups"] = getattr(model.config, family.names.num_groups)
        rows = [mamba2_mixer(tensors, row.double(), config, states(model)[0], group_size) for row in x]
        wanted = torch.stack(rows)
        assert distance(mixer(model)(x), wanted) < 1e-5


@pytest.mark.parametrize(("family", "configuration"), UNEXPANDED)
def test_an_unexpanded_model_is_its_definition(family, configuration):
    model = Case(family, configuration, "inherit").model()
    ids = tokens()
    wanted = torch.stack([naive_logits(model, row, states(model)) for row in ids])
    with statex.statex_ops():
        assert distance(logits(model, ids), wanted) < 1e-5
        assert distance(in_pieces(model, ids, list(range(1, 20))), wanted) < 1e-5
        assert distance(in_pieces(model, ids, [7, 8, 9, 15]), wanted) < 1e-5


def greedy(model, ids, **kwargs):
    """12 greedily chosen tokens after ids [B, T]."""
    output = model.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        attention_mask=kwargs.pop("attention_mask", torch.ones_like(ids)), **kwargs,
    )  # fmt: skip
    return output[:, ids.shape[1] :]


@torch.no_grad()
def greedy_by_hand(model, ids):
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, -12:]


@generating
def test_generation_with_a_cache_equals_generation_without(case):
    model = case.expanded()
    ids = tokens(length=9)
    wanted = greedy_by_hand(model, ids)
    assert torch.equal(greedy(model, ids), wanted)
    assert torch.equal(greedy(model, ids, use_cache=False), wanted)
    assert len(set(wanted.flatten().tolist())) > 3, "the model says the same token over and over"


@generating
def test_a_prompt_of_one_token_can_be_continued(case):
    model = case.expanded()
    ids = tokens(length=1)
    assert torch.equal(greedy(model, ids), greedy_by_hand(model, ids))


@generating
def test_a_batch_with_left_padding_equals_single_sequences(case):
    model = case.expanded()
    prompts = [tokens(batch=1, length=length, seed=length) for length in (3, 7, 11)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (11 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([torch.arange(11)[None] >= 11 - prompt.shape[1] for prompt in prompts]).long()
    batch = logits(model, padded, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        assert distance(batch[row, -prompt.shape[1] :], logits(model, prompt)[0]) < 1e-5
    together = greedy(model, padded, attention_mask=mask)
    assert torch.equal(together, torch.cat([greedy(model, prompt) for prompt in prompts]))


PADDED = torch.tensor([0, 4, 8])
"""Tokens of padding in front of each row of 11."""


def assert_padding_is_nothing(model, read):
    ids = tokens(batch=3, length=11)
    mask = (torch.arange(11) >= PADDED[:, None]).long()
    batch = read(ids * mask, mask)
    for row, padding in enumerate(PADDED):
        assert distance(batch[row, padding:], logits(model, ids[row : row + 1, padding:])[0]) < 1e-5


@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize("configuration", ["1-group", "bias"])
def test_left_padding_of_an_unexpanded_mamba2(configuration, length):
    """A bias of the projection must not make something of padding, nor leave it in the convolution's state."""
    model = Case("mamba2", configuration, "inherit").model()
    forward = type(model.backbone.layers[0].mixer).forward
    with statex.statex_ops():
        assert_padding_is_nothing(model, lambda ids, mask: logits(model, ids, attention_mask=mask))
        prompts = [tokens(batch=1, length=n, seed=n) for n in (1, length)]
        padded = torch.cat([torch.nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts])
        mask = torch.cat([torch.arange(length)[None] >= length - prompt.shape[1] for prompt in prompts]).long()
        together = greedy(model, padded, attention_mask=mask)
        assert torch.equal(together, torch.cat([greedy(model, prompt) for prompt in prompts]))
    assert type(model.backbone.layers[0].mixer).forward is forward


def test_an_expanded_mamba2_compiles_whole_as_the_plain_one_does(tmp_path):
    model = Case("mamba2", "bias", "inherit").model()
    statex.expand(model, every=1)
    model.save_pretrained(tmp_path)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for each in (model, statex.load(tmp_path).eval()):
        torch.compiler.reset()
        compiled = torch.compile(each, fullgraph=True, backend="eager")
        with torch.no_grad():
            actual, wanted = (one(ids, attention_mask=mask).logits for one in (compiled, each))
        torch.testing.assert_close(actual, wanted)


@generating
def test_beam_search_reorders_the_states(case):
    model = case.expanded()
    ids = tokens(length=6)
    with_cache = greedy(model, ids, num_beams=3)
    assert torch.equal(with_cache, greedy(model, ids, num_beams=3, use_cache=False))


def loss_and_gradients(model, ids, **kwargs):
    model.train()
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, wanted, tolerance=1e-5):
    assert abs(actual[0] - wanted[0]) < tolerance
    assert actual[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert distance(actual[1][name], gradient) < tolerance, name


@pytest.mark.parametrize("reentrant", [False, True])
@generating
def test_gradient_checkpointing_changes_nothing(case, reentrant):
    model = case.expanded()
    ids = tokens()
    wanted = loss_and_gradients(model, ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(loss_and_gradients(model, ids), wanted, 1e-6)


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_gradient_checkpointing_of_an_unexpanded_model(make):
    model = make()
    with statex.statex_ops():
        wanted = loss_and_gradients(model, tokens())
        model.gradient_checkpointing_enable()
        assert_same_gradients(loss_and_gradients(model, tokens()), wanted, 1e-6)


@generating
def test_bfloat16_stays_close(case):
    model = case.expanded()
    ids = tokens()
    wanted = logits(model, ids)
    model.to(torch.bfloat16)
    parallel = logits(model, ids)
    assert distance(parallel.float(), wanted) < 0.15
    assert distance(in_pieces(model, ids, [10, 11, 12]).float(), wanted) < 0.15
    cache = cache_of(model(ids, use_cache=True))
    assert {cache.layers[index].recurrent_states[0].dtype for index in recurrent_layers(model)} == {torch.float32}


@pytest.mark.parametrize("case", [case for case in GENERATING if case.family == "gla"], ids=str)
def test_gla_computes_in_double_precision(case):
    model = case.expanded().double()
    ids = tokens(batch=1)
    assert distance(logits(model, ids)[0], naive_logits(model, ids[0], states(model))) < 1e-12


@generating
def test_weights_that_accelerate_offloads_are_fetched(case):
    """Hooks of accelerate put a module's weights in place when it is called: none may be read past them."""
    from accelerate import cpu_offload

    model = case.expanded()
    ids = tokens()
    wanted = logits(model, ids)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(logits(model, ids), wanted)


@generating
def test_inputs_embeds_stand_for_input_ids(case):
    model = case.expanded()
    ids = tokens()
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
    assert torch.equal(embedded, logits(model, ids))


@generating
def test_outputs_of_the_hugging_face_interface(case):
    model = case.expanded()
    ids = tokens()
    with torch.no_grad():
        output = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
        last = model(ids, logits_to_keep=3, use_cache=False).logits
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert output.hidden_states[-1].shape == (2, 20, 32)
    torch.testing.assert_close(last, output.logits[:, -3:])
    shifted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, shifted)
    with torch.no_grad():  # as the Trainer asks for it
        share = model(ids, labels=ids, num_items_in_batch=torch.tensor(76), use_cache=False).loss
    torch.testing.assert_close(share, shifted / 2)
    assert model.get_input_embeddings().weight.shape == (48, 32)
    assert base_type(model) in statex.FAMILIES
