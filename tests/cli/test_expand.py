"""statex expand: what it writes, and what it refuses before it writes."""

import json
from pathlib import Path

import pytest
from calls import nothing_new


def test_expand(call, models, tmp_path):
    for family, folder in models.items():
        out = tmp_path / family
        status, output, _ = call("expand", folder, out, "--every", "2", "--factor", "2", "--init", "preserve", "--json")
        assert status == 0
        written = json.loads(output)
        assert written["out"] == str(out)
        assert [layer["index"] for layer in written["plan"]["layers"]] == [0]
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        status, output, _ = call("inspect", out, "--json")
        assert json.loads(output)["state"] == written["state"]
    status, output, _ = call("expand", folder, tmp_path / "again", "--layers", "0,1")
    assert status == 0
    assert f"written to {tmp_path / 'again'}" in output


def test_a_dry_run_reads_no_weights_and_writes_nothing(call, gla, tmp_path, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_weights)
    monkeypatch.setattr("statex.checkpoint.load", no_weights)
    status, output, _ = call("expand", gla, tmp_path / "out", "--preset", "paper-gla", "--dry-run")
    assert status == 0
    assert "layer 0: 2 x (4 x 8) -> 1 x (8 x 16)" in output
    status, output, _ = call("expand", gla, tmp_path / "out", "--num-layers", "1", "--dry-run", "--json")
    assert json.loads(output)["init"] == "reinit"
    assert nothing_new(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--preset", "paper"],
            "--preset = 'paper': is unknown; known presets: paper-gla, paper-mamba2, paper-mamba2-code",
        ),
        (["--preset", "paper-gla", "--every", "2"], "--preset = 'paper-gla': excludes every; give the preset or the"),
        (["--layers", "0,x"], "--layers = '0,x': is not a list of numbers; write for example 0,6,12,18"),
        (["--layers", "0,5"], "layers = 5: is not a recurrent layer of this model; the recurrent layers are 0-1"),
        (["--every", "1", "--layers", "0"], "layers and every exclude one another; give one of them"),
        (["--every", "0"], "every = 0: Input should be greater than or equal to 1"),
        (["--num-layers", "3"], "num_layers = 3: is more than the model has"),
        (["--factor", "1"], "factor = 1: Input should be greater than or equal to 2"),
        (["--factor", "3"], "factor = 3: "),
        (["--init", "inherit", "--rank", "4"], 'rank goes only with init = "preserve"; drop rank or change init'),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_expand_refuses(call, gla, tmp_path, options, message, dry_run):
    status, output, errors = call("expand", gla, tmp_path / "out", *options, *dry_run, "--json")
    assert (status, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert nothing_new(tmp_path)


def test_expand_leaves_what_exists(call, gla, tmp_path):
    (tmp_path / "out").mkdir()
    status, _, errors = call("expand", gla, tmp_path / "out")
    assert status == 2
    assert f"OUT = '{tmp_path / 'out'}': exists already; choose another folder or remove this one" in errors
    assert nothing_new(tmp_path / "out")


@pytest.mark.parametrize("out", ["x" * 300, "file/out", "none/" + "x" * 300])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_expand_refuses_an_impossible_out_before_it_loads(call, gla, tmp_path, monkeypatch, out, dry_run):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("statex.checkpoint.load", None)
    monkeypatch.setattr("statex.checkpoint.load_config", None)
    status, output, errors = call("expand", gla, f"{tmp_path}/{out}", *dry_run)
    assert (status, output) == (2, "")
    assert "OUT = " in errors
    assert "cannot be made" in errors
    assert nothing_new(tmp_path, "file")


def test_expanding_twice(call, gla, tmp_path):
    assert call("expand", gla, tmp_path / "once")[0] == 0
    status, _, errors = call("expand", tmp_path / "once", tmp_path / "twice")
    assert status == 2
    assert "was expanded before and cannot be expanded again" in errors
    assert "leaves no heads to merge" in errors
    assert nothing_new(tmp_path, "once")
    assert call("expand", tmp_path / "once", tmp_path / "twice", "--init", "preserve", "--factor", "2")[0] == 0
    status, output, _ = call("inspect", tmp_path / "twice")
    assert "expand, init reinit, factor 2, then expand, init preserve, factor 2" in output
    assert "### Step 2" in (tmp_path / "twice" / "README.md").read_text()


def test_a_full_disk_is_a_failure_that_leaves_nothing(call, gla, tmp_path, monkeypatch):
    def full(self, folder, *args, **kwargs):
        Path(folder, "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    status, output, errors = call("expand", gla, tmp_path / "out", "--json")
    assert (status, output) == (1, "")
    message = f"statex: no space left in {tmp_path / 'out'}; free some space, then the same command resumes"
    assert errors.splitlines()[-1] == message
    assert "Traceback" not in errors
    assert nothing_new(tmp_path)
