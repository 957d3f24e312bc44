"""The card of a model's folder."""

import re

import pytest
import yaml

from statex.checkpoint.model_card import model_card

PLAN = {
    "kind": "expand",
    "model_type": "statex_gla",
    "init": "preserve",
    "factor": 4,
    "rank": 8,
    "seed": 3,
    "layers": [
        {
            "index": 6,
            "before": {"num_heads": 4, "key_dim": 8, "value_dim": 16},
            "after": {"num_heads": 4, "key_dim": 32, "value_dim": 16},
            "tensors": [
                {"name": "a.q_proj.weight", "before": [32, 64], "after": [128, 64], "edit": "grown"},
                {"name": "a.new", "before": None, "after": [8, 64], "edit": "fresh"},
                {"name": "a.o_proj.weight", "before": [64, 64], "after": [64, 64], "edit": "kept"},
            ],
        }
    ],
    "version": 1,
}
STATE = {"total_elements": 2560, "total_elements_before": 1024}


def test_front_matter_and_contents():
    card = model_card(
        name="my model", model_type="statex_gla", base_model="org/base", plans=[PLAN], state=STATE,
        num_parameters=103_424, training={"steps": 2000, "betas": [0.9, 0.95]},
    )  # fmt: skip
    front = card.split("---\n")[1]
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "tags": ["statex", "state-expansion", "recurrent", "statex_gla"],
    }
    assert "| 6 | 4 x (8 x 16) | 4 x (32 x 16) | 512 | 2,048 |" in card
    assert "2,560 elements at batch 1 (1,024 before), 2.50 times" in card
    assert "rank 8" in card
    assert "| a.q_proj.weight | 32 x 64 | 128 x 64 | grown |" in card
    assert "| a.new | new | 8 x 64 | fresh |" in card
    assert "o_proj" not in card
    assert "| steps | 2,000 |" in card
    assert "import statex" in card
    assert "2509.22630" in card
    assert "not been trained" not in card


def test_control_untrained_and_plain_models_say_what_they_are():
    control = model_card(name="c", model_type="statex_gla", base_model="b", plans=[PLAN | {"kind": "reinitialize"}])
    assert "**without** enlarging the state" in control
    assert "not been trained since" in control
    plain = model_card(name="p", model_type="mamba2")
    assert "a model made from scratch" in plain
    assert "What was changed" not in plain
    assert "base_model" not in plain


HOSTILE = "<script>x</script>\n# **a** [b](http://c) `d` | e_ --- \n---\nlicense: mit"


@pytest.mark.parametrize("field", ["name", "model_type", "base_model", "training"])
def test_what_a_user_wrote_is_text(field):
    value = {HOSTILE: HOSTILE} if field == "training" else HOSTILE
    card = model_card(**({"name": "n", "model_type": "m", "plans": [PLAN]} | {field: value}))
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() <= {"library_name", "pipeline_tag", "base_model", "tags"}
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", text)
    assert not re.search(r"(?<!\\)\]\(", text)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 4 + (field == "training")


def test_a_plan_s_words_are_text_too():
    plan = PLAN | {"init": HOSTILE, "layers": [PLAN["layers"][0] | {"tensors": [
        {"name": HOSTILE, "before": [1], "after": [2], "edit": HOSTILE}]}]}  # fmt: skip
    card = model_card(name="n", model_type="m", plans=[plan])
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", card)


def test_the_card_of_a_model_expanded_twice_has_each_step():
    second = PLAN | {"kind": "expand", "init": "inherit", "factor": 2, "rank": None}
    card = model_card(name="n", model_type="m", base_model="b", plans=[PLAN, second])
    assert "enlarging the recurrent state of 1 layer 4 times" in card
    assert ", then by enlarging the recurrent state of 1 layer 2 times (*inherit*" in card
    assert card.index("### Step 1") < card.index("init preserve, factor 4") < card.index("### Step 2")
