"""No code of a model folder runs, whatever it holds and whatever is typed."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import statex
from common import make_gla, make_mamba2
from tiny_recipe import environment

SOURCE = Path(statex.__file__).parent
CODE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nclass Evil: pass\n"
LOAD = """
import sys
import statex
from statex.checkpoint import load_tokenizer
for folder in sys.argv[1:]:
    for call in (statex.inspect, statex.load, load_tokenizer):
        try:
            call(folder)
        except statex.UserError as error:
            print(error)
"""


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            yield node


def test_every_call_says_that_no_code_is_to_be_run():
    found = 0
    for path in SOURCE.rglob("*.py"):
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            found += 1
            stated = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert stated.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
    assert found >= 3


def test_code_in_a_folder_is_not_run_though_y_is_typed(tmp_path):
    """For each file that can name code: its classes are transformers' own names and names that nobody knows."""
    from statex.data.tokenizer import train_tokenizer
    from statex.settings import Data
    from tiny_recipe import data_values, write_text

    mark = tmp_path / "ran"
    data = Data.model_validate(data_values(write_text(tmp_path)))
    tokenizer = train_tokenizer(data.text, data.tokenizer, data.recall)
    folders = {tmp_path / "gla": make_gla(), tmp_path / "mamba2": make_mamba2()}
    for folder, model in folders.items():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        name_code(folder, CODE.format(mark=str(mark)))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], input="y\n" * 18, capture_output=True, text=True, timeout=120,
        env=environment() | {"HF_MODULES_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), done.stdout
    assert "Do you wish to run" not in done.stdout + done.stderr


def name_code(folder, code):
    (folder / "evil.py").write_text(code)
    shutil.copyfile(folder / "evil.py", folder / "modeling_statex.py")
    for name, more in (
        ("config.json", {}),
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
        ("generation_config.json", {"custom_generate": "."}),
    ):
        values = json.loads((folder / name).read_text())
        auto = ["AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"]
        values["auto_map"] = {each: ["evil.Evil", "evil.Evil"] if "Token" in each else "evil.Evil" for each in auto}
        (folder / name).write_text(json.dumps(values | more))
