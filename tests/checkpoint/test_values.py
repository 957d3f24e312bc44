"""What a folder's files say is checked before anything is built: values, sizes, plans, headers, indexes."""

import json
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import statex
from common import Case, logits, make_gla, make_mamba2, tokens
from statex.checkpoint import load_config, load_tokenizer

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
CALLS = [statex.load, statex.inspect, load_config]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    models = {
        "gla": make_gla(num_heads=4),
        "mamba2": make_mamba2(n_groups=2),
        "expanded": Case("gla", "conv", "preserve", factor=2, rank=3).expanded(),
        "expanded-mamba2": Case("mamba2", "2-groups", "preserve", factor=3).expanded(),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def folder(good, request, tmp_path):
    return shutil.copytree(good / getattr(request, "param", "gla"), tmp_path / "model")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, field, value=..., calls=CALLS):
    """Every call refuses the folder at once, by field and value."""
    files = sorted(path.name for path in folder.parent.iterdir())
    for call in calls:
        begin = time.process_time()
        with pytest.raises(statex.UserError) as caught:
            call(folder)
        assert time.process_time() - begin < 5
        assert caught.value.field.removeprefix("config.json: ").startswith(field), caught.value
        if value is not ...:
            assert caught.value.value == value
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in folder.parent.iterdir()) == files


BOTH = {
    "hidden_size": [0, -32, 10**30, 10**8, 2.5, True, "32", None],
    "num_hidden_layers": [0, -1, 1, 10**9, 10**30],
    "num_heads": [0, -4],
    "vocab_size": [0, 9e18, 9 * 10**18, 10**8],
    "num_labels": [-1, 10**8],
    "id2label": [3, "a", [1]],
    "label2id": [3],
    "dtype": ["nonsense", "manual_seed", "int8", 3],
    "torch_dtype": ["nonsense"],
    "hidden_act": ["nonsense"],
    "pad_token_id": [10**12, -1, 48],
    "eos_token_id": [10**12, [], [1, 48]],
    "bos_token_id": ["a"],
    "initializer_range": [float("nan"), float("inf"), -1],
    "anything": [float("nan"), 10**30, "\ud800"],
    "quantization_config": [{"quant_method": "bitsandbytes"}, 3],
    "text_config": [{"model_type": "llama"}, 3],
    "is_encoder_decoder": [True],
    "attn_implementation": ["kernels-community/flash-attn"],
    "transformers_weights": ["other.safetensors"],
    "configuration_files": [["config.5.0.0.json"]],
    "to_dict": [3],
    "get_text_config": [None],
    "auto_map": [3],
}
OF_FAMILY = {
    "gla": {
        "conv_size": [0], "expand_v": [0.0, -1.0, 1e308], "norm_eps": [-1, 0], "num_kv_heads": [0, 3],
        "clamp_min": [1.0],
        "intermediate_size": [0, 10**9], "max_position_embeddings": [0, 10**30], "expansion": ["", 3, [], {}],
    },
    "mamba2": {
        "n_groups": [0, 3], "state_size": [0, 10**9], "conv_kernel": [0], "chunk_size": [0, 10**7], "head_dim": [-16],
        "layer_norm_epsilon": [-1], "time_step_limit": [3, [0.1], [1.0, 0.0], [0.0, float("nan")], ["a", "b"],
                            [0.0, {}], [0.0, {"__float__": [1]}]],
        "expand": [0], "expansion": ["", {"version": 1}],
    },
}  # fmt: skip


@pytest.mark.parametrize("folder", ["gla", "mamba2"], indirect=True)
@pytest.mark.parametrize("field", BOTH)
def test_values_that_make_no_model(folder, field):
    for value in BOTH[field]:
        change_json(folder / CONFIG, **{field: value})
        refused(folder, field, calls=[statex.load] if value is BOTH[field][-1] else [load_config])


@pytest.mark.parametrize(
    ("folder", "field"),
    [(family, field) for family, fields in OF_FAMILY.items() for field in fields],
    indirect=["folder"],
)
def test_values_of_a_family_that_make_no_model(folder, field, request):
    for value in OF_FAMILY["mamba2" if "Mamba2" in (folder / CONFIG).read_text() else "gla"][field]:
        change_json(folder / CONFIG, **{field: value})
        refused(folder, field, calls=[load_config])


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 50_000 + "]" * 50_000, "[" * 40 + "]" * 40, "NaN", "1e999"])
def test_what_no_json_library_writes(folder, text):
    path = folder / CONFIG
    path.write_text(path.read_text().replace('"vocab_size": 48', f'"vocab_size": 48, "more": {text}'))
    refused(folder, "more" if text[:2] in ("Na", "1e") or len(text) == 80 else "config.json")


def test_infinity_stays_where_it_means_something(good):
    """transformers writes the limit of Mamba2's time steps so."""
    assert "Infinity" in (good / "mamba2" / CONFIG).read_text()
    assert load_config(good / "mamba2").time_step_limit[1] == float("inf")


def test_an_adapter_is_not_a_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    refused(folder, "model")


# headers and indexes


