"""Model folders damaged in every way that we could think of, and what must become of each.

A damaged folder is accepted, and then inspected, loaded and run, or it is a UserError; nothing is written.
"""

import hashlib
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import statex
from common import VOCABULARY, Case, make_gla, make_mamba2
from statex.checkpoint import load_config, load_tokenizer
from statex.expansion.stored import stored_plan

RAW = "@raw@"
"""Text that begins with it stands in the file without its quotes: what no JSON library would write."""
ODD_TEXTS = ["", "null", "[]", "3", '"x"', "{", "{}", "\ufeff{}", "[" * 50_000 + "]" * 50_000, "NaN", "\0", "\xff"]
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, -(2**31), 2**31, 2**63, 10**6, 10**7, 10**8, 10**9, 10**12, 10**30, 9 * 10**18,
    0.0, 0.5, -1.0, 9e18, 1e308, 1e-320, math.nan, math.inf, -math.inf, "", "x", "nonsense", "\0", "\ud800", "a\nb",
    "../b", "/etc/passwd", "float16", "float32", "int8", "gelu", "silu", "swish", "relu", "expand",
    "preserve", "reinit",
    [], {}, [1], [None], [0.0, 1.0], [1.0, 0.0], {"a": 1}, {"0": "a"}, {"model_type": "llama"},
    RAW + "9" * 5000, RAW + "[" * 50_000 + "]" * 50_000, RAW + "1e999",
]  # fmt: skip
KEYS_OF_TRANSFORMERS = [
    "num_labels", "id2label", "label2id", "dtype", "torch_dtype", "quantization_config", "text_config", "decoder",
    "per_layer_config", "attn_implementation", "_attn_implementation", "experts_implementation", "auto_map",
    "is_encoder_decoder", "return_dict", "output_hidden_states", "output_attentions", "use_return_dict", "problem_type",
    "layer_types", "to_dict", "get_text_config", "transformers_weights", "configuration_files", "architectures",
    "chunk_size_feed_forward", "name_or_path", "_name_or_path", "use_cache", "sub_configs", "rope_scaling",
    "rope_parameters", "rope_theta", "max_position_embeddings", "task_specific_params", "tokenizer_class", "key_dim",
    "base_model_tp_plan", "attribute_map", "model_type", "expansion", "hidden_act", "torchscript", "gguf_file",
    "tie_word_embeddings", "tie_encoder_decoder", "temperature", "max_length", "__class__", "_commit_hash",
]  # fmt: skip

values = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers(-4, 200),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.recursive(st.none() | st.integers(-3, 3), lambda inner: st.lists(inner, max_size=3), max_leaves=4),
)


def make_folders(root: Path) -> dict[str, Path]:
    """Whole folders of every shape that exists: both families, expanded, re-initialised, in shards, from FLA."""
    reinitialized = make_mamba2()
    statex.reinitialize(reinitialized, [0])
    made = {
        "gla": make_gla(num_heads=4, use_short_conv=True, tie_word_embeddings=True),
        "mamba2": make_mamba2(n_groups=2),
        "expanded-gla": Case("gla", "conv", "preserve", factor=2, rank=3).expanded(),
        "expanded-mamba2": Case("mamba2", "2-groups", "inherit", factor=2).expanded(),
        "reinitialized-mamba2": reinitialized,
        "shards": make_gla(),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = root / name
        model.save_pretrained(folders[name], max_shard_size="20KB" if name == "shards" else "1GB")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folders[name])
    folders["fla"] = root / "fla"
    model = make_gla()
    statex.export_fla(model, folders["fla"])
    return folders


@st.composite
def damages(draw: Any, folders: dict[str, Path]) -> tuple[str, list[tuple]]:
    """A folder's name and one to three changes of its files: (file, place, what to do, value)."""
    name = draw(st.sampled_from(sorted(folders)))
    folder = folders[name]
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    changes = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        file = draw(st.sampled_from(["config.json"] * 6 + files))
        if draw(st.integers(0, 14)) == 0:
            changes.append((file, None, draw(st.sampled_from(["text", "cut", "bytes", "gone"])), draw(file_damage)))
            continue
        tree = read_header(folder / file) if file.endswith(".safetensors") else json.loads((folder / file).read_text())
        place = draw(places(tree, KEYS_OF_TRANSFORMERS if file == "config.json" else ["x", "__metadata__"]))
        changes.append((file, place, draw(st.sampled_from(["set"] * 6 + ["remove", "twice"])), draw(values)))
    return name, changes


file_damage = st.tuples(st.sampled_from(ODD_TEXTS), st.floats(0, 1), st.integers(0, 255))


