"""The report of a study: tables for people, and every figure as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.errors import DataError, InputError, counted
from apt.files import without_nan, write_text
from apt.outputs import check_folder
from apt.study.criteria import CRITERIA
from apt.study.document import Study, read_study
from apt.study.statistics import MEASURES, Analysis
from apt.study.store import AnswerStore
from apt.study.votes import RaterSummary, find_votes, summarise_raters

REPORT, DATA = "report.md", "report.json"
_TITLES = {criterion.name: criterion.title for criterion in CRITERIA} | {"average": "Average"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report."""

    min_attention: float = 2 / 3
    """Answers of raters who pass a smaller share of the attention checks are left out; the report
    names those raters."""
    resamples: int = 2000
    """Number of bootstrap resamples for the intervals."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_attention <= 1:
            raise InputError(f"min_attention must be from 0 to 1, got {self.min_attention}")
        if self.resamples < 100:
            raise InputError(f"an interval needs at least 100 resamples, got {self.resamples}")


def report_study(
    folder: Path,
    out: Path,
    *,
    bases: Mapping[str, str] | None = None,
    config: ReportConfig = ReportConfig(),
    command: str = "",
) -> Path:
    """Write `report.md` and `report.json`; raters may still be at work.

    Args:
        folder: folder of the study.
        out: folder for the report; created if needed.
        bases: base model of each model, both in the study, for relative scores (Table 2).
        config: settings of the report.
        command: command that makes the report again; printed in it.

    Returns the path of `report.md`.

    Raises:
        DataError: if there is no study, or it has no votes yet.
        InputError: for base models that are not in the study or were not compared, and for a folder
            that cannot be written.
    """
    study = read_study(folder)
    for name in (*(bases or {}), *(bases or {}).values()):
        if name not in study.models:
            raise InputError(f"there is no model {name!r}; choose from {list(study.models)}")
    check_folder(out)
    store = AnswerStore(folder, study, read_only=True)
    try:
        shown = store.everything()
    finally:
        store.close()
    raters = summarise_raters(shown)
    kept = {one.rater for one in raters if one.attention() >= config.min_attention}
    votes = [vote for vote in find_votes(study, shown) if vote.rater in kept]
    if not votes:
        raise DataError(
            f"{str(folder)!r} has no votes to count: nobody has rated a pair"
            + (", or passed the attention checks" if len(kept) < len(raters) else "")
        )
    analysis = Analysis(study, votes, resamples=config.resamples)
    figures = _figures(study, analysis, raters, kept, bases or {}, config, command)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / DATA, json.dumps(without_nan(figures), indent=1) + "\n")
        write_text(out / REPORT, report_text(figures))
    except OSError as error:
        raise InputError(
            f"cannot write the report to {str(out)!r}: {error.strerror or error}; choose another "
            "place"
        ) from error
    return out / REPORT


def _figures(
    study: Study,
    analysis: Analysis,
    raters: Sequence[RaterSummary],
    kept: set[int],
    bases: Mapping[str, str],
    config: ReportConfig,
    command: str,
) -> dict[str, Any]:
    """Return everything that the report says, ready for JSON."""
    comparisons = [
        {
            "first": met[0],
            "second": met[1],
            "scores": {name: dataclasses.asdict(analysis.score(met, name)) for name in MEASURES},
            "relative": {
                name: dataclasses.asdict(figure)
                for name in MEASURES
                if (figure := analysis.relative(met, name, bases)) is not None
            },
        }
        for met in analysis.comparisons
    ]
    models = {name for met in analysis.comparisons for name in met}
    ranking = {
        criterion.name: {
            name: dataclasses.asdict(figure)
            for name, figure in analysis.ranking(criterion.name).items()
        }
        for criterion in CRITERIA
        if len(models) > 2
    }
    return {
        "title": study.title,
        "note": study.note,
        "study": study.digest(),
        "command": command,
        "resamples": config.resamples,
        "min_attention": config.min_attention,
        "bases": dict(bases),
        "models": {name: dict(settings) for name, settings in study.models.items()},
        "pairs": len(study.pairs),
        "votes_wanted": study.votes,
        "comparisons": comparisons,
        "kappa": {criterion.name: analysis.kappa(criterion.name) for criterion in CRITERIA},
        "ranking": ranking,
        "raters": [
            {**dataclasses.asdict(rater), "counted": rater.rater in kept} for rater in raters
        ],
    }


def report_text(figures: Mapping[str, Any]) -> str:
    """Return the report in Markdown, from the figures in `report.json`."""
    comparisons, raters = figures["comparisons"], figures["raters"]
    rated = sum(rater["rated"] for rater in raters if rater["counted"])
    wanted = figures["pairs"] * figures["votes_wanted"]
    used = sum(rater["counted"] and rater["rated"] > 0 for rater in raters)
    lines = ["# Preference study", ""]
    if figures["note"]:
        lines += [f"**{_cell(figures['note'])}**", ""]
    lines += [
        f"{counted(figures['pairs'], 'pair')} of samples, {rated} of "
        f"{counted(wanted, 'rating')} wanted, by {counted(used, 'rater')}. "
        "A score is (G − B)/(G + S + B), from +100 % (the first model is always preferred) "
        f"to −100 %. Its 95 % interval, from {figures['resamples']} resamples of prompts and "
        "raters, is in brackets. The votes, G/S/B, are below it.",
        "",
        "## Scores",
        "",
        *_table(
            ["comparison", *_TITLES.values()],
            [
                [
                    f"{_cell(one['first'])} *v.s.* {_cell(one['second'])}",
                    *(_score(one["scores"][name]) for name in MEASURES),
                ]
                for one in comparisons
            ],
        ),
    ]
    if relative := [one for one in comparisons if one["relative"]]:
        lines += [
            "## Relative scores",
            "",
            "The score minus that of the base models, so that a strong base model does not count "
            f"as a good method ({_bases(figures['bases'])}).",
            "",
            *_table(
                ["comparison", *_TITLES.values()],
                [
                    [
                        f"{_cell(one['first'])} *v.s.* {_cell(one['second'])}",
                        *(_percent(one["relative"][name]) for name in MEASURES),
                    ]
                    for one in relative
                ],
            ),
        ]
    if figures["ranking"]:
        lines += [
            "## Ranking",
            "",
            "Bradley-Terry log-strengths, of mean 0; a draw is half a win for each model. A "
            "difference of 1 means odds of 2.7 to 1. A dash means that no finite strengths fit "
            "best, because some model never lost or never won.",
            "",
            *_table(
                ["model", *(criterion.title for criterion in CRITERIA)],
                [
                    [
                        _cell(model),
                        *(_strength(figures["ranking"][c.name][model]) for c in CRITERIA),
                    ]
                    for model in next(iter(figures["ranking"].values()))
                ],
            ),
        ]
    lines += [
        "## Raters",
        "",
        "Fleiss' κ of raters on the same pairs (1 is full agreement, 0 is chance): "
        + ", ".join(f"{c.title.lower()} {_number(figures['kappa'][c.name])}" for c in CRITERIA)
        + ". “Repeated” is the share of answers that stayed the same when a pair came back with "
        "its sides swapped; “left” is the share of preferences for the left side.",
        "",
        *_table(
            ["rater", "pairs", "skipped", "checks passed", "repeated", "left", "counted"],
            [
                [
                    str(rater["rater"]),
                    f"{rater['rated']} of {rater['asked']}",
                    str(rater["skipped"]),
                    _share(rater["checks_passed"], rater["checks"]),
                    _share(rater["repeats_same"], rater["repeats"]),
                    _share(rater["left"], rater["left"] + rater["right"]),
                    "yes" if rater["counted"] else "no: attention",
                ]
                for rater in raters
            ],
        ),
        "## Models",
        "",
        *_table(
            ["name", "settings of its samples"],
            [[_cell(name), _settings(values)] for name, values in figures["models"].items()],
        ),
    ]
    if figures["command"]:
        lines += ["Made by", "", "```bash", figures["command"], "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty line."""
    return [
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _score(score: Mapping[str, Any]) -> str:
    votes = f"{score['good']}/{score['similar']}/{score['bad']}"
    return f"{_percent(score['score'])}<br>{votes}"


def _percent(figure: Mapping[str, float]) -> str:
    return _with_interval(figure, lambda value: _signed(100 * value, 1) + " %")


def _strength(figure: Mapping[str, float]) -> str:
    return _with_interval(figure, lambda value: _signed(value, 2))


def _with_interval(figure: Mapping[str, float], text: Callable[[float], str]) -> str:
    if not math.isfinite(figure["value"]):
        return "–"
    if not math.isfinite(figure["low"]):
        return f"**{text(figure['value'])}**"
    return f"**{text(figure['value'])}** [{text(figure['low'])}, {text(figure['high'])}]"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % of {whole}" if whole else "–"


def _bases(bases: Mapping[str, str]) -> str:
    return ", ".join(f"{_cell(name)}: {_cell(base)}" for name, base in bases.items())


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_cell(k)} {_cell(v)}" for k, v in values.items() if v is not None)


def _cell(value: object) -> str:
    """Escape a user's text for a cell of a Markdown table."""
    return (
        " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    )
