"""`diffusion-apt evaluate digits`: write the results page of the digits models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.cli.output import print_page
from apt.cli.progress import progress_bar
from apt.cli.ranks import ranks
from apt.evaluate.digits import EvaluateConfig, evaluate_digits


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the digits models and write the results page, with plots and raw figures."""

    # Nested, because tyro turns errors of the outermost class into boxes; these pass through.
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str], *, prog: str) -> None:
    """Evaluate, and print where the page is."""
    options = parse(Evaluate, args, prog=prog)
    with ranks() as parallel:
        page = evaluate_digits(options.config, parallel=parallel, progress=progress_bar)
    print_page(page)
