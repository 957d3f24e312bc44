"""Which part of statex may import which, and what `import statex` costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import statex
from statex.models import factory

SOURCE = Path(statex.__file__).parent
PARTS = sorted(
    {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    | {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
)

ALLOWED = {  # besides "errors" and "utils", which all but the first and "ops" may import
    "errors": set(),
    "utils": set(),
    "ops": set(),
    "families": {"ops"},
    "expansion": {"families"},
    "models": {"expansion", "families", "ops"},
    "checkpoint": {"expansion", "families", "models"},
    "results": set(),
    "settings": set(),
    "recipe": {"settings", "expansion.config", "results", "evaluation.suites"},
    "data": {"settings", "recipe"},
    "training": {"settings", "recipe", "data", "ops", "expansion", "families", "models", "checkpoint"},
    "evaluation": {"settings", "recipe", "results", "data", "ops", "expansion", "families", "models", "checkpoint"},
    "benchmarking": {
        "results", "ops", "expansion", "families", "models", "checkpoint", "training", "recipe", "settings", "data",
    },
    "reporting": {"recipe", "results"},
}  # fmt: skip
MAY_IMPORT_ALL = {"cli", "run"}
HEAVY = {"fla", "lm_eval", "matplotlib", "datasets"}


def imported(path):
    """Every module that a file imports, at its top or inside a function, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(part):
    return [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).rglob("*.py"))


def other_parts(part):
    """(file, module inside statex) of every import from another part."""
    for path in files(part):
        for name in imported(path):
            inside = name.removeprefix("statex.")
            if name.startswith("statex.") and inside.split(".")[0] != part:
                yield path.relative_to(SOURCE), inside


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part):
    if part in MAY_IMPORT_ALL:
        return
    assert part in ALLOWED, f"{part} is a new part: say in ALLOWED what it may import"
    leaves = set() if part in ("errors", "ops") else {"errors", "utils"}
    wrong = [
        f"{path} imports statex.{name}"
        for path, name in other_parts(part)
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[part] | leaves)
    ]
    assert wrong == []


def test_nothing_imports_what_may_import_all():
    wrong = [
        f"{path} imports statex.{name}"
        for part in PARTS
        if part not in MAY_IMPORT_ALL
        for path, name in other_parts(part)
        if name.split(".")[0] in MAY_IMPORT_ALL
    ]
    assert wrong == []


def modules():
    """The name of every module in statex, with its path."""
    names = ((path.relative_to(SOURCE.parent).with_suffix("").parts, path) for path in SOURCE.rglob("*.py"))
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in names}


def test_no_module_imports_itself_by_way_of_others_not_even_inside_a_function():
    known = modules()
    imports = {
        module: {
            name if name in known else name.rpartition(".")[0]
            for name in imported(path)
            if name in known or name.rpartition(".")[0] in known
        }
        - {module}
        for module, path in known.items()
    }
    while leaves := {module for module, others in imports.items() if not others}:
        imports = {module: others - leaves for module, others in imports.items() if module not in leaves}
    assert imports == {}, "these modules import one another, or import those that do"


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("ops", {"transformers"}),
        ("reporting", {"torch", "transformers"}),
        ("results", {"torch", "transformers"}),
        ("settings", {"torch", "transformers"}),
        ("recipe", {"torch", "transformers"}),
        ("errors", {"torch", "transformers"}),
    ],
)
def test_parts_that_do_without_a_library(part, forbidden):
    for path in files(part):
        found = {name.split(".")[0] for name in imported(path)} & forbidden
        assert not found, f"{path} imports {found}"


def test_no_two_classes_share_a_name():
    """Of all parts but the two in which cases and tiles are of one kind each."""
    homes: dict[str, list[str]] = {}
    for part in set(PARTS) - {"benchmarking", "ops"}:
        for path in files(part):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(path.relative_to(SOURCE).as_posix())
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def imports_of_modules():
    """Module of statex -> the modules of statex that it imports, anywhere in it."""
    names = {path: ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    return {
        module: {
            known
            for name in imported(path)
            for known in (name.removeprefix("statex."), name.removeprefix("statex.").rpartition(".")[0])
            if name.startswith("statex.") and known in modules and known != module
        }
        for module, path in modules.items()
    }


def test_modules_of_evaluation_and_reporting_import_in_no_circle():
    """Lazily or not."""
    parts = ("evaluation", "reporting", "results", "recipe", "settings", "data")
    graph = {module: found for module, found in imports_of_modules().items() if module.split(".")[0] in parts}
    order: list[str] = []

    def visit(module, above):
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in order:
            for other in sorted(graph[module] & graph.keys()):
                visit(other, [*above, module])
            order.append(module)

    for module in graph:
        visit(module, [])


def test_one_door_to_each_foreign_library():
    """Both are extras, and slow to import."""
    doors = {"fla": ("benchmarking/peers", "models/fla"), "lm_eval": "evaluation/lm_eval"}
    for path in SOURCE.rglob("*.py"):
        for name in imported(path):
            library = name.split(".")[0]
            if library in doors:
                assert path.relative_to(SOURCE).as_posix().startswith(doors[library]), f"{path} imports {library}"


IMPORT = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import configuration_auto, modeling_auto

def tables():
    found = {name: dict(getattr(modeling_auto, name)) for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")}
    return found | {"configurations": dict(configuration_auto.CONFIG_MAPPING_NAMES)}

def added():
    models = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content
    configurations = configuration_auto.CONFIG_MAPPING._extra_content
    return {config.__name__: model.__name__ for config, model in models.items()}, sorted(configurations)

before = tables()
assert added() == ({}, []), added()
import statex
libraries = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1:]))
modules = sorted(name for name in sys.modules if name.startswith(("statex.families", "statex.models.gla")))
import statex.checkpoint, statex.models.expanded
found = {"libraries": libraries, "modules": modules}
print(json.dumps(found | {"same": tables() == before, "added": added()}))
"""


@pytest.fixture(scope="module")
def imported_after_transformers():
    command = [sys.executable, "-c", IMPORT, *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_importing_statex_imports_nothing_heavy(imported_after_transformers):
    assert imported_after_transformers["libraries"] == []
    assert imported_after_transformers["modules"] == []


TRANSFORMERS = [family for family in statex.FAMILIES.values() if family.library == "transformers"]
"""Another library's are found by name, but in no table: going through it would import the library."""


def test_importing_statex_changes_nothing_else_in_transformers_tables(imported_after_transformers):
    assert imported_after_transformers["same"]
    models, configurations = imported_after_transformers["added"]
    ours = {"GLAConfig": "GLAForCausalLM", "RWKV7Config": "RWKV7ForCausalLM"}
    ours["StatexXLSTMConfig"] = "StatexXLSTMForCausalLM"
    expected = ours | {
        factory.expanded_config_class(family).__name__: f"Statex{family.causal_lm_class.rpartition('.')[2]}"
        for family in TRANSFORMERS
        if not family.holds_plan
    }
    assert models == expected
    assert sorted(configurations) == sorted(
        f"statex_{family.model_type.removeprefix('statex_')}" for family in TRANSFORMERS
    )
