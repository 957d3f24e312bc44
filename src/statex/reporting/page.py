"""From a run's folder to report.html (one file, no network) and report.md with figures/ beside it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from statex.files import write_whole
from statex.reporting import html, markdown
from statex.reporting.content import Block, Cell, Column, Document, Section, Table, Text
from statex.reporting.cost import cost_section, devices, origin_section, recipe_section, state_section
from statex.reporting.diagnosis import diagnosis_section
from statex.reporting.needles import long_context_section
from statex.reporting.quality import (
    icl_section,
    not_run_section,
    nothing_measured,
    other_section,
    paired_section,
    recall_section,
    text_section,
)
from statex.reporting.run import Run, is_evaluation, read_evaluations, read_run
from statex.reporting.tables import by_arm
from statex.reporting.verdict import TEXT_MARGIN, Verdict, hardest_recall, text_measure, verdict
from statex.reporting.wording import listing, suite_measure_title


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into the folder of a run, or of one evaluated model; returns their paths.

    Raises:
        UserError: the folder has no recipe.toml or no results.jsonl.
    """
    folder = Path(folder)
    return _write([document(read_evaluations([folder]) if is_evaluation(folder) else read_run(folder))], folder)


def write_comparison(folders: Sequence[Path], output: Path) -> tuple[Path, Path]:
    """Write one report of several runs, a part for each, into the folder `output`; returns the paths.

    Models that were only evaluated are one part, side by side.

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
        conclusions = [verdict_section(run), diagnosis_section(run)]
        sections = [*conclusions, *quality, state_section(run), cost_section(run), paired_section(run), *origin]
        subtitle = _subtitle(run)
    return Document(run.recipe.name, subtitle, [section for section in sections if section is not None])


def _subtitle(run: Run) -> str:
    arms = dict.fromkeys(arm for model in run.models for arm in run.arms(model))
    seeds = f"seed{'s' if len(run.recipe.seeds) > 1 else ''} {listing([str(seed) for seed in run.recipe.seeds])}"
    return f"{listing(run.models)}; arms {listing(list(arms))}; {seeds}; {_devices(run)}"


def _devices(run: Run) -> str:
    return listing(devices(run)) or "no device named"


def summary_section(run: Run) -> Section:
    """Of models that were only evaluated, what matters most, in one table."""
    (model,) = run.models
    measures = [hardest_recall(run, model), text_measure(run, model)]
    measures += run.measures(model, "cost", "decode_ms_per_token")[:1]
    known = [measure for measure in measures if measure is not None]
    if not known:
        return Section("Summary", [Text("Neither recall nor text nor cost was run; what was, follows.")])
    caption = "Recall at the most pairs, text and cost, with 95 % intervals."
    return Section("Summary", [by_arm(run, model, known, caption, suite_measure_title)])


def verdict_section(run: Run) -> Section:
    """A sentence for each model, the aims it rests on, and what limits it."""
    verdicts = [verdict(run, model) for model in run.models]
    nothing = nothing_measured(run)
    blocks: list[Block] = [Text(nothing, "lead")] if nothing else []
    blocks += [Text(one.sentence, "lead") for one in verdicts]
    aims = [(one.model, aim) for one in verdicts for aim in one.aims]
    if aims:
        blocks += [Text(_summary(verdicts)), _aims_table(verdicts)]
    remarks: dict[str, list[str]] = {}
    for one in verdicts:
        for remark in one.reservations:
            remarks.setdefault(remark, []).append(one.model)
    blocks += [Text(f"{listing(models)}: {remark}", "note") for remark, models in remarks.items()]
    if len(run.recipe.seeds) == 1:
        remark = (
            f"One training seed ({run.recipe.seeds[0]}): the intervals are over items only and say nothing about how "
            "another training would have ended."
        )
        blocks.append(Text(remark, "note"))
    return Section("Verdict", blocks)


def _summary(verdicts: Sequence[Verdict]) -> str:
    aims = [aim for one in verdicts for aim in one.aims]
    failed = [
        f"{aim.aim}, {one.model} {aim.arm}".rstrip(" –")
        for one in verdicts
        for aim in one.aims
        if aim.outcome == "not met"
    ]
    missing = sum(aim.outcome == "not run" for aim in aims)
    parts = [f"**{sum(aim.outcome == 'met' for aim in aims)} of {len(aims)} aims are met.**"]
    if failed:
        parts.append(f"Not met: {'; '.join(failed)}.")
    if missing:
        parts.append(f"{missing} could not be judged, because something was not run.")
    return " ".join(parts)


def _aims_table(verdicts: Sequence[Verdict]) -> Table:
    signs = {"met": "✓ met", "not met": "✗ not met", "not run": "– not run"}
    columns = [Column(title, words=True) for title in ("outcome", "model", "aim", "arm")]
    rows = [
        [Cell(signs[aim.outcome]), Cell(one.model), Cell(aim.aim), Cell(aim.arm), Cell(aim.measured)]
        for one in verdicts
        for aim in one.aims
    ]
    caption = (
        "Aims, judged by the 95 % interval of the paired difference: recall at the most pairs counts where the "
        f"interval excludes 0, text NLL where it stays below {100 * TEXT_MARGIN:.0f} %."
    )
    return Table(caption, [*columns, Column("difference")], rows)


def _write(documents: list[Document], folder: Path) -> tuple[Path, Path]:
    """Write page, Markdown and figures under other names first, so that a reader never sees half a report."""
    drawings = folder / "figures"
    fresh = folder / ".figures.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name, svg in markdown.figure_files(documents).items():
        (fresh / name).write_text(svg, encoding="utf-8")
    shutil.rmtree(drawings, ignore_errors=True)
    os.replace(fresh, drawings)
    pages = {"report.html": html.page(documents), "report.md": markdown.page(documents)}
    for name, text in pages.items():
        write_whole(folder / name, text)
    return folder / "report.html", folder / "report.md"
