"""Write the page of an evaluation: Markdown, one HTML file, pictures, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import InputError
from apt.evaluate.html_page import Grid, write_html_page
from apt.evaluate.plotting import Panel, plot_bars
from apt.evaluate.protocol import Figure
from apt.evaluate.results import Evaluation, ModelResult
from apt.evaluate.sheet import write_sample_sheet
from apt.evaluate.spread import Spread, spread
from apt.evaluate.tables import image, plus_minus, table
from apt.files import without_nan, write_text
from apt.media.parts import is_shown
from apt.media.playable import write_playable
from apt.samples import SampleFolder

SHOWN = "shown"
_ROWS = 8
_COLOURS = ("#4c78a8", "#e39c37", "#2e8b57", "#8a6fb0", "#b0483a", "#777777")
_REAL = "real"
_SHOWN_SETTINGS = ("num_steps", "cfg_scale", "sampler", "scheduler", "dtype", "licence")


def write_report(out: Path, evaluation: Evaluation, folders: Mapping[str, SampleFolder]) -> Path:
    """Write everything to an existing folder; return the Markdown page.

    Args:
        out: the folder.
        evaluation: all figures.
        folders: samples by model name.

    Raises:
        InputError: a file that cannot be written.
        DataError: a sample that cannot be shown.
    """
    name = evaluation.protocol.name
    sheet = out / f"{name}_samples.png"
    try:
        grid = _grid(evaluation, folders, out / SHOWN)
        write_sample_sheet(
            sheet,
            [[file for file in row if file is not None] for row in grid.files],
            rows=grid.rows,
            columns=grid.columns,
        )
        plot = _plot(out / f"{name}_figures.png", evaluation)
        document = without_nan(evaluation.document())
        data = out / f"{name}.json"
        write_text(data, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        text = report_text(evaluation, data=data.name, plot=plot, sheet=sheet.name)
        page = out / f"{name}.md"
        write_text(page, text)
    except OSError as error:
        raise InputError(
            f"cannot write the page to {str(out)!r}: {error.strerror or error}; free some space, "
            "and evaluate again: finished work is kept"
        ) from error
    title = f"{name}: {', '.join(grid.columns)}"
    write_html_page(page.with_suffix(".html"), text, title=title, grids={sheet.name: grid})
    return page


def report_text(evaluation: Evaluation, *, data: str, plot: str | None, sheet: str) -> str:
    """Return the page as Markdown. Every figure in it comes from the evaluation.

    Args:
        evaluation: all figures.
        data, plot, sheet: files beside the page.
    """
    protocol = evaluation.protocol
    each = protocol.samples_per_prompt
    number = len(protocol.prompts) * each
    seeds = ", ".join(map(str, protocol.seeds))
    spread = (
        f"Figures are mean ± standard deviation over {len(protocol.seeds)} evaluation seeds "
        f"({seeds}). Each has its own noise seeds, the same for all models."
        if len(protocol.seeds) > 1
        else f"There is one evaluation seed ({seeds}), so there is no spread."
    )
    parts = [
        f"# {protocol.name}: {', '.join(model.name for model in evaluation.models)}",
        f"Every figure of every seed is in [{data}]({data}).",
        "## How it is measured",
        protocol.about,
        f"{len(protocol.prompts)} prompts with {each} sample{'s' * (each > 1)} each, {number} per "
        f"seed. {spread} Measured on {evaluation.machine}, with {evaluation.software}.",
        "## Figures",
        _figures_table(evaluation),
        image(plot, "Every figure of every model"),
        "## Samples",
        "First prompts of the first evaluation seed, with the same noise seeds for every model.",
        image(sheet, "Samples of all models side by side"),
        "## Models",
        _models_table(evaluation.models),
        f"Made by `{evaluation.command}`." if evaluation.command else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures_table(evaluation: Evaluation) -> str:
    figures = evaluation.protocol.figures
    if not figures:
        return "This protocol has no measures. Use `diffusion-apt study make` for ratings."
    rows = []
    for baseline, found in evaluation.baselines.items():
        rows.append([baseline, *_cells({n: spread([v]) for n, v in found.items()}, figures)])
    for model in evaluation.models:
        rows.append([model.name, *_cells(model.summary(), figures)])
    return table(["model", *(figure.heading for figure in figures.values())], rows)


def _cells(found: Mapping[str, Spread], figures: Mapping[str, Figure]) -> list[str]:
    return [plus_minus(found[name]) if name in found else "–" for name in figures]


def _models_table(models: list[ModelResult]) -> str:
    known = [key for key in _SHOWN_SETTINGS if any(m.settings.get(key) is not None for m in models)]
    rows = [
        [m.name, f"`{m.place}`", *(_cell(m.settings.get(key)) for key in known)] for m in models
    ]
    return table(["model", "place", *(key.replace("_", " ") for key in known)], rows, words=(0, 1))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plot(path: Path, evaluation: Evaluation) -> str | None:
    figures = evaluation.protocol.figures
    if not figures:
        return None
    summaries = [model.summary() for model in evaluation.models]
    panels = [
        Panel(
            title=figure.heading,
            values=[summary.get(name) for summary in summaries],
            scale=figure.scale,
        )
        for name, figure in figures.items()
    ]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(summaries))]
    labels = [model.name for model in evaluation.models]
    return plot_bars(path, labels, panels, colours=colours).name


def _grid(evaluation: Evaluation, folders: Mapping[str, SampleFolder], shown: Path) -> Grid:
    """Return the first sample of each of the first prompts, with the real file if there is one.

    Samples that a page cannot show are re-encoded into the folder `shown`.
    """
    protocol = evaluation.protocol
    keys = protocol.keys(protocol.seeds[0])[:: protocol.samples_per_prompt][:_ROWS]
    columns: list[str] = [model.name for model in evaluation.models]
    files: list[list[Path | None]] = [
        [_shown(folders[name].samples[key].path, shown / name) for name in columns] for key in keys
    ]
    real = [protocol.references.get(prompt) for prompt, _ in keys]
    if None not in real:
        for row, file in zip(files, real, strict=True):
            row.append(file and _shown(file, shown / _REAL))
        columns = [*columns, _REAL]
    return Grid(rows=[prompt for prompt, _ in keys], columns=columns, files=files)


def _shown(file: Path, folder: Path) -> Path:
    return file if is_shown(file) else write_playable(folder / f"{file.stem}.mp4", file)
