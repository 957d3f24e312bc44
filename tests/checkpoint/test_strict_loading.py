"""Strict loading: every damage to a model folder is one clear error."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import statex
from common import Case, logits, make_gla, make_mamba2, tokens
from statex.checkpoint import load_config, read_headers

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module", params=["gla", "mamba2", "expanded"])
def good(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "expanded":
        model = Case("gla", "conv", "preserve", factor=2).expanded()
    else:
        model = {"gla": make_gla, "mamba2": make_mamba2}[request.param]()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def some_matrix(tensors):
    return next(name for name in tensors if "o_proj" in name or "out_proj" in name)


def test_a_whole_folder_loads(folder):
    model = statex.load(folder)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def refused(folder, match, call=statex.load):
    with pytest.raises(statex.UserError, match=match) as caught:
        call(folder)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.field
    assert error.problem
    assert error.remedy
    assert str(error) == f"{error.field} = {error.value!r}: {error.problem}; {error.remedy}."
    assert "\n" not in str(error)


@pytest.mark.parametrize("call", [statex.load, statex.inspect], ids=["load", "inspect"])
class TestDamagedFolders:
    def test_missing_tensor(self, folder, call):
        change_tensors(folder, lambda tensors: tensors.pop(some_matrix(tensors)))
        refused(folder, r"the tensor .*o\w*_proj.weight is missing \(1 in all\)", call)

    def test_unexpected_tensor(self, folder, call):
        change_tensors(folder, lambda tensors: tensors.update({"model.surprise": torch.zeros(2)}))
        refused(folder, r"the tensor model.surprise is unexpected", call)

    def test_misshaped_tensor(self, folder, call):
        def transpose(tensors):
            name = some_matrix(tensors)
            tensors[name] = torch.cat([tensors[name], tensors[name]])

        change_tensors(folder, transpose)
        refused(folder, r"has shape \[64, (32|64)\], the configuration says \[32, (32|64)\]", call)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_file(self, folder, call, share):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(share * len(data))])
        refused(folder, "truncated", call)

    def test_file_with_something_behind_it(self, folder, call):
        with (folder / WEIGHTS).open("ab") as file:
            file.write(b"more")
        refused(folder, "truncated or damaged", call)

    @pytest.mark.parametrize("header", [b"{damaged", b"[1, 2, 3]", b'{"a": 3}', b'{"a": {"shape": [1]}}', b"\xff\xff"])
    def test_damaged_header(self, folder, call, header):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
        refused(folder, "truncated or damaged", call)

    def test_pickled_weights_only(self, folder, call):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        refused(folder, r"has only pickled weights \(pytorch_model.bin\)", call)

    def test_no_weights(self, folder, call):
        (folder / WEIGHTS).unlink()
        refused(folder, "has no model.safetensors", call)

    def test_no_config(self, folder, call):
        (folder / CONFIG).unlink()
        refused(folder, "has no config.json", call)

    @pytest.mark.parametrize("text", ["", "{", '{"model_type": "mamba2",}', "[]", "3", "\udcff"])
    def test_damaged_config(self, folder, call, text):
        (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(folder, "config.json", call)

    def test_unknown_family(self, folder, call):
        config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        config.save_pretrained(folder)
        refused(folder, "model_type = 'llama'.*known families: statex_gla, mamba2", call)

    def test_model_type_unknown_to_transformers(self, folder, call):
        change_config(folder, model_type="nonsense")
        refused(folder, "model_type = 'nonsense'.*known families: statex_gla, mamba2", call)

    def test_no_model_type(self, folder, call):
        change_config(folder, model_type=None)
        refused(folder, "model_type = None.*known families", call)

    def test_wrong_type_of_value(self, folder, call):
        change_config(folder, num_hidden_layers="two")
        refused(folder, "num_hidden_layers", call)

    def test_impossible_value(self, folder, call):
        change_config(folder, num_heads=5)
        refused(folder, "num_heads", call)

    def test_config_of_another_size(self, folder, call):
        change_config(folder, num_hidden_layers=3)
        refused(folder, "config.json: num_hidden_layers = 3: the weights have 2 layers", call)

    def test_more_layers_than_memory_beside_weights_without_layers(self, folder, call):
        change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
        change_config(folder, num_hidden_layers=10**9)
        refused(folder, "config.json: num_hidden_layers = 1000000000: the weights have 0 layers", call)

    def test_index_with_a_name_that_no_file_can_have(self, folder, call):
        (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "a" * 300 + ".safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(statex.UserError, match="name too long"):
            call(folder)

    def test_folder_that_is_not_there(self, folder, call):
        refused(folder / "nowhere", "is not a folder here", call)
        refused("statex-tests/no-such-model", "is not a folder here", call)

    def test_shards(self, folder, call):
        tensors = load_file(folder / WEIGHTS)
        names = list(tensors)
        parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        (folder / WEIGHTS).unlink()
        index = folder / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}})
        )
        call(folder)
        (folder / "model-2.safetensors").unlink()
        refused(folder, "model-2.safetensors'.*is listed in the index but is not there", call)
        for text in ("{", "[]", "{}", '{"weight_map": 3}'):
            index.write_text(text)
            refused(folder, "index.json.*damaged", call)


@pytest.mark.parametrize(
    "values",
    [{}, {"version": 99}, {"version": 1}, {"version": 1, "layers": [{}]}, [], [{}], [{"version": 2}], [{"version": 1}]],
)
def test_damaged_plan(tmp_path, values):
    Case("gla", "conv", "preserve", factor=2).expanded().save_pretrained(tmp_path)
    change_config(tmp_path, expansion=values)
    refused(tmp_path, "config.json: expansion")


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    model = make_gla(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    statex.load(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": model.lm_head.weight.detach().clone()}))
    assert torch.equal(logits(statex.load(tmp_path), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_tied_matrices_that_differ_are_refused(tmp_path, make):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    other = model.lm_head.weight.detach() + 1
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    for call in (statex.load, statex.inspect):
        refused(tmp_path, "tie_word_embeddings = True: says that lm_head.weight is .*, but the weights have both", call)
    change_config(tmp_path, tie_word_embeddings=False)
    assert torch.equal(statex.load(tmp_path).lm_head.weight, other)


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", '{"max_new_tokens": -1}', '{"early_stopping": "evil"}'])
def test_a_generation_config_that_cannot_be_read_is_refused(folder, text):
    (folder / "generation_config.json").write_text(text)
    for call in (statex.load, statex.inspect):
        refused(folder, "generation_config.json", call)


def test_loading_does_not_rescale_mamba2(tmp_path):
    """transformers divides out_proj by sqrt(layers) whenever it loads such a model."""
    model = make_mamba2(rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path)
    loaded = statex.load(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert loaded.config.rescale_prenorm_residual


def test_load_passes_options_on(tmp_path):
    make_gla().save_pretrained(tmp_path)
    assert statex.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert statex.load(str(tmp_path), device_map="cpu").device.type == "cpu"
    assert not statex.load(tmp_path).training


def test_headers_are_read_without_weights(tmp_path):
    model = make_gla().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    headers = read_headers(tmp_path)
    assert {name: header.shape for name, header in headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert {header.dtype for header in headers.values()} == {"BF16"}


def test_inspect_says_what_was_done(tmp_path):
    model = Case("mamba2", "2-groups", "preserve", factor=3).expanded()
    model.save_pretrained(tmp_path)
    found = statex.inspect(tmp_path).to_dict()
    assert found["model_type"] == "statex_mamba2"
    assert found["expansion"] == "expand, init preserve, factor 3"
    assert found["num_parameters"] == model.num_parameters()
    assert json.loads(json.dumps(found)) == found


def test_other_models_load_nowhere(tmp_path):
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "llama", load_config)
    with pytest.raises(statex.UserError, match="llama"):
        statex.expand(LlamaForCausalLM(config))
    with pytest.raises(statex.UserError, match="llama"):
        statex.state_report(config)
