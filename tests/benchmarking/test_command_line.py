"""The benchmarks as a user starts them: processes of their own, in which nothing else has made our models known."""

import json

from commands import run_each
from tiny_recipe import environment


def test_cases_of_our_own_models():
    # generating code takes a minute; tests/training compiles
    variables = environment() | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    cases = {"model": "gla-1.3b-read", "training": "gla-45m-2k"}
    changed = {"training": ["--set", "training.precision=bf16", "--set", "training.residual_precision=bf16"]}
    commands = (["bench", what, "--case", case, *changed.get(what, []), "--json"] for what, case in cases.items())
    for done in run_each(*commands, env=variables):
        assert done.returncode == 0, done.stderr
        records = json.loads(done.stdout)
        assert {record["case"] for record in records} == {cases[done.args[1]]}
        assert all(record["losses_differ"] < 1e-5 for record in records if done.args[1] == "training")
        assert all(record["changes"] for record in records if done.args[1] == "training")
