"""The command line: what each verb prints and writes, and its exit status: 0 done, 1 failure, 2 the user's mistake."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statex.cli import main
from statex.data.tokenizer import train_tokenizer
from statex.models.scratch import make_model
from statex.settings import Data
from statex.utils.atomic import working_in
from tiny_recipe import CONFIGS, EVALUATION, TRAINING, data_values, environment, write_recipe, write_text

VERBS = ["inspect", "expand", "train", "eval", "bench", "report", "run"]


@pytest.fixture
def call(monkeypatch, capsys):
    """call("inspect", "x"): exit status, standard output and standard error of a command in this process."""

    def call_main(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["statex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call_main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return Data.model_validate(data_values(write_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def models(data, tmp_path_factory) -> dict[str, Path]:
    """A folder of each family, with the same tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(data.text, data.tokenizer, data.recall)
    folders = {}
    for family, config in CONFIGS.items():
        folders[family] = tmp_path_factory.mktemp("models") / family
        make_model(family, config, tokenizer).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture
def gla(models) -> Path:
    return models["statex_gla"]


@pytest.fixture
def recipe(data, models, tmp_path) -> Path:
    """A recipe that only measures a checkpoint: all stages in a second."""
    values = {
        "name": "measured", "output": str(tmp_path / "runs"),
        "models": {"gla": {"checkpoint": str(models["statex_gla"])}},
        "arms": {"base": {"kind": "base"}}, "training": TRAINING, "data": data.model_dump(exclude_none=True),
        "evaluation": EVALUATION,
    }  # fmt: skip
    return write_recipe(tmp_path / "recipe.toml", values)


def nothing_new(folder: Path, *known: str) -> bool:
    return {path.name for path in folder.iterdir()} <= set(known)


def test_help_comes_at_once():
    """Without torch or transformers, which take seconds; counted in the processor's time, whatever else runs."""
    script = (
        "import sys, sysconfig, time\n"
        "sys.argv = [sysconfig.get_path('scripts') + '/statex', '--help']\n"
        "from statex.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "    print(end.code, round(time.process_time(), 2), *heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    status, seconds, *heavy = done.stderr.split()
    assert (status, heavy) == ("0", [])
    assert float(seconds) < 1
    assert all(verb in done.stdout for verb in VERBS)
    assert "statex run recipes/demo.toml" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(call, verb):
    status, output, _ = call(verb, "--help")
    assert status == 0
    assert f"Example: statex {verb}" in " ".join(output.replace("│", " ").split())


def test_nothing_asked_is_help(call):
    status, output, errors = call()
    assert status in (0, 2)  # 2 with newer versions of click
    assert "statex inspect MODEL" in output + errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"], ["inspect"], ["expand", "only-one"], ["expand", "a", "b", "--every", "two"],
        ["expand", "a", "b", "--init", "zero"], ["train", "r.toml", "--no-such-option"], ["bench", "everything"],
    ],
)  # fmt: skip
def test_what_typer_refuses_is_the_user_s_mistake(call, arguments):
    status, output, errors = call(*arguments)
    assert (status, output) == (2, "")
    assert "Usage: statex" in errors


# inspect


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


def test_inspect_of_what_is_no_model(call, tmp_path):
    for folder, message in ((tmp_path, "has no config.json"), (tmp_path / "none", "is no folder here")):
        status, output, errors = call("inspect", folder, "--json")
        assert (status, output) == (2, "")
        assert f"model = '{folder}': {message}" in errors


# expand


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
        (["--layers", "0,x"], "--layers = '0,x': is no list of numbers; write for example 0,6,12,18"),
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


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_the_start(call, gla, recipe, tmp_path):
    model = shutil.copytree(gla, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    token = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][token] += 1000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments in (
        ("eval", model, "--out", tmp_path / "out"),
        ("train", recipe, "--set", f'models.gla.checkpoint="{model}"'),
    ):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, ""), errors
        assert "its tokenizer has ids up to" in errors
    assert nothing_new(tmp_path, "model", "recipe.toml")


