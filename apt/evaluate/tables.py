"""Format figures and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from apt.evaluate.spread import Spread


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int] = (0,)
) -> str:
    """Return a table. Columns hold figures, except those numbered in `words`, which hold text."""
    align = ["---" if column in words else "---:" for column in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, align, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def plus_minus(value: Spread) -> str:
    """Format mean ± deviation, with as many digits as the deviation warrants."""
    if not math.isfinite(value.mean):
        return "∞"
    # If trials agree up to rounding, their spread would only be a row of zeros.
    if not math.isfinite(value.std) or value.std <= 1e-6 * abs(value.mean):
        return f"{value.mean:.{_decimals(value.mean, 3)}f}"
    decimals = _decimals(value.std, 2)
    return f"{value.mean:.{decimals}f} ± {value.std:.{decimals}f}"


def percent(value: float) -> str:
    """Format a share of 1 as percent."""
    return f"{100 * value:.1f} %"


def image(file: str | None, text: str) -> str:
    """Return a Markdown image, or nothing if there is no file."""
    return "" if file is None else f"![{text}]({file})"


def _decimals(value: float, significant: int) -> int:
    """Return how many decimals show `significant` digits of a number, at most 4."""
    if value == 0:
        return 0
    return max(0, min(4, significant - 1 - math.floor(math.log10(abs(value)))))
