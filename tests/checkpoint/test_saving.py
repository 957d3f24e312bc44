"""Saving a changed model with its companions: whole or not at all."""

import os
import shutil

import pytest

import statex
from common import make_gla
from statex.checkpoint import save_with_companions
from statex.utils.atomic import check_new_folder, new_folder

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
    "pytorch_model.bin.index.json": "{}", "other.safetensors": "", "modeling_x.py": "", ".inside.lock": "process 1",
}  # fmt: skip


def test_companions_of_a_model_are_kept(tmp_path, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    model = make_gla()
    model.save_pretrained(source)
    for name, text in (COMPANIONS | NOT_COPIED).items():
        (source / name).write_text(text)
    statex.expand(model, layers=[0], factor=2)
    save_with_companions(model, source, out)
    for name, text in COMPANIONS.items():
        assert (out / name).read_text() == text
    assert "the tokenizer was copied as it is" in caplog.text  # it cannot be read
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


def test_chat_templates_beside_the_first_are_kept(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = make_gla()
    model.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "additional_chat_templates" / "run.py").write_text("evil")
    save_with_companions(model, source, out)
    templates = out / "additional_chat_templates"
    assert [path.name for path in templates.iterdir()] == ["tools.jinja"]
    assert (templates / "tools.jinja").read_text() == "{{ tools }}"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, caplog):
    source, out, secrets = tmp_path / "source", tmp_path / "out", tmp_path / "secrets"
    model = make_gla()
    model.save_pretrained(source)
    secrets.mkdir()
    (secrets / "key.jinja").write_text("secret")
    (source / "vocab.txt").write_text("own")
    (source / "chat_template.jinja").symlink_to(secrets / "key.jinja")
    (source / "vocab.json").symlink_to("../secrets/key.jinja")
    (source / "inside.txt").symlink_to("vocab.txt")
    (source / "additional_chat_templates").symlink_to(secrets)
    (source / "nowhere.txt").symlink_to("none")
    save_with_companions(model, source, out)
    assert "secret" not in "".join(path.read_text() for path in out.rglob("*") if path.suffix != ".safetensors")
    assert (out / "inside.txt").read_text() == "own"
    assert "chat_template.jinja is a link to a file outside the model's folder and was not copied" in caplog.text
    assert not [path for path in out.iterdir() if path.is_symlink()]


def test_links_into_the_cache_of_the_hub_are_the_model_s_own(tmp_path):
    """There a snapshot is links to blobs/ beside it."""
    repository, out = tmp_path / "models--a--b", tmp_path / "out"
    source, blobs = repository / "snapshots" / "0123", repository / "blobs"
    model = make_gla()
    model.save_pretrained(source)
    blobs.mkdir()
    (blobs / "45").write_text("a b")
    (source / "vocab.txt").symlink_to("../../blobs/45")
    save_with_companions(model, source, out)
    assert (out / "vocab.txt").read_text() == "a b"


IMPOSSIBLE = ["a\0b", "x" * 252, "x" * 300, "file/out", "file/deep/out", "none/" + "x" * 300, "\udcff\0", "link", "."]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_folders_that_cannot_be_made(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for call in (check_new_folder, lambda out: new_folder(out).__enter__()):
        with pytest.raises(statex.UserError, match=r"OUT = .*(cannot be made|exists already)"):
            call(f"{tmp_path}/{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_where_nothing_may_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(statex.UserError, match="no permission"):
        check_new_folder(tmp_path / "out")


def test_folders_that_can_be_made(tmp_path):
    for name in ("out", "deep/er/out", "x" * 250, "ü"):
        check_new_folder(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