def test_expanding_twice(call, gla, tmp_path):
    assert call("expand", gla, tmp_path / "once")[0] == 0
    status, _, errors = call("expand", tmp_path / "once", tmp_path / "twice")
    assert status == 2
    assert "was expanded before and cannot be so again" in errors
    assert "leaves no heads to merge" in errors
    assert nothing_new(tmp_path, "once")
    assert call("expand", tmp_path / "once", tmp_path / "twice", "--init", "preserve", "--factor", "2")[0] == 0
    status, output, _ = call("inspect", tmp_path / "twice")
    assert "expand, init reinit, factor 2, then expand, init preserve, factor 2" in output
    assert "### Step 2" in (tmp_path / "twice" / "README.md").read_text()


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


def test_tokens_prepared_beforehand_are_those_that_the_run_reads(call, recipe, monkeypatch):
    """As far as the recipe reads; the run tokenises nothing."""
    train = ("--set", 'arms.lpt.kind="lpt"', "--set", "training.steps=2", "--set", "training.warmup_steps=0")
    status, output, errors = call("data", "prepare", recipe, *train, "--json")
    assert status == 0, errors
    found = json.loads(output)
    assert Path(found["gla"]["folder"]).parent == recipe.parent / "runs" / "tokens"
    assert found["gla"]["num_tokens"] > 0
    monkeypatch.setattr("statex.data.tokens._prepare", None)
    assert json.loads(call("data", "prepare", recipe, *train, "--json")[1]) == found
    status, _, errors = call("train", recipe, *train)
    assert status == 0, errors
    without_text = ("--set", 'name="mqar"', "--set", "training.weights={text=0, mqar=1}")
    status, output, errors = call("data", "prepare", recipe, *train, *without_text)
    assert status == 0, errors
    assert "its training reads no text" in " ".join(output.split())


def test_a_full_disk_is_a_failure_that_leaves_nothing(call, gla, tmp_path, monkeypatch):
    def full(self, folder, *args, **kwargs):
        Path(folder, "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    status, output, errors = call("expand", gla, tmp_path / "out", "--json")
    assert (status, output) == (1, "")
    message = f"statex: no space left in {tmp_path / 'out'}; make room, the same command resumes"
    assert errors.splitlines()[-1] == message
    assert "Traceback" not in errors
    assert nothing_new(tmp_path)


@pytest.mark.parametrize("verb", ["expand", "eval"])
def test_a_folder_that_another_process_works_in_is_refused(call, gla, tmp_path, verb):
    arguments = ("expand", gla, tmp_path / "out") if verb == "expand" else eval_arguments(gla, tmp_path / "out")
    with working_in(tmp_path / "out", "out"):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, "")
        assert f"= '{tmp_path / 'out'}': another process works in it" in errors
    assert nothing_new(tmp_path)
    assert call(*arguments)[0] == 0


# train and run


def test_run(call, recipe, tmp_path):
    folder = tmp_path / "runs" / "measured"
    status, output, errors = call("run", recipe, "--json")
    assert status == 0, errors
    assert json.loads(output) == {"folder": str(folder)}
    assert "evaluate base: mqar" in errors
    status, output, _ = call("run", recipe)
    assert status == 0
    assert f"report: {folder / 'report.html'}" in output
    assert "base" in output
    status, output, _ = call("train", recipe)
    assert (status, output) == (0, f"trained models in {folder}\n")
    status, output, _ = call("train", recipe, "--json")
    assert json.loads(output) == {"folder": str(folder)}
    status, output, errors = call("run", recipe, "--set", "training.steps=9", "--json")
    assert (status, output) == (2, "")
    assert "was made by another recipe (they differ in training.steps); give this run another name" in errors
    status, output, _ = call("report", folder, "--json")
    assert status == 0
    assert Path(json.loads(output)["html"]) == folder / "report.html"


