"""From a run's folder to report.html (one file, no network) and report.md with figures/ beside it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from statex.reporting.render import html, markdown
from statex.reporting.render.content import Document
from statex.reporting.run import Run, is_evaluation, read_evaluations, read_run
from statex.reporting.sections.cost import cost_section, devices, origin_section, recipe_section, state_section
from statex.reporting.sections.diagnosis import diagnosis_section
from statex.reporting.sections.needles import long_context_section
from statex.reporting.sections.opening import aims_section, summary_section, verdict_section
from statex.reporting.sections.quality import (
    icl_section,
    not_run_section,
    other_section,
    paired_section,
    recall_section,
    text_section,
)
from statex.reporting.wording import listing
from statex.results.record import NOT_RUN_FILE, SETTINGS_FILES
from statex.utils.atomic import write_text_atomic
from statex.utils.markup import literal


def write_report(folder: Path, output: Path | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md about a run, or about one evaluated model; returns their paths.

    Args:
        folder: the run's.
        output: where to write them, with copies of the run's recipe and results, from which the page can be written
            again; default: into `folder`.

    Raises:
        UserError: the folder has no recipe.toml or no results.jsonl.
    """
    folder = Path(folder)
    report = document(read_evaluations([folder]) if is_evaluation(folder) else read_run(folder))
    if output is None or Path(output).resolve() == folder.resolve():
        return _write([report], folder)
    Path(output).mkdir(parents=True, exist_ok=True)
    for name in ("recipe.toml", "results.jsonl", NOT_RUN_FILE, *SETTINGS_FILES):
        if (folder / name).is_file():
            write_text_atomic(Path(output) / name, (folder / name).read_text(encoding="utf-8"))
    return _write([report], Path(output))


def write_comparison(folders: Sequence[Path], output: Path) -> tuple[Path, Path]:
    """Write one report of several runs, a part for each, into the folder `output`; returns the paths.

    Models that were only evaluated share one part, side by side.

    Raises:
        UserError: one of the folders has no recipe.toml or no results.jsonl.
    """
    folders = [Path(folder) for folder in folders]
    evaluated = [folder for folder in folders if is_evaluation(folder)]
    runs = [read_run(folder) for folder in folders if folder not in evaluated]
    if evaluated:
        runs.append(read_evaluations(evaluated))
    documents = [document(run) for run in runs]
    Path(output).mkdir(parents=True, exist_ok=True)
    return _write(documents, Path(output))


def document(run: Run) -> Document:
    """The report of a run, before it becomes a page."""
    own_sections = (recall_section, text_section, long_context_section, icl_section, other_section, not_run_section)
    quality = [section(run) for section in own_sections]
    origin = [origin_section(run), recipe_section(run)]
    if run.evaluation_only:
        sections = [summary_section(run), *quality, cost_section(run), *origin]
        subtitle = f"Evaluated as they are, without training: {listing(run.arms(run.models[0]))}; {_devices(run)}"
    else:
        conclusions = [verdict_section(run), aims_section(run), diagnosis_section(run)]
        sections = [*conclusions, *quality, state_section(run), cost_section(run), paired_section(run), *origin]
        subtitle = _subtitle(run)
    return Document(run.recipe.name, subtitle, [section for section in sections if section is not None])


def _subtitle(run: Run) -> str:
    arms = dict.fromkeys(arm for model in run.models for arm in run.arms(model))
    seeds = f"seed{'s' if len(run.recipe.seeds) > 1 else ''} {listing([str(seed) for seed in run.recipe.seeds])}"
    return f"{listing(run.models)}; arms {listing(list(arms))}; {seeds}; {_devices(run)}"


def _devices(run: Run) -> str:
    return literal(listing(devices(run))) or "no device named"


def _write(documents: list[Document], folder: Path) -> tuple[Path, Path]:
    """Write page, Markdown and pictures under other names first, so that a reader never sees a partial report."""
    drawings = folder / "figures"
    fresh = folder / ".figures.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name, svg in markdown.picture_files(documents).items():
        (fresh / name).write_text(svg, encoding="utf-8")
    shutil.rmtree(drawings, ignore_errors=True)
    os.replace(fresh, drawings)
    pages = {"report.html": html.page(documents), "report.md": markdown.page(documents)}
    for name, text in pages.items():
        write_text_atomic(folder / name, text)
    return folder / "report.html", folder / "report.md"
