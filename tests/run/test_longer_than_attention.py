"""A recipe that asks for more tokens than a model's attention can read is refused before anything is written."""

from copy import deepcopy
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM

from common import HYBRIDS as HYBRID_MODELS
from common import MAKERS
from delta_models import ALL_MODELS, make_delta
from statex.errors import UserError
from statex.evaluation.reader import Reader
from statex.models.dispatch import statex_ops
from statex.models.limits import context_limit
from statex.recipe import parse_recipe
from statex.run import run_recipe
from statex.run.cost import costs
from statex.run.inputs import Inputs
from statex.run.preflight import check_recipe, checks_of
from tiny_recipe import CONFIGS, HYBRIDS, TRAINING, changed, data_values, write_text

LIMIT = 128
ALLOWED = {
    "suites": ["mqar", "nll_by_position"], "mqar": {"num_pairs": [32], "num_keys": 40, "num_values": 40},
    "nll_by_position": {"length": LIMIT, "num_windows": 2},
}  # fmt: skip
READ = f"more than the {LIMIT} tokens that this model's attention can read (max_position_embeddings of models.bamba)"
MISTAKES = {
    "text by position": ("nll_by_position.length = 129", f"is {READ}"),
    "hits": ("ar_hits.length = 129", f"is {READ}"),
    "pairs": ("mqar.num_pairs = 33", f"takes 132 tokens, {READ}"),
    "forms": ("recall_forms.lengths = 129", f"is {READ}"),
    "passkey": ("passkey.lengths = 400", f"is {READ}"),
    "needle": ("niah_single_1.lengths = 900", f"is {READ}"),
    "needle in text": ("niah_single_3.lengths = 900", f"is {READ}"),
    "needles": ("niah_multikey.lengths = 900", f"is {READ}"),
    "variables": ("variable_tracking.lengths = 900", f"is {READ}"),
    "examples": ("symbol_icl.shots = 64", f"tokens, {READ}"),
    "reading": ("cost.lengths = 129", f"is {READ}"),
    "decoding": ("cost.decode_tokens = 113", f"takes 129 tokens, {READ}"),
}
ONE_NUMBER = ("nll_by_position.length", "ar_hits.length", "cost.decode_tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def values(text, tmp_path):
    """A recipe whose every length is the most that its model, one with attention, can read."""
    training = TRAINING | {"sequence_length": LIMIT, "tokens_per_step": 2 * LIMIT}
    data = data_values(text)
    data["tokenizer"]["vocab_size"] = 400
    data["recall"] = {"num_keys": 40, "num_values": 40, "shapes": [[LIMIT, 4]]}
    config = HYBRIDS["bamba"] | {"max_position_embeddings": LIMIT}
    values = {
        "name": "long", "output": str(tmp_path / "runs"), "arms": {"lpt": {"kind": "lpt"}}, "training": training,
        "models": {"bamba": {"family": "bamba", "config": config, "pretraining": training}},
        "data": data, "evaluation": ALLOWED,
    }  # fmt: skip
    return deepcopy(values)


def evaluates(values, *overrides):
    """What the checks of evaluation alone raise, which take no time."""
    inputs = Inputs(parse_recipe(changed(values, *overrides)))
    for check in checks_of(inputs.recipe):
        if check.__qualname__ == "Evaluate.check":
            check(inputs)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_evaluation_longer_than_attention_is_refused(values, mistake):
    asked, problem = MISTAKES[mistake]
    field, number = asked.split(" = ")
    suite = field.partition(".")[0]
    value = number if field in ONE_NUMBER else f"[{number}]"
    with pytest.raises(UserError) as caught:
        evaluates(values, f'evaluation.suites=["{suite}"]', f"evaluation.{field}={value}")
    assert str(caught.value).startswith(f"evaluation.{asked}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("suite", ["niah_single_1", "niah_multikey", "variable_tracking", "passkey", "recall_forms"])
def test_an_attention_without_room_for_any_default_length_is_refused(values, suite):
    with pytest.raises(UserError, match=rf"evaluation\.{suite}\.lengths = None: no default length that model and text"):
        evaluates(values, f'evaluation.suites=["{suite}"]')


@pytest.mark.skipif(not find_spec("lm_eval"), reason="needs lm-eval")
@pytest.mark.parametrize(
    ("task", "lengths", "message"),
    [
        ("statex_passkey", "[117]", "evaluation.harness.lengths = 117: takes 129 tokens, more than the 128 tokens"),
        ("lm_eval_niah_single_1", "[100, 129]", "evaluation.harness.lengths = 129: is more than the 128 tokens"),
        ("ruler_vt", None, "evaluation.harness.lengths = '4096, the default of ruler_vt': takes 4096 tokens, more"),
        ("statex", None, "evaluation.harness.lengths = '1024, the default of statex_passkey': takes 1036 tokens"),
    ],
)
def test_lengths_of_lm_evals_tasks_are_refused_too(values, task, lengths, message):
    overrides = [f'evaluation.suites=["{task}"]', *([f"evaluation.harness.lengths={lengths}"] if lengths else [])]
    with pytest.raises(UserError) as caught:
        evaluates(values, *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training={ sequence_length = 256, tokens_per_step = 512 }", "training.sequence_length = 256: is "),
        (
            "models.bamba.pretraining={ sequence_length = 256, tokens_per_step = 512 }",
            "models.bamba.pretraining.sequence_length = 256: is ",
        ),
        (
            "arms.lpt.training={ sequence_length = 256, tokens_per_step = 512 }",
            "arms.lpt.training.sequence_length = 256: is ",
        ),
        ("data.recall.shapes=[[16,4],[129,4]]", "data.recall.shapes = 129: is "),
        (
            "training={ weights = { phone_book = 1.0, text = 0.0 }, sequence_length = 256, tokens_per_step = 512 }",
            "training.sequence_length = 256: is ",
        ),
    ],
)
def test_training_longer_than_attention_is_refused(values, override, message):
    with pytest.raises(UserError) as caught:
        check_recipe(parse_recipe(changed(values, override)))
    assert message + READ in str(caught.value)


def test_texts_of_forms_longer_than_attention_are_refused(values):
    values["training"]["weights"] = {"text": 0.5, "needles": 0.5}
    values["data"]["forms"] = {"lengths": [100, 129]}
    with pytest.raises(UserError, match=r"data\.forms\.lengths = 129: is more than the 128 tokens"):
        check_recipe(parse_recipe(values))


def test_the_most_that_attention_reads_is_allowed(values):
    """And a length that no sequence has: without text, passkeys and forms none is as long as sequence_length."""
    check_recipe(parse_recipe(values))
    unused = {"sequence_length": 512, "tokens_per_step": 512, "weights": {"text": 0.0, "mqar": 1.0}}
    values["training"] |= unused
    check_recipe(parse_recipe(values))


def test_without_attention_there_is_no_limit(values):
    config = CONFIGS["statex_gla"] | {"max_position_embeddings": LIMIT}
    values["models"] = {"gla": values["models"]["bamba"] | {"family": "statex_gla", "config": config}}
    values["data"]["recall"]["shapes"] = [[256, 4]]
    values["evaluation"]["nll_by_position"]["length"] = 200
    check_recipe(parse_recipe(values))


def test_a_checkpoint_is_refused_before_anything_is_written(values, tmp_path):
    """By a run and by a dry run; of several models, the one is named."""
    inputs = Inputs(parse_recipe(values))
    inputs.tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_config(inputs.outline("bamba").config).save_pretrained(tmp_path / "model")
    gla = {
        "family": "statex_gla",
        "config": CONFIGS["statex_gla"],
        "pretraining": values["models"]["bamba"]["pretraining"],
    }
    values["models"] = {"gla": gla, "stored": {"checkpoint": str(tmp_path / "model")}}
    values["evaluation"]["nll_by_position"]["length"] = 256
    message = f"evaluation.nll_by_position.length = 256: is {READ.replace('bamba', 'stored')}; ask for at most 128"
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe(values))
    assert message in str(caught.value)
    with pytest.raises(UserError) as caught:
        costs(parse_recipe(values))
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [*MAKERS, *ALL_MODELS])
def test_a_model_without_weights_has_the_limit_that_evaluation_finds(name):
    """There it is read off the cache; here off the class."""
    model = make_delta(name) if name in ALL_MODELS else MAKERS[name][0](**next(iter(MAKERS[name][1].values())))
    with statex_ops():
        found = Reader(model).max_context()
    assert context_limit(model) == found
    assert (found is not None) == (name in ALL_MODELS or (name in HYBRID_MODELS and "mamba" not in name))
