"""The card of a model's folder."""

import re

from statex.reporting.model_card import model_card

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
        name="my model", model_type="statex_gla", base_model="org/base", plan=PLAN, state=STATE, num_parameters=103_424,
        training={"steps": 2000, "betas": [0.9, 0.95]}, results=["gla: raised."], license="apache-2.0", tags=["x"],
    )  # fmt: skip
    front = card.split("---\n")[1]
    assert 'base_model: "org/base"' in front
    assert "library_name: transformers" in front
    assert 'license: "apache-2.0"' in front
    assert re.findall(r'- "(.*)"', front) == ["statex", "state-expansion", "recurrent", "statex_gla", "x"]
    assert "| 6 | 4 x (8 x 16) | 4 x (32 x 16) | 512 | 2,048 |" in card
    assert "2,560 elements at batch 1 (1,024 before), 2.50 times" in card
    assert "rank 8" in card
    assert "| `a.q_proj.weight` | 32 x 64 | 128 x 64 | grown |" in card
    assert "| `a.new` | new | 8 x 64 | fresh |" in card
    assert "o_proj" not in card
    assert "| steps | 2,000 |" in card
    assert "- gla: raised." in card
    assert "import statex" in card
    assert "2509.22630" in card
    assert "not been trained" not in card


def test_control_untrained_and_plain_models_say_what_they_are():
    control = model_card(name="c", model_type="statex_gla", base_model="b", plan=PLAN | {"kind": "reinitialize"})
    assert "**without** enlarging the state" in control
    assert "not been trained since" in control
    plain = model_card(name="p", model_type="mamba2")
    assert "a model made from scratch" in plain
    assert "What was changed" not in plain
    assert "base_model" not in plain