def change_header(folder, change, data=None):
    path = folder / WEIGHTS
    old = path.read_bytes()
    length = struct.unpack("<Q", old[:8])[0]
    header = json.loads(old[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (old[8 + length :] if data is None else data))


def overlap(header):
    first, second = (name for name in list(header)[1:3])
    header[second]["data_offsets"] = header[first]["data_offsets"]


HEADERS = {
    "overlap": overlap,
    "shape": lambda header: header["lm_head.weight"].update(shape=[1, 1]),
    "huge shape": lambda header: header["lm_head.weight"].update(shape=[2**40, 2**40]),
    "negative shape": lambda header: header["lm_head.weight"].update(shape=[-48, -32]),
    "offsets": lambda header: header["lm_head.weight"].update(data_offsets=[8, 4]),
    "dtype XX": lambda header: header["lm_head.weight"].update(dtype="XX"),
    "dtype F4": lambda header: header["lm_head.weight"].update(dtype="F4"),
    "dtype F8": lambda header: header["lm_head.weight"].update(dtype="F8_E4M3"),
    "dtype None": lambda header: header["lm_head.weight"].update(dtype=None),
    "metadata": lambda header: header["__metadata__"].update(format=3),
    "metadata list": lambda header: header.update(__metadata__=[1]),
    "renamed": lambda header: header.update({"\x1b[31m": header.pop("lm_head.weight")}),
    "nothing": lambda header: header.clear(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_refused(folder, name):
    change_header(folder, HEADERS[name])
    refused(folder, "model")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_only_floating_types(folder, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    refused(folder, "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite_unless_asked(folder, value):
    values = load_file(folder / WEIGHTS)
    values["lm_head.weight"][3, 4] = value
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(statex.UserError, match=r"lm_head.weight has 1 values that are infinite or NaN"):
        statex.load(folder)
    assert not statex.load(folder, check_finite=False).lm_head.weight.isfinite().all()


@pytest.fixture
def shards(tmp_path):
    make_gla().save_pretrained(tmp_path / "b", max_shard_size="20KB")
    make_gla().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    statex.load(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "place", ["../b/{}", "/{}", "./{}", "x/../{}", "", ".", "..", "a\0b", 3, None, ["{}"], "x.bin"]
)
def test_an_index_names_plain_files_only(shards, place):
    values = json.loads((shards / INDEX).read_text())
    name, file = next(iter(values["weight_map"].items()))
    if place == "/{}":
        place = str(shards) + "/{}"
    values["weight_map"][name] = place.format(file) if isinstance(place, str) else place
    (shards / INDEX).write_text(json.dumps(values))
    refused(shards, INDEX)


def test_an_index_says_what_its_files_hold(shards):
    values = json.loads((shards / INDEX).read_text())
    name, file = next(iter(values["weight_map"].items()))
    other = next(other for other in values["weight_map"].values() if other != file)
    values["weight_map"][name] = other
    (shards / INDEX).write_text(json.dumps(values))
    refused(shards, "model", str(shards / other))


def test_one_file_goes_before_an_index_as_in_transformers(folder):
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "none.safetensors"}}')
    assert statex.inspect(folder).num_parameters == statex.load(folder).num_parameters()


# plans


def plan_of(folder):
    (plan,) = json.loads((folder / CONFIG).read_text())["expansion"]
    return plan


def with_layer(plan, **changes):
    plan["layers"][0] |= changes


def grown_rows(plan):
    """The first tensor that grows, and its rows."""
    edits = plan["layers"][0]["tensors"]
    edit = next(edit for edit in edits if isinstance(edit["edit"], dict) and edit["before"] != edit["after"])
    return edit, edit["edit"]


PLANS = {
    "index 99": lambda plan: with_layer(plan, index=99),
    "index text": lambda plan: with_layer(plan, index=""),
    "index true": lambda plan: with_layer(plan, index=True),
    "index -1": lambda plan: with_layer(plan, index=-1),
    "other layer": lambda plan: with_layer(plan, index=1),
    "twice": lambda plan: plan["layers"].append(plan["layers"][0]),
    "no layers": lambda plan: plan.update(layers=[]),
    "init": lambda plan: plan.update(init="evil"),
    "other init": lambda plan: plan.update(init="reinit"),
    "kind": lambda plan: plan.update(kind="evil"),
    "other kind": lambda plan: plan.update(kind="reinitialize"),
    "factor -3": lambda plan: plan.update(factor=-3),
    "factor 0": lambda plan: plan.update(factor=0),
    "factor 2.0": lambda plan: plan.update(factor=2.0),
    "other factor": lambda plan: plan.update(factor=7),
    "huge factor": lambda plan: plan.update(factor=10**18),
    "rank 0": lambda plan: plan.update(rank=0),
    "huge rank": lambda plan: plan.update(rank=2**63 - 1),
    "other rank": lambda plan: plan.update(rank=5),
    "seed": lambda plan: plan.update(seed=-1),
    "model_type": lambda plan: plan.update(model_type="llama"),
    "num_heads 0": lambda plan: plan["layers"][0]["after"].update(num_heads=0),
    "after": lambda plan: plan["layers"][0]["after"].update(key_dim=3),
    "before": lambda plan: plan["layers"][0]["before"].update(value_dim=3),
    "unknown": lambda plan: plan["layers"][0]["before"].update(evil=3),
    "no tensors": lambda plan: with_layer(plan, tensors=[]),
    "a tensor less": lambda plan: plan["layers"][0]["tensors"].pop(),
    "a tensor twice": lambda plan: plan["layers"][0]["tensors"].append(plan["layers"][0]["tensors"][0]),
    "tensor before": lambda plan: plan["layers"][0]["tensors"][0].update(before=[1, 1]),
    "tensor after": lambda plan: plan["layers"][0]["tensors"][0].update(after=[1, 1]),
    "tensor name": lambda plan: plan["layers"][0]["tensors"][0].update(name="lm_head.weight"),
    "no edit": lambda plan: plan["layers"][0]["tensors"][0].update(edit=None),
    "other edit": lambda plan: plan["layers"][0]["tensors"][0].update(edit="grown"),
    "edit in words": lambda plan: plan["layers"][0]["tensors"][0].update(edit="fresh"),
    "kept though larger": lambda plan: grown_rows(plan)[0].update(edit="kept"),
    "other rows": lambda plan: grown_rows(plan)[1]["segments"][0].update(before=7),
    "rows of no tensor": lambda plan: grown_rows(plan)[1].update(dim=5),
    "no segments": lambda plan: grown_rows(plan)[1].update(segments=[]),
    "fill": lambda plan: grown_rows(plan)[1]["segments"][0].update(fill="evil"),
    "noise": lambda plan: grown_rows(plan)[1]["segments"][0].update(noise=-1.0),
    "scale": lambda plan: grown_rows(plan)[1]["segments"][0].update(scale=0.0),
    "order": lambda plan: grown_rows(plan)[1]["segments"][0].update(order=[0, 0]),
    "version": lambda plan: plan.update(version="1"),
}


@pytest.mark.parametrize("folder", ["expanded", "expanded-mamba2"], indirect=True)
@pytest.mark.parametrize("name", PLANS)
def test_plans_that_are_not_the_model_s(folder, name):
    plan = plan_of(folder)
    PLANS[name](plan)
    change_json(folder / CONFIG, expansion=[plan])
    refused(folder, "" if name.startswith("other") else "expansion")  # the first thing that disagrees may be a tensor


@pytest.mark.parametrize("folder", ["expanded", "expanded-mamba2"], indirect=True)
def test_lists_of_plans_that_are_not_the_model_s(folder):
    plan = plan_of(folder)
    for plans in ([], [plan, plan], [plan, 3], [[plan]], {"plans": [plan]}, plan):
        change_json(folder / CONFIG, expansion=plans)
        refused(folder, "expansion")


def test_a_plan_of_an_expansion_in_a_model_that_has_none(good, tmp_path):
    for plain, expanded in (("gla", "expanded"), ("mamba2", "expanded-mamba2")):
        folder = shutil.copytree(good / plain, tmp_path / plain)
        change_json(folder / CONFIG, expansion=[plan_of(good / expanded)])
        with pytest.raises(statex.UserError):
            statex.inspect(folder)


def test_plans_stay_what_they_were(good):
    for name in ("expanded", "expanded-mamba2"):
        assert load_config(good / name).expansion == [plan_of(good / name)]


# tokenizers, and what is given by hand


@pytest.fixture
def with_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    assert len(load_tokenizer(folder)) == 48
    return folder


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["null", "[]", "3", "{", '{"a": 1}', "[" * 50_000, '{"model": {"type": "BPE"}}'])
def test_tokenizers_that_cannot_be_read(with_tokenizer, file, text):
    (with_tokenizer / file).write_text(text)
    if file == "tokenizer_config.json" and text.startswith("{") and text.endswith("}"):
        load_tokenizer(with_tokenizer)  # it is only less than it was
    else:
        refused(with_tokenizer, "model", calls=[load_tokenizer])


@pytest.mark.parametrize("highest", [48, 10**9])
def test_a_tokenizer_with_more_ids_than_the_model(with_tokenizer, highest):
    values = json.loads((with_tokenizer / "tokenizer.json").read_text())
    values["model"]["vocab"]["w47"] = highest
    (with_tokenizer / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(statex.UserError, match=f"ids up to {highest}, but the model has only 48 embeddings"):
        load_tokenizer(with_tokenizer)


@pytest.mark.parametrize("name", ["", "a\0b", "a//b", "x" * 5000, "\udcff", "../", "a b"])
def test_names_of_no_model(name):
    for call in CALLS:
        with pytest.raises(statex.UserError) as caught:
            call(name)
        assert caught.value.field == "model"


def test_a_dtype_that_does_not_exist(folder):
    with pytest.raises(statex.UserError, match="dtype = 'nonsense'"):
        statex.load(folder, dtype="nonsense")


def test_nothing_of_this_refuses_a_whole_folder(good):
    for folder in sorted(good.iterdir()):
        model = statex.load(folder).eval()
        assert logits(model, tokens()).isfinite().all()
