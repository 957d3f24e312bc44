"""statex inspect, and what every verb says about a folder that is not a sound model."""

import json
import shutil

import pytest
import torch
from calls import nothing_new


def test_inspect(call, models):
    for family, folder in models.items():
        status, output, _ = call("inspect", folder)
        assert status == 0
        assert family in output
        assert "total" in output
        status, output, _ = call("inspect", folder, "--json")
        found = json.loads(output)
        assert status == 0
        assert found["model_type"] == family
        assert len(found["state"]["layers"]) == 2


def test_inspect_of_something_that_is_not_a_model(call, tmp_path):
    files = {"adapter": "adapter_config.json", "quantised": "model.gguf", "empty": "README.md"}
    for name, file in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    wanted = {
        tmp_path: "has no config.json;",
        tmp_path / "none": "is not a folder here",
        tmp_path / "adapter": "holds an adapter (adapter_config.json); merge it",
        tmp_path / "quantised": "has no config.json, but model.gguf, which is in another format; give a folder",
        tmp_path / "empty": "has no config.json;",
        tmp_path / "quantised" / "model.gguf": "is a file; give a folder",
    }
    for folder, message in wanted.items():
        status, output, errors = call("inspect", folder, "--json")
        assert (status, output) == (2, "")
        assert f"model = '{folder}': {message}" in errors


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"dtype": "nonsense"}, {"expansion": {"version": 1}}]
)
def test_a_damaged_configuration_is_the_user_s_mistake(call, gla, tmp_path, changes):
    model = shutil.copytree(gla, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | changes))
    for arguments in (
        ("inspect", model),
        ("expand", model, tmp_path / "out"),
        ("expand", model, tmp_path / "out", "--dry-run"),
        ("eval", model, "--out", tmp_path / "out"),
    ):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, "")
        assert f"config.json: {next(iter(changes))}" in errors
    assert nothing_new(tmp_path, "model")


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "wrong shape", "no weights"])
def test_a_damaged_model_is_refused(call, gla, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    model.mkdir()
    for path in gla.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "missing tensor":
        save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    elif damage == "wrong shape":
        save_file(tensors | {name: torch.zeros(3, 3)}, weights, {"format": "pt"})
    else:
        weights.unlink()
    message = {
        "truncated": "is truncated or damaged", "missing tensor": f"the tensor {name} is missing",
        "wrong shape": f"the tensor {name} has shape [3, 3]", "no weights": "has no model.safetensors",
    }[damage]  # fmt: skip
    for arguments in (
        ("inspect", model),
        ("expand", model, tmp_path / "out"),
        ("eval", model, "--out", tmp_path / "out"),
    ):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, "")
        assert message in errors
    assert nothing_new(tmp_path, "model")
