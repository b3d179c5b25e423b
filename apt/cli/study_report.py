"""`diffusion-apt study report`: report scores from the raters' answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import called, parse
from apt.cli.output import printing
from apt.errors import InputError
from apt.study.report import ReportConfig, report_study


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Write report.md and report.json of a study, also while raters are still working.

    The report has preference scores with intervals for each criterion, scores relative to base
    models, the agreement of raters with each other and with themselves, and a ranking if more than
    two models were compared.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the study."""
    out: Path | None = None
    """Folder for the report; None is DIR/report."""
    base: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The base model of a model, both in the study: --base apt=diffusion. Scores are then adjusted
    by the comparison of the base models."""
    config: Annotated[ReportConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ReportConfig
    )


def main(args: Sequence[str], *, prog: str) -> None:
    """Write the report and print it."""
    asked = parse(StudyReport, args, prog=prog)
    page = report_study(
        asked.directory,
        asked.directory / "report" if asked.out is None else asked.out,
        bases=split_bases(asked.base),
        config=asked.config,
        command=called(prog, args),
    )
    with printing():
        print(page.read_text(encoding="utf-8"))
        print(page)


def split_bases(texts: Sequence[str]) -> dict[str, str]:
    """Parse NAME=BASE texts to base models by model. Raises InputError for other texts."""
    bases: dict[str, str] = {}
    for text in texts:
        name, sign, base = text.partition("=")
        if not (name and sign and base) or name in bases:
            raise InputError(
                f"--base needs NAME=BASE, once per model, as in --base apt=diffusion; got {text!r}"
            )
        bases[name] = base
    return bases
