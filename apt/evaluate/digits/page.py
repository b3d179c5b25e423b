"""Write the results page: Markdown, raw figures, plots and contact sheets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from apt.errors import DataError
from apt.evaluate.digits import inside, plots
from apt.evaluate.digits.bars import check_bars, read_causes
from apt.evaluate.digits.clips import CaptionSet
from apt.evaluate.digits.methods import APT, CONSISTENCY, DIFFUSION_GUIDED
from apt.evaluate.digits.report import Pictures, report_text
from apt.evaluate.digits.results import Results
from apt.evaluate.digits.saved import read_results
from apt.evaluate.html_page import write_html_page
from apt.files import without_nan
from apt.media import write_contact_sheet
from apt.pixels import to_frames

REPORT, DATA, CAUSES = "digits.md", "digits.json", "digits_causes.json"
_COMPARISON = "digits_comparison.png"
_WALKS, _WALKS_SHEET = "walks/clips.md", "walks/clips_samples.png"
_SHEET_ROWS = 8
_BESIDE = ("real", DIFFUSION_GUIDED.name, CONSISTENCY.name, APT.name)


def write_page(
    out: Path, results: Results, captions: CaptionSet, shown: Mapping[str, Tensor]
) -> Path:
    """Write everything to a folder; return the path of the page.

    Args:
        out: the folder, created if missing.
        results: all figures.
        captions: of the shown clips.
        shown: clips of the first trial at `shown_positions`, by method or "real".
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_comparison(out, results, captions, shown)
    _write_sheets(out, results, captions, shown)
    document = json.dumps(without_nan(dataclasses.asdict(results)), indent=1) + "\n"
    (out / DATA).write_text(document, encoding="utf-8")
    return render_page(out, results)


def render_page(out: Path, results: Results | None = None) -> Path:
    """Write the page with its plots, as Markdown and as one HTML file; return the Markdown's path.

    Args:
        out: the folder, which has the sheets of samples.
        results: all figures; None reads those in the folder.

    Raises DataError for figures or sheets that are missing or cannot be read.
    """
    results = read_results(out / DATA) if results is None else results
    sheets = {label: file for label, file in _sheet_files(results) if (out / file).is_file()}
    if not sheets or not (out / _COMPARISON).is_file():
        raise DataError(
            f"{str(out)!r} has figures but no pictures of samples ({_COMPARISON}); measure again"
        )
    pictures = Pictures(
        methods=_name(plots.plot_methods(results, out / "digits_methods.png")),
        regulariser=_name(plots.plot_regulariser(results, out / "digits_regulariser.png")),
        progress=_name(plots.plot_progress(results, out / "digits_progress.png")),
        distillation=_name(plots.plot_distillation(results, out / "digits_distillation.png")),
        spectrum=_name(plots.plot_spectrum(results, out / "digits_spectrum.png")),
        comparison=_COMPARISON,
        layers=_if_there(out, inside.LAYERS),
        errors=_if_there(out, inside.ERRORS),
        ways=_if_there(out, inside.WAYS),
        walks=_if_there(out, _WALKS),
        walks_sheet=_if_there(out, _WALKS_SHEET),
        sheets=sheets,
    )
    text = report_text(
        results, check_bars(results), read_causes(out / CAUSES), pictures, data_file=DATA
    )
    report = out / REPORT
    report.write_text(text, encoding="utf-8")
    write_html_page(report.with_suffix(".html"), text, title="Moving digits: results")
    return report


def _sheet_files(results: Results) -> list[tuple[str, str]]:
    """Return label and file of each sheet on the page."""
    methods = [(m.name, m.label) for m in results.methods if m.group != "ablation"]
    return [(label, _sheet_file(name)) for name, label in [("real", "real clips"), *methods]]


def _sheet_file(name: str) -> str:
    return f"digits_samples_{name}.png"


def shown_positions(captions: CaptionSet) -> list[int]:
    """Return the positions of one sample of each of the first captions."""
    return list(range(0, len(captions.trained), captions.samples_per_caption))[:_SHEET_ROWS]


def shown_captions(captions: CaptionSet) -> list[str]:
    """Return the captions of the samples on the page."""
    return [captions.trained[position].caption for position in shown_positions(captions)]


def _write_sheets(
    out: Path, results: Results, captions: CaptionSet, shown: Mapping[str, Tensor]
) -> None:
    texts = shown_captions(captions)
    labels = {m.name: m.label for m in results.methods} | {"real": "real clips"}
    for name, clips in shown.items():
        write_contact_sheet(
            out / _sheet_file(name),
            [[video[:: _stride(clips, 5)]] for video in to_frames(clips)],
            rows=texts,
            columns=[labels[name]],
            scale=2,
        )


def _write_comparison(
    out: Path, results: Results, captions: CaptionSet, shown: Mapping[str, Tensor]
) -> None:
    texts = shown_captions(captions)
    labels = {m.name: m.label for m in results.methods} | {"real": "real clips"}
    names = [name for name in _BESIDE if name in shown]
    frames = [to_frames(shown[name])[:, :: _stride(shown[name], 3)] for name in names]
    write_contact_sheet(
        out / _COMPARISON,
        [list(row) for row in zip(*frames, strict=True)],
        rows=texts,
        columns=[labels[name] for name in names],
        scale=2,
    )


def _stride(clips: Tensor, shown: int) -> int:
    """Return the step between frames that shows `shown` of them from first to last."""
    return (clips.shape[2] - 1) // (shown - 1)


def _if_there(out: Path, file: str) -> str | None:
    return file if (out / file).is_file() else None


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name
