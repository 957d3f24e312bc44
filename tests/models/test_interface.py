"""What transformers' users expect of a model class: generate, pipelines, the Trainer, keywords, kinds of output."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import statex
from common import VOCABULARY, distance, logits, make_gla, make_mamba2, make_rwkv7, make_xlstm, tokens
from statex.errors import UserError
from statex.models.caches import CACHE_NAMES, cache_argument, cache_of


def expanded_mamba2():
    model = make_mamba2(n_groups=2)
    statex.expand(model, layers=[0])
    return model


def expanded_gla():
    model = make_gla()
    statex.expand(model, layers=[0])
    return model


def expanded_rwkv7():
    model = make_rwkv7()
    statex.expand(model, layers=[0], init="inherit")
    return model


OURS = {
    "gla": make_gla,
    "gla-conv": lambda: make_gla(use_short_conv=True, num_heads=4, num_kv_heads=2),
    "gla-expanded": expanded_gla,
    "mamba2-expanded": expanded_mamba2,
    "rwkv7-expanded": expanded_rwkv7,
    "xlstm": make_xlstm,
}
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)
DECODING = {"greedy": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}
LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@ours
@pytest.mark.parametrize("decoding", DECODING)
def test_generate_with_a_cache_equals_generate_without(make, decoding):
    model, ids = make(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cached = model.generate(ids, attention_mask=mask, **LENGTHS, **DECODING[decoding])
    beams = {"num_beams": DECODING[decoding].get("num_beams", 1)}
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, **LENGTHS, **beams, use_cache=False))


@ours
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_embeddings_gives_the_tokens_it_gives_from_ids(make, num_beams):
    model, ids = make(), tokens()
    options = LENGTHS | {"num_beams": num_beams, "attention_mask": torch.ones_like(ids)}
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(found, model.generate(ids, **options)[:, ids.shape[1] :])


@ours
def test_a_pipeline_continues_as_the_model_without_a_cache(make):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    model, texts = make(), ["w3 w4 w5 w6", "w9 w2"]
    found = pipeline("text-generation", model, tokenizer=tokenizer)(texts, batch_size=2, return_tensors=True, **LENGTHS)
    for text, [one] in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **LENGTHS, use_cache=False)[0]
        assert one["generated_token_ids"][-6:] == wanted[-6:].tolist()


@ours
@pytest.mark.parametrize("name", ["cu_seqlen", "position_ids", "token_type_ids", "cu_seq_lens_q", "kwargs"])
def test_a_keyword_that_it_does_not_know_is_a_type_error(make, name):
    model, ids = make(), tokens()
    with pytest.raises(TypeError, match=name):
        model(ids, labels=ids, **{name: ids})


@ours
@pytest.mark.parametrize("name", ["cu_seqlen", "num_items_in_batch", "labels"])
def test_the_same_holds_for_the_base_model(make, name):
    with pytest.raises(TypeError, match=name):
        make().base_model(tokens(), **{name: tokens()})


@ours
def test_the_base_model_counts_its_positional_arguments(make):
    base, ids = make().base_model, tokens()
    with pytest.raises(TypeError, match="positional argument"):
        base(ids, *[None] * 30)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        base(ids, input_ids=ids)


@ours
def test_the_base_model_keeps_documents_apart(make):
    model, ids = make().base_model, tokens(batch=1)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 7, 20])).last_hidden_state
        apart = [model(part, use_cache=False).last_hidden_state for part in (ids[:, :7], ids[:, 7:])]
    assert distance(packed, torch.cat(apart, dim=1)) < 1e-5


@ours
def test_cu_seqlens_keep_documents_apart(make):
    model, ids, borders = make(), tokens(batch=1), [0, 7, 7, 8, 20]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    apart = torch.cat([logits(model, ids[:, a:b]) for a, b in pairwise(borders) if a < b], dim=1)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=cu_seqlens)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), cu_seqlens=cu_seqlens)
    assert distance(packed.logits, apart) < 1e-5
    assert distance(embedded.logits, apart) < 1e-5
    assert cache_of(packed) is None
    assert distance(logits(model, ids), apart) > 1e-3


@ours
@pytest.mark.parametrize(
    ("batch", "arguments", "problem"),
    [
        (1, {"cu_seqlens": torch.tensor([0, 7, 12])}, "rising from 0 to T = 20"),
        (1, {"cu_seqlens": torch.tensor([3, 20])}, "rising from 0 to T = 20"),
        (1, {"cu_seqlens": torch.tensor([0, 9, 8, 20])}, "rising from 0 to T = 20"),
        (1, {"cu_seqlens": torch.tensor([0.0, 20.0])}, "expected int32 or int64"),
        (2, {"cu_seqlens": torch.tensor([0, 20])}, "expected 1"),
        (1, {"cu_seqlens": torch.tensor([0, 20]), "seq_idx": torch.zeros(1, 20, dtype=torch.int32)}, "seq_idx"),
        (1, {"cu_seqlens": torch.tensor([0, 20]), "use_cache": True}, "use_cache=False"),
    ],
)
def test_wrong_borders_are_refused(make, batch, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        make()(tokens(batch=batch), **arguments)


@ours
def test_keywords_of_the_loss_reach_it(make):
    model, ids = make(), tokens()
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
        assert torch.allclose(model(ids, labels=ids, num_items_in_batch=19).loss, 2 * loss)
        moved = model(ids, labels=ids, shift_labels=ids).loss
        assert torch.allclose(moved, torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()))


@ours
def test_attention_weights_are_refused_but_wrappers_may_name_them(make):
    model, ids = make(), tokens()
    assert torch.equal(model(ids, output_attentions=None).logits, model(ids).logits)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)


@ours
def test_a_peft_wrapper_runs(make):
    peft = pytest.importorskip("peft")
    model, ids = make(), tokens()
    wanted = logits(model, ids)
    targets = [{"statex_mamba2": "in_proj", "statex_xlstm": "v"}.get(model.config.model_type, "v_proj")]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    assert torch.equal(logits(wrapped, ids), wanted)


@ours
def test_outputs_as_a_tuple_and_settings_of_the_configuration(make):
    model, ids = make(), tokens()
    with torch.no_grad():
        wanted = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
        found = model(ids, labels=ids, use_cache=False, return_dict=False)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], wanted.loss)
        assert torch.equal(found[1], wanted.logits)
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == len(wanted.hidden_states) == 3
        assert model(ids, output_hidden_states=False).hidden_states is None
        model.config.return_dict = False
        assert torch.equal(model(ids, use_cache=False)[0], wanted.logits)
        assert torch.equal(model(ids, use_cache=False)[1][-1], wanted.hidden_states[-1])
        assert torch.equal(model(ids, return_dict=True).logits, wanted.logits)


def test_the_base_model_of_gla_gives_a_tuple_too():
    model, ids = make_gla().model, tokens()
    found = model(ids, use_cache=False, output_hidden_states=True, return_dict=False)
    assert torch.equal(found[0], found[1][-1])


@ours
def test_the_trainer_trains_evaluates_and_predicts(make, tmp_path):
    model, ids = make(), tokens(batch=6)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=3,
        max_steps=1, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-9,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        wanted = model(ids, labels=ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted.loss), rel=1e-4)
    predicted = trainer.predict(rows)
    assert distance(torch.tensor(predicted.predictions), wanted.logits) < 1e-5
    assert trainer.train().training_loss == pytest.approx(float(wanted.loss), rel=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_gla_takes_its_cache_by_either_name(name):
    model, ids = make_gla(), tokens()
    with torch.no_grad():
        wanted = model(ids).logits[:, 12:]
        cache = cache_of(model(ids[:, :12]))
        assert distance(model(ids[:, 12:], use_cache=False, **{name: cache}).logits, wanted) < 1e-5
        with pytest.raises(ValueError, match="past_key_values"):
            model(ids, cache=cache, past_key_values=cache)


def test_a_cache_under_gradient_checkpointing_is_refused():
    model, ids = make_gla(), tokens()
    cache = cache_of(model(ids))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, cache=cache)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_by_every_name(name):
    forward = {
        "cache": lambda ids, cache=None: None,
        "cache_params": lambda ids, cache_params=None: None,
        "past_key_values": lambda ids, past_key_values=None: None,
    }[name]
    assert cache_argument(SimpleNamespace(forward=forward)) == name
    assert cache_of(SimpleNamespace(logits=1, **{name: "states"})) == "states"


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(UserError, match="cache"):
        cache_argument(SimpleNamespace(forward=lambda ids: None))
    assert cache_of(SimpleNamespace(logits=1)) is None


def test_the_end_of_text_is_initialised_and_trained_where_it_is_the_padding_too():
    model = make_gla(pad_token_id=2, eos_token_id=2)
    embedding = model.get_input_embeddings().weight
    assert float(embedding[2].detach().std()) > 0.1
    ids = torch.tensor([[5, 2, 7]])
    model(ids, labels=ids).loss.backward()
    assert float(embedding.grad[2].norm()) > 0


@ours
def test_the_signature_names_what_it_takes(make):
    """The Trainer drops the columns of a data set that are not named."""
    named = set(inspect.signature(make().forward).parameters)
    assert {"input_ids", "attention_mask", "labels", "seq_idx", "cu_seqlens", "inputs_embeds"} <= named