@st.composite
def places(draw: Any, tree: Any, more: list[str]) -> tuple:
    """A way down a tree of objects and lists, to any depth; at the top also keys that are not there."""
    keys = [*tree, *more] if not draw(st.booleans()) else list(tree)
    place = [draw(st.sampled_from(keys or ["x"]))]
    here = tree.get(place[0]) if isinstance(tree, dict) else None
    while isinstance(here, dict | list) and here and draw(st.integers(0, 3)):
        place.append(draw(st.sampled_from(sorted(here, key=str) if isinstance(here, dict) else range(len(here)))))
        here = here[place[-1]]
    return tuple(place)


def apply(changes: list[tuple], folder: Path) -> None:
    """Change the files of a folder."""
    for file, place, what, value in changes:
        path = folder / file
        if not path.exists():
            continue
        if place is None:
            damage_file(path, what, *value)
        elif path.suffix == ".json":
            try:
                tree = json.loads(path.read_text())
            except (ValueError, RecursionError):
                continue  # an earlier change left nothing to change
            change_tree(tree, place, what, value)
            path.write_bytes(as_text(tree).encode("utf-8", "surrogatepass"))
        else:
            data = path.read_bytes()
            if not (tree := read_header(path)):
                continue
            change_tree(tree, place, what, value)
            header = as_text(tree).encode("utf-8", "surrogatepass")
            length = struct.unpack("<Q", data[:8])[0]
            path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def change_tree(tree: Any, place: tuple, what: str, value: Any) -> None:
    """Set, remove or double what is at a place of a tree, if it is there."""
    here = tree
    for key in place[:-1]:
        try:
            here = here[key]
        except (KeyError, IndexError, TypeError):
            return
    key = place[-1]
    if isinstance(here, dict) and (what == "set" or key in here):
        if what == "set":
            here[key] = value
        elif what == "remove":
            del here[key]
        else:
            here[f"{key}_again"] = here[key]
    elif isinstance(here, list) and isinstance(key, int) and key < len(here):
        if what == "set":
            here[key] = value
        elif what == "remove":
            del here[key]
        else:
            here.append(here[key])


def damage_file(path: Path, what: str, text: str, share: float, byte: int) -> None:
    """Replace a whole file, cut it, change one byte of it, or remove it."""
    data = path.read_bytes()
    if what == "text":
        path.write_bytes(text.encode("latin-1") if text == "\xff" else text.encode())
    elif what == "cut":
        path.write_bytes(data[: int(share * len(data))])
    elif what == "bytes":
        place = int(share * (len(data) - 1))
        path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
    else:
        path.unlink()


def as_text(tree: Any) -> str:
    """JSON, with what stands behind RAW as it is."""

    def raw(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(RAW):
            return marks.setdefault(value, f"@{len(marks)}@")
        if isinstance(value, dict):
            return {key: raw(each) for key, each in value.items()}
        return [raw(each) for each in value] if isinstance(value, list | tuple) else value

    marks: dict[str, str] = {}
    text = json.dumps(raw(tree))
    for value, mark in marks.items():
        text = text.replace(f'"{mark}"', value.removeprefix(RAW))
    return text


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file as it stands, {} where it cannot be read."""
    data = path.read_bytes()
    try:
        return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))
    except (ValueError, RecursionError, TypeError, struct.error):
        return {}


def outcome(folder: Path) -> str:
    """What becomes of a folder: "accepted" (it was inspected, loaded and run), or which field was refused by what.

    Anything but a UserError comes through.
    """
    before = contents(folder)
    inspected = False
    try:
        statex.inspect(folder)
        inspected = True
        config = load_config(folder)
        loaded = statex.load(folder).eval()
        load_tokenizer(folder)
        with torch.no_grad(), statex.statex_ops():
            loaded(torch.arange(12)[None] % config.vocab_size, use_cache=False)
        if stored_plan(config) is None:
            statex.plan_expansion(config, statex.ExpansionConfig(every=1, factor=2, init="preserve"))
        found, message = "accepted", ""
    except statex.UserError as error:
        found, message = f"refused, {'by load alone' if inspected else 'by inspect'}", str(error)
    if not inspected:
        for call in (statex.load, load_config, load_tokenizer):
            assert_refused(call, folder)
    assert len(message) < 1500, message
    assert message.isprintable(), message
    assert contents(folder) == before, "something was written"
    return found


def assert_refused(call: Any, folder: Path) -> None:
    """What `inspect` refuses, another call refuses too."""
    has_tokenizer = (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
    if call is load_tokenizer and not has_tokenizer:
        return
    try:
        call(folder)
    except statex.UserError:
        return
    raise AssertionError(f"refused by inspect and not by {call.__name__}")


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder, and what is in them."""
    return {
        str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def try_damage(folders: dict[str, Path], damage: tuple[str, list[tuple]], place: Path) -> str:
    """Damage a copy of a folder under `place` and see what becomes of it; the copy is removed."""
    name, changes = damage
    copy = place / "model"
    shutil.copytree(folders[name], copy)
    try:
        apply(changes, copy)
        return outcome(copy)
    finally:
        shutil.rmtree(copy)