def test_run_of_tasks_of_lm_eval(call, recipe, data, tmp_path, monkeypatch):
    """What lacked its data is said, and measured by a later call that finds it."""
    pytest.importorskip("lm_eval")
    import datasets

    from statex.results import read_results

    suites = ["--set", 'evaluation.suites=["mqar", "statex_trec_fine"]', "--set", "evaluation.harness.limit=2"]
    status, _, errors = call("run", recipe, *suites)
    assert status == 0, errors
    results = tmp_path / "runs" / "measured" / "results.jsonl"
    (missing,) = [row for row in read_results(results) if row.metric == "not_run"]
    assert [one["task"] for one in missing.details["tasks"]] == ["statex_trec_fine"]

    rows = [{"text": f"what is {number}?", "label": number} for number in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **options: {"train": rows, "test": rows})
    assert call("run", recipe, *suites)[0] == 0
    found = read_results(results)
    assert {row.slice["shots"] for row in found if row.suite == "statex_trec_fine"} == {16, 64, 256, 512}
    assert not [row for row in found if row.metric == "not_run"]


@pytest.mark.parametrize("verb", ["train", "run"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", "training.stepz = 5: is not a known key; remove it or correct its spelling."),
        ("training.steps=many", "training.steps = 'many': Input should be a valid integer"),
        ("steps", "--set = 'steps': is not of the form section.key=value"),
        ('data.text.files=["none/*.txt"]', "none/*.txt': no file matches; give a path or a glob of files."),
        ("arms.base.kind=lpt training={sequence_length=1000000,tokens_per_step=1000000}", "is longer than the whole"),
        ('evaluation.suites=["mqra"]', "evaluation.suites = 'mqra': is not a suite; known suites:"),
        ('models.gla.checkpoint="/none"', "is no folder here, and the hub gave none"),
    ],
)
def test_mistakes_in_a_recipe(call, recipe, tmp_path, verb, override, message):
    overrides = [part for text in override.split() for part in ("--set", text)]
    status, output, errors = call(verb, recipe, *overrides, "--json")
    assert (status, output) == (2, ""), errors
    assert message in errors
    assert "Traceback" not in errors
    assert nothing_new(tmp_path, "recipe.toml")


def test_a_recipe_that_is_not_there(call, tmp_path):
    status, _, errors = call("run", tmp_path / "none.toml")
    assert status == 2
    assert "there is no such file; give the path of a TOML recipe" in errors


def test_a_part_of_a_recipe_is_run_and_the_last_part_writes_the_report(call, recipe, tmp_path):
    text = recipe.read_text().replace("[arms.base]", "[arms.again]\nkind = 'base'\n[arms.base]")
    recipe.write_text(text)
    folder = tmp_path / "runs" / "measured"
    status, output, _ = call("run", recipe, "--arm", "base", "--model", "gla", "--seed", "0")
    assert (status, output) == (
        0, f"no report yet: 1 stages of other selections are not finished in {folder}\n",
    )  # fmt: skip
    assert not (folder / "report.html").exists()
    assert not (folder / "gla" / "again-seed0").exists()
    status, output, errors = call("run", recipe, "--arm", "x")
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1] == "statex: --arm = 'x': is no arm of this recipe; known: again, base."
    status, output, _ = call("run", recipe, "--arm", "again")
    assert output.startswith(f"report: {folder / 'report.html'}\n")
    assert status == 0


