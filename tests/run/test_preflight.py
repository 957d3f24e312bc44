"""What a recipe over a foreign checkpoint is refused for, and what makes two recipes the same run."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import GLA, VOCABULARY
from statex.errors import UserError
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.recipe import parse_recipe
from statex.run.preflight import check_recipe, refuse_other_recipe
from tiny_recipe import TRAINING


@pytest.fixture
def values(tmp_path):
    """A recipe that post-trains a checkpoint with MQAR, and whose tokenizer has no reserved recall tokens."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    GLAForCausalLM(GLAConfig(**sizes, **GLA["1-head"], eos_token_id=0)).save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": f"w{i} w{i + 1} w2 w3"}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return {
        "name": "foreign", "output": str(tmp_path / "runs"), "arms": {"lpt": {"kind": "lpt"}}, "training": {**TRAINING},
        "models": {"gla": {"checkpoint": str(tmp_path / "model")}},
        "data": {
            "text": {"files": [str(tmp_path / "text.jsonl")], "held_out": 0.3},
            "recall": {"num_keys": 16, "num_values": 16, "shapes": [[16, 4]]},
        },
        "evaluation": {"suites": ["mqar"], "mqar": {"num_pairs": [4], "num_keys": 16, "num_values": 16}},
    }  # fmt: skip


@pytest.mark.parametrize(("num_keys", "num_values"), [(4, 4), (16, 15), (20, 20)])
def test_mqar_asks_for_the_tokens_of_training(values, num_keys, num_values):
    check_recipe(parse_recipe(values))
    values["evaluation"]["mqar"] |= {"num_keys": num_keys, "num_values": num_values}
    with pytest.raises(UserError, match=r"evaluation\.mqar\.num_(keys|values) = \d+: asks for tokens that do not"):
        check_recipe(parse_recipe(values))
    values["training"] = TRAINING | {"weights": {"text": 1.0}}
    check_recipe(parse_recipe(values))  # what was never trained can be asked in any tokens


def test_skipping_bad_records_continues_the_same_run(values):
    before = parse_recipe(values)
    values["data"]["text"]["bad_records"] = "skip"
    refuse_other_recipe(before, parse_recipe(values))
    values["data"]["text"]["held_out"] = 0.2
    with pytest.raises(UserError, match=r"they differ in data\.text\.held_out"):
        refuse_other_recipe(before, parse_recipe(values))


def test_skipping_bad_steps_and_sharing_sequences_continues_the_same_run(values):
    before = parse_recipe(values)
    values["training"] |= {"bad_steps": "skip", "spike": 3.0, "sequence_parallel": 2}
    arm = next(iter(values["arms"].values()))
    arm["training"] = arm.get("training", {}) | {"bad_steps": "stop"}
    refuse_other_recipe(before, parse_recipe(values))
    values["training"]["learning_rate"] = 1e-3
    with pytest.raises(UserError, match=r"they differ in training\.learning_rate"):
        refuse_other_recipe(before, parse_recipe(values))


def test_lm_evals_tasks_need_a_token_to_begin_with(values):
    pytest.importorskip("lm_eval")
    values |= {"evaluation": {"suites": ["piqa"]}, "training": TRAINING | {"weights": {"text": 0.0, "mqar": 1.0}}}
    check_recipe(parse_recipe(values))
    path = f"{values['models']['gla']['checkpoint']}/tokenizer_config.json"
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    del settings["eos_token"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)
    with pytest.raises(UserError, match="has neither bos_token nor eos_token"):
        check_recipe(parse_recipe(values))
