"""Saving a changed model with its companions: whole or not at all."""

import shutil

import pytest

import statex
from common import make_gla
from statex.checkpoint import save_with_companions
from statex.files import new_folder

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def fail_half_way(out):
    with new_folder(out) as folder:
        (folder / "half").write_text("")
        raise RuntimeError("half-way")


def test_a_new_folder_is_whole_or_absent(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way(out)
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        assert not out.exists()
        (folder / "whole").write_text("")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(statex.UserError, match=r"OUT = .*exists already"), new_folder(out):
        pass
    assert [path.name for path in out.iterdir()] == ["whole"]


COMPANIONS = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "vocab.txt": "a",
    "generation_config.json": '{"max_new_tokens": 7}', "LICENSE": "free",
}  # fmt: skip
NOT_COPIED = {
    "README.md": "the card of the source", "pytorch_model.bin": "pickle", "optimizer.pt": "pickle",
    "scheduler.pt": "pickle", "rng_state.pth": "pickle", "training_args.bin": "pickle", "trainer_state.json": "{}",
    "pytorch_model.bin.index.json": "{}", "other.safetensors": "", "modeling_x.py": "",
}  # fmt: skip


def test_companions_of_a_model_are_kept(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = make_gla()
    model.save_pretrained(source)
    for name, text in (COMPANIONS | NOT_COPIED).items():
        (source / name).write_text(text)
    statex.expand(model, layers=[0], factor=2)
    save_with_companions(model, source, out)
    for name, text in COMPANIONS.items():
        assert (out / name).read_text() == text
    ours = {CONFIG, WEIGHTS, "modeling_statex.py", "README.md"}
    assert {path.name for path in out.iterdir()} == set(COMPANIONS) | ours
    assert "expanded" in (out / "README.md").read_text()
    with pytest.raises(statex.UserError, match="exists already"):
        save_with_companions(model, source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failure_while_saving_leaves_nothing(tmp_path, monkeypatch):
    model = make_gla()
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_with_companions(model, tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