FULL = "statex: no space left in runs/x; make room, the same command resumes"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "runs"), 1, "statex: [Errno 13] Permission denied: 'runs'"),
        (FloatingPointError("the loss is nan"), 1, "statex: the loss is nan"),
        (KeyboardInterrupt(), 1, "statex: stopped; the same command resumes"),
        (OSError(28, "No space left on device", "runs/x"), 1, FULL),
        (OSError(28, "unexpected pos 12800 vs 12692", "runs/x"), 1, f"{FULL} (unexpected pos 12800 vs 12692)"),
    ],
)
def test_failures(call, recipe, monkeypatch, error, status, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("statex.run.run_recipe", fail)
    found, output, errors = call("run", recipe, "--json")
    assert (found, output) == (status, "")
    start, end = errors.splitlines()
    assert start.startswith("statex 0.")
    assert "tested: " in start
    assert end == message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_stops_as_the_keyboard_does(call, recipe, monkeypatch, number, rank):
    """Under torchrun one process says so."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("statex.run.run_recipe", lambda *args, **kwargs: signal.raise_signal(number))
    before = signal.getsignal(number)
    status, output, errors = call("run", recipe, "--json")
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1:] == (["statex: stopped; the same command resumes"] if rank == 0 else [])
    assert signal.getsignal(number) is before


def test_what_breaks_because_of_a_signal_is_no_error_of_ours(call, recipe, monkeypatch):
    """The handler's exception may be lost where another, of a peer that stopped as well, is on its way."""

    def fail(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("Connection closed by peer") from None

    monkeypatch.setattr("statex.run.run_recipe", fail)
    status, _, errors = call("run", recipe)
    assert (status, errors.splitlines()[-1]) == (1, "statex: stopped; the same command resumes")


def test_a_signal_that_is_ignored_stays_so(call, recipe, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("statex.run.run_recipe", lambda *args, **kwargs: signal.raise_signal(signal.SIGHUP))
        status, _, errors = call("train", recipe)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopped" not in errors
    assert status == 0


def test_our_own_errors_are_not_hidden(recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("ours")

    monkeypatch.setattr("statex.run.run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["statex", "run", str(recipe)])
    with pytest.raises(AssertionError, match="ours"):
        main()


# eval


SMALL_MQAR = [
    f"evaluation.mqar.{setting}" for setting in ("num_pairs=[2,4]", "num_keys=8", "num_values=8", "num_items=4")
]


def eval_arguments(model: Path, out: Path, *overrides: str) -> list[str | Path]:
    settings = [part for override in (*SMALL_MQAR, *overrides) for part in ("--set", override)]
    return ["eval", model, "--suite", "mqar", "--out", out, *settings]


def test_eval(call, gla, tmp_path):
    status, output, errors = call(*eval_arguments(gla, tmp_path / "out"), "--json")
    assert status == 0, errors
    written = json.loads(output)
    rows = written["results"]
    assert written["not_run"] == []
    assert {row["slice"]["num_pairs"] for row in rows} == {2, 4}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(rows)
    status, output, _ = call(*eval_arguments(gla, tmp_path / "out"))
    assert status == 0
    assert "accuracy" in output


def test_eval_in_another_dtype_which_the_results_name(call, gla, tmp_path):
    for dtype in ("float32", "bfloat16"):
        arguments = eval_arguments(gla, tmp_path / dtype, f"evaluation.dtype={dtype}")
        status, output, errors = call(*arguments, "--json")
        assert status == 0, errors
        assert {row["dtype"] for row in json.loads(output)["results"]} == {dtype}


def test_eval_of_no_suite_is_refused(call, gla, tmp_path):
    status, output, errors = call("eval", gla, "--out", tmp_path / "out", "--set", "evaluation.suites=[]")
    assert (status, output) == (2, "")
    assert "evaluation.suites = []: names nothing to measure; name a suite with --suite" in errors
    assert nothing_new(tmp_path)


def test_eval_of_another_suite_adds_to_what_is_there(call, gla, tmp_path):
    assert call(*eval_arguments(gla, tmp_path / "out"))[0] == 0
    before = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    arguments = eval_arguments(gla, tmp_path / "out")
    arguments[3] = "symbol_icl"
    assert call(*arguments)[0] == 0
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert rows[: len(before)] == before
    assert {json.loads(row)["suite"] for row in rows[len(before) :]} == {"symbol_icl"}


def test_help_of_eval_lists_what_can_be_measured(call):
    from statex.results.suites import HARNESS_GROUPS, SUITES, suite_groups

    _, output, _ = call("eval", "--help")
    words = set(output.replace(",", " ").replace(":", " ").replace(".", " ").split())
    assert {*SUITES, *suite_groups(), *HARNESS_GROUPS} <= words


def test_options_of_eval_are_keys_of_a_recipe():
    from statex.cli.options import evaluation_overrides
    from statex.recipe import evaluation_sections

    assert evaluation_overrides(None, None, None) == []
    overrides = evaluation_overrides(7, "512,1024", 3, Path("sets of ü"))
    settings = evaluation_sections(overrides, suites=["passkey"]).evaluation
    assert (settings.harness.limit, settings.batch_size, settings.harness.data) == (7, 3, "sets of ü")
    for section in (settings.harness, settings.passkey, settings.niah_single_3, settings.variable_tracking):
        assert section.lengths == [512, 1024]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "512;1024"], "--lengths = '512;1024': is no list of numbers; write for example"),
        (["--limit", "0"], "evaluation.harness.limit = 0: Input should be greater than or equal to 1"),
        (["--suite", "recal"], "evaluation.suites = 'recal': is not a suite; known suites: mqar"),
    ],
)
def test_eval_refuses_options(call, gla, tmp_path, options, message):
    status, output, errors = call("eval", gla, "--out", tmp_path / "out", *options, "--json")
    assert (status, output) == (2, "")
    assert message in errors
    assert nothing_new(tmp_path)


def test_eval_of_a_group_without_lm_eval(call, gla, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, output, errors = call("eval", gla, "--suite", "mqar", "--suite", "recall", "--out", tmp_path / "out")
    assert (status, output) == (2, "")
    assert "evaluation.suites = 'recall': needs lm-eval" in errors
    assert "install it with pip install 'statex[eval]'" in errors
    assert nothing_new(tmp_path)


def test_eval_of_tasks_whose_data_is_missing(call, gla, tmp_path):
    pytest.importorskip("lm_eval")
    arguments = [*eval_arguments(gla, tmp_path / "out"), "--suite", "statex_nq", "--suite", "statex_trec_fine"]
    status, output, errors = call(*arguments, "--json")
    assert status == 0, errors
    written = json.loads(output)
    assert {row["suite"] for row in written["results"]} == {"mqar"}
    missing = {one["task"]: one["command"] for one in written["not_run"]}
    assert list(missing) == ["statex_nq", "statex_trec_fine"]
    assert "load_dataset('SetFit/TREC-QC')" in missing["statex_trec_fine"]
    status, output, _ = call(*arguments)
    assert status == 0
    assert "not run: statex_nq (" in output
    assert f"\n    {missing['statex_nq']}\n" in output

    status, output, errors = call("eval", gla, "--suite", "statex_nq", "--out", tmp_path / "other", "--json")
    assert status == 1
    assert json.loads(output)["results"] == []
    assert "nothing could be run" in errors


def test_eval_of_tasks_beside_suites(call, gla, tmp_path):
    pytest.importorskip("lm_eval")
    arguments = [*eval_arguments(gla, tmp_path / "out"), "--suite", "statex_symbol_icl", "--limit", "2"]
    status, output, errors = call(*arguments, "--json")
    assert status == 0, errors
    rows = {row["suite"]: row for row in json.loads(output)["results"]}
    assert set(rows) == {"mqar", "statex_symbol_icl"}
    assert rows["statex_symbol_icl"]["low"] is not None
    assert rows["statex_symbol_icl"]["n"] == 2  # of each number of shots, seen and unseen
    assert "statex_symbol_icl" in errors  # progress
    written = (tmp_path / "out" / "items" / "statex_symbol_icl.jsonl").stat().st_mtime_ns
    status, output, _ = call(*arguments)
    assert status == 0
    assert "statex_symbol_icl" in output
    assert (tmp_path / "out" / "items" / "statex_symbol_icl.jsonl").stat().st_mtime_ns == written
    status, _, errors = call(*arguments[:-1], "3")
    assert status == 2
    assert "was made with another limit (2, now 3)" in errors


def test_eval_without_a_tokenizer(call, gla, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in gla.iterdir():
        if "token" not in path.name:
            (model / path.name).write_bytes(path.read_bytes())
    assert call(*eval_arguments(model, tmp_path / "out"))[0] == 0
    status, _, errors = call("eval", model, "--suite", "passkey", "--out", tmp_path / "other")
    assert status == 2
    assert "needs a tokenizer, and the model has none; give one, or drop this suite" in errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.mqar.num_pairs=[9]"], "evaluation.mqar.num_pairs = 9: does not fit num_keys and num_values"),
        (["evaluation.mqar.no_such=9"], "evaluation.mqar.no_such = 9: is not a known key"),
        (["training.steps=9"], "training = {'steps': 9}: is not a known key"),
        (['evaluation.text.files=["none/*"]', 'evaluation.suites=["nll_by_position"]'], "no file matches"),
    ],
)
def test_eval_refuses(call, gla, tmp_path, overrides, message):
    status, output, errors = call(*eval_arguments(gla, tmp_path / "out", *overrides), "--json")
    assert (status, output) == (2, "")
    assert message in errors


def test_eval_of_another_model_into_the_same_folder_is_refused(call, models, tmp_path):
    assert call(*eval_arguments(models["statex_gla"], tmp_path / "out"))[0] == 0
    status, _, errors = call(*eval_arguments(models["mamba2"], tmp_path / "out"))
    assert status == 2
    assert "choose another folder, or remove this one" in errors


def test_models_of_a_run_have_names_of_their_own():
    from statex.cli.options import model_name

    assert model_name("/models/gla-1.3B") == "gla-1.3B"
    assert model_name("/runs/demo/gla/lpt-seed0/trained") == "demo-gla-lpt-seed0-trained"


# report and bench


def test_report_of_what_is_no_run(call, tmp_path):
    status, _, errors = call("report", tmp_path / "none")
    assert status == 2
    assert str(tmp_path / "none") in errors
    assert nothing_new(tmp_path)


def test_bench(call, monkeypatch, tmp_path):
    asked = []

    def benchmark(name):
        return lambda **options: asked.append((name, options)) or [{"case": name}]

    monkeypatch.setattr("statex.benchmarking.run_ops_benchmark", benchmark("ops"))
    monkeypatch.setattr("statex.benchmarking.run_model_benchmark", benchmark("model"))
    status, output, _ = call("bench", "ops", "--case", "gla", "--case", "ssd", "--json")
    assert (status, json.loads(output)) == (0, [{"case": "ops"}])
    assert call("bench", "model", "--out", tmp_path)[0] == 0
    assert call("bench", "ops", "--sweep", "tokens", "--no-peers")[0] == 0
    assert asked == [
        ("ops", {"cases": ["gla", "ssd"], "out": None, "sweep": None, "peers": None}),
        ("model", {"cases": None, "out": tmp_path}),
        ("ops", {"cases": None, "out": None, "sweep": "tokens", "peers": False}),
    ]


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_bench_refuses_a_folder_that_cannot_be_before_it_measures(call, monkeypatch, tmp_path, name):
    monkeypatch.setattr("statex.benchmarking.run_ops_benchmark", lambda **options: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    status, _, errors = call("bench", "ops", "--out", tmp_path / name)
    assert status == 2
    assert f"--out = '{tmp_path / name}'" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bench_draws_a_sweep(call, tmp_path):
    case = ["--case", "ssd-64x64-n512-1k", "--case", "ssd-64x64-n512-4k"]
    status, output, _ = call("bench", "ops", "--sweep", "tokens", *case, "--out", tmp_path)
    figure = tmp_path / "ops-tokens.svg"
    assert (status, output.strip()) == (0, str(figure))
    drawn = figure.read_text()
    figure.unlink()
    status, output, _ = call("bench", "ops", "--redraw", tmp_path / "ops-tokens.json", "--json")
    assert (status, json.loads(output)) == (0, {"figure": str(figure)})
    assert figure.read_text() == drawn


@pytest.mark.parametrize("options", [["--sweep", "state"], ["--no-peers"], ["--redraw", "ops-state.json"]])
def test_bench_of_models_has_no_sweep(call, options):
    status, _, errors = call("bench", "model", *options)
    assert status == 2
    assert "use `statex bench ops`" in errors
