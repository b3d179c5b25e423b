"""The digits report as Markdown. Every figure in it comes from the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apt.evaluate.bars import PAPER, ZERO_LOSS, check_bars
from apt.evaluate.measure import Spread, summarise
from apt.evaluate.methods import APT, CONSISTENCY, DIFFUSION_GUIDED
from apt.evaluate.results import MethodResult, Progress, Results


@dataclass(frozen=True)
class Pictures:
    """File names of the plots and sheets, beside the report; None where there is nothing."""

    methods: str | None
    discriminator_loss: str | None
    progress: str | None
    spectrum: str | None
    comparison: str | None
    sheets: dict[str, str]


def report_text(results: Results, pictures: Pictures, *, command: str, data_file: str) -> str:
    """The whole page."""
    parts = [
        "# Moving digits: results",
        f"Made by `{command}`; the figures of every seed are in [{data_file}]({data_file}). "
        f"Device: {results.machine}.",
        _how_measured(results),
        "## What it must show",
        _bars_table(results),
        _paper_note(),
        "## Methods",
        _methods_table([*results.real, *_of_group(results, "main")]),
        _image(pictures.methods, "Distances and accuracy of every method"),
        _image(pictures.spectrum, "Radial power relative to real clips"),
        "## Words and diversity",
        _words_table([*results.real, *_of_group(results, "main")]),
        "## Ablations",
        "One step of the final EMA weights of each run, as for APT itself. Shorter runs are to be "
        "compared with APT after as many updates, where that row is shown; the run without a "
        "regulariser is longer, to show where it leads.",
        _methods_table([m for m in results.methods if m.name == APT.name or m.group == "ablation"]),
        _words_table([m for m in results.methods if m.group == "ablation" and m.was_run]),
        "## Discriminator loss with and without the regulariser (APT Figure 5)",
        _image(pictures.discriminator_loss, "Discriminator loss against updates")
        or "not run: no log of these runs was found.",
        f"The dotted line is {ZERO_LOSS:g}, where the collapse monitor says that the "
        "discriminator has won. The penalty is not part of the loss shown."
        if pictures.discriminator_loss
        else "",
        "## Quality against updates (APT Figure 9)",
        _image(pictures.progress, "Quality against updates, EMA and raw weights")
        or "not run: no snapshots were found.",
        _progress_table(results),
        "## Samples",
        "First seed, first captions; the same noise for every method.",
        _image(pictures.comparison, "Methods side by side"),
        *(f"### {label}\n\n![{label}]({file})" for label, file in pictures.sheets.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_measured(r: Results) -> str:
    test, held, train = (r.classifier[split] for split in ("test", "heldout", "train"))
    captions = r.num_samples // r.samples_per_caption
    return "\n".join(
        [
            "## How it is measured",
            "",
            f"- **Samples**: {r.num_samples} per seed for every method ({captions} training "
            f"captions, {r.samples_per_caption} of each), {len(r.seeds)} seeds "
            f"({', '.join(map(str, r.seeds))}); captions, noise and real clips change with the "
            f"seed. Networks compute in {r.precision}. Figures are mean ± standard deviation over "
            "seeds, of one training run.",
            f"- **Reference**: {r.num_reference} real clips of handwriting that no model has "
            "seen. The rows of real clips are other clips, as many as of each method: what a "
            "perfect generator would get.",
            "- **Fréchet distance**: in the last hidden layer of a small classifier trained on "
            "real clips of the training handwriting. Its own accuracy, digit, colour and "
            f"direction all right: {_percent(test.all)} on held-out handwriting "
            f"(digit {_percent(test.digit)}, colour {_percent(test.colour)}, direction "
            f"{_percent(test.direction)}), {_percent(held.all)} on held-out captions too, "
            f"{_percent(train.all)} on new clips of the training handwriting.",
            "- **Patch distance**: Fréchet distance of high-passed 8×8 pixel patches, as the "
            "paper's PFID sees detail without resizing. It sees blur, ghosting and half-grey "
            "pixels, which classifier features overlook.",
            "- **Spectrum**: root mean square difference of the log power spectra, radially "
            "averaged over frames (spatial) and along time (temporal), in dB.",
            "- **Accuracy**: share of samples in which the classifier reads digit, colour and "
            f"direction as in the caption. *Held-out captions*: the same for {r.num_heldout} "
            "samples of captions that were never trained on.",
            "- **Diversity**: mean pixel distance between samples of one caption (within) and of "
            "different ones (across), divided by that of real clips of the same captions.",
        ]
    )


def _paper_note() -> str:
    def line(figure: str, name: str) -> str:
        p = PAPER[figure]
        apt, consistency, diffusion = (
            p[APT.name],
            p[CONSISTENCY.name],
            p[DIFFUSION_GUIDED.name],
        )
        return (
            f"{name} {apt:g} / {consistency:g} = {apt / consistency:.2f} and "
            f"{apt:g} / {diffusion:g} = {apt / diffusion:.2f}"
        )

    return (
        "The paper's ratios are those of its Table 5 (COCO-5K, images): "
        f"{line('frechet', 'FID')}; {line('patch', 'PFID')}. Ratios of ours are formed seed by "
        "seed, since methods share captions and noise."
    )


def _bars_table(results: Results) -> str:
    rows = [
        [
            bar.claim,
            bar.bar,
            "not run" if bar.reached is None else _plus_minus(bar.reached),
            "" if bar.paper is None else f"{bar.paper:.2f}",
            bar.verdict,
        ]
        for bar in check_bars(results)
    ]
    return _table(["", "bar", "reached", "paper", "pass/miss"], rows)


def _methods_table(methods: Sequence[MethodResult]) -> str:
    header = [
        "method",
        "updates",
        "evaluations",
        "Fréchet ↓",
        "patch ↓",
        "spatial spectrum, dB ↓",
        "temporal spectrum, dB ↓",
        "accuracy ↑",
        "held-out captions ↑",
    ]
    figures = (
        "frechet",
        "patch",
        "spatial_spectrum",
        "temporal_spectrum",
        "accuracy",
        "heldout_accuracy",
    )
    return _table(header, [_method_row(m, figures) for m in methods])


def _words_table(methods: Sequence[MethodResult]) -> str:
    if not methods:
        return ""
    header = [
        "method",
        "updates",
        "evaluations",
        "digit ↑",
        "colour ↑",
        "direction ↑",
        "diversity within a caption",
        "diversity across captions",
    ]
    figures = ("digit", "colour", "direction", "within", "across")
    return _table(header, [_method_row(m, figures) for m in methods])


def _method_row(method: MethodResult, figures: Sequence[str]) -> list[str]:
    label = method.label if method.cfg_scale is None else f"{method.label} {method.cfg_scale:g}"
    counts = (method.updates, method.evaluations)
    start = [label, *("" if count is None else str(count) for count in counts)]
    if not method.was_run:
        return [*start, "not run", *[""] * (len(figures) - 1)]
    summary = method.summary()
    return [*start, *(_plus_minus(summary[name]) for name in figures)]


def _progress_table(results: Results) -> str:
    if not results.progress:
        return ""
    found: dict[tuple[int, str], Progress] = {(p.update, p.weights): p for p in results.progress}
    rows = []
    for update in sorted({p.update for p in results.progress}):
        row = [str(update)]
        for figure in ("frechet", "patch", "accuracy"):
            for weights in ("ema", "raw"):
                point = found.get((update, weights))
                row.append(
                    _plus_minus(summarise(point.measurements)[figure]) if point else "not run"
                )
        rows.append(row)
    header = ["updates"] + [
        f"{figure}, {weights}"
        for figure in ("Fréchet", "patch", "accuracy")
        for weights in ("EMA", "raw")
    ]
    note = (
        f"{results.snapshot_samples} samples per seed; a Fréchet distance of fewer samples is "
        "larger, so these compare among themselves only."
        if results.snapshot_samples != results.num_samples
        else f"{results.snapshot_samples} samples per seed, as in the tables above."
    )
    start = "0 updates is the consistency model, which the recipe starts from. "
    return _table(header, rows) + "\n\n" + (start if rows[0][0] == "0" else "") + note


def _of_group(results: Results, group: str) -> list[MethodResult]:
    return [m for m in results.methods if m.group == group]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def _plus_minus(value: Spread) -> str:
    if not math.isfinite(value.mean):
        return "∞"
    # Seeds that agree to rounding have no spread worth a column of zeros.
    if not math.isfinite(value.std) or value.std <= 1e-6 * abs(value.mean):
        return f"{value.mean:.{_decimals(value.mean, 3)}f}"
    decimals = _decimals(value.std, 2)
    return f"{value.mean:.{decimals}f} ± {value.std:.{decimals}f}"


def _decimals(value: float, significant: int) -> int:
    """Decimals that show a number with so many significant digits, at most 4."""
    if value == 0:
        return 0
    return max(0, min(4, significant - 1 - math.floor(math.log10(abs(value)))))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _image(file: str | None, text: str) -> str:
    return "" if file is None else f"![{text}]({file})"
