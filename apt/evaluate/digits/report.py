"""The digits report as Markdown. Every figure in it comes from the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from apt.evaluate.digits.bars import PAPER, Bar, agrees
from apt.evaluate.digits.judges import BLURRED, DESCRIPTIONS, FRAMES
from apt.evaluate.digits.methods import (
    ABLATIONS,
    APT,
    APT_PAPER,
    CONSISTENCY,
    DIFFUSION_GUIDED,
    LONG,
)
from apt.evaluate.digits.results import Cost, MethodResult, Results, Snapshot
from apt.evaluate.spread import Spread
from apt.evaluate.tables import image, percent, plus_minus, table

MAIN = "main"


@dataclass(frozen=True)
class Pictures:
    """File names of the plots and sheets beside the report; None if there is none."""

    methods: str | None
    regulariser: str | None
    progress: str | None
    distillation: str | None
    spectrum: str | None
    comparison: str
    layers: str | None
    errors: str | None
    ways: str | None
    walks: str | None
    walks_sheet: str | None
    sheets: dict[str, str]


def report_text(
    results: Results,
    bars: Sequence[Bar],
    causes: Mapping[str, str],
    pictures: Pictures,
    *,
    data_file: str,
) -> str:
    """Return the whole page; `causes` maps the keys of missed targets to reasons."""
    main = [*results.real, *(m for m in results.methods if m.group != "ablation")]
    parts = [
        "# Moving digits: results",
        "Made by `diffusion-apt evaluate digits`. The figures of every trial are in "
        f"[{data_file}]({data_file}). Device: {results.machine}.",
        _how_measured(results),
        "## Targets",
        _bars_table(bars, causes),
        _left_out(bar.claim for bar in bars if bar.reached is None),
        _paper_note(),
        image(pictures.comparison, "Methods side by side"),
        "## Methods",
        _methods_table(main),
        _not_run(results, (APT_PAPER.name,), "Not trained"),
        image(pictures.methods, "Distances and accuracy of every method"),
        image(pictures.spectrum, "Radial power relative to real clips"),
        "## Words and diversity",
        _words_table(main),
        *_judges(results),
        *_regulariser(pictures),
        *_ablations(results),
        *_progress(results, pictures),
        *_distillation(results, pictures),
        *_inside(pictures),
        *_walks(pictures),
        "## Training time",
        _costs(results.costs),
        "## Samples",
        "From the first training run, first seed and first captions; the noise is the same for "
        "every method.",
        *(f"### {label}\n\n{image(file, label)}" for label, file in pictures.sheets.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_measured(r: Results) -> str:
    test, held, train = (r.classifiers[MAIN][split] for split in ("test", "heldout", "train"))
    captions = r.num_samples // r.samples_per_caption
    training = (
        f"{r.runs} training runs with different seeds"
        if r.runs > 1
        else "one training run, so "
        "the spread covers captions, noise and real clips, but not training"
    )
    return "\n".join(
        [
            "## How it is measured",
            "",
            f"- **Samples**: {r.num_samples} per trial for every method ({captions} training "
            f"captions, {r.samples_per_caption} samples each); {len(r.seeds)} evaluation seeds "
            f"({', '.join(map(str, r.seeds))}) for {training}. The seed changes captions, noise "
            f"and real clips. Networks compute in {r.precision}. Figures are mean ± standard "
            "deviation over all trials.",
            f"- **Clips**: the {r.setting} digits. **Reference**: {r.num_reference} real clips of "
            "handwriting that no model has seen. The rows of real clips show what a perfect "
            "generator would get: they are other real clips, as many as each method has samples. "
            "The codec's reconstructions of real clips are the best that any model in its latents "
            "can reach.",
            "- **Fréchet distance**: in the last hidden layer of a small classifier, trained on "
            "real clips of the training handwriting. The classifier gets digit, colour and "
            f"direction all right in {percent(test.all)} of clips with held-out handwriting "
            f"(digit {percent(test.digit)}, colour {percent(test.colour)}, direction "
            f"{percent(test.direction)}), in {percent(held.all)} with held-out captions as well, "
            f"and in {percent(train.all)} of new clips with the training handwriting.",
            "- **Patch distance**: Fréchet distance between high-passed patches of 8×8 pixels. "
            "Like the paper's PFID, it looks at detail without resizing and detects blur, ghosting "
            "and half-grey pixels, which classifier features overlook.",
            "- **Spectrum**: root mean square difference of the log power spectra, radially "
            "averaged over frames (spatial) and along time (temporal), in dB.",
            "- **Accuracy**: share of samples in which the classifier finds the caption's digit, "
            f"colour and direction. *Held-out captions*: the same for {r.num_heldout} samples of "
            "captions that were never trained on.",
            "- **Diversity**: mean pixel distance between samples of one caption (within) and of "
            "different ones (across), divided by that of real clips of the same captions.",
        ]
    )


def _bars_table(bars: Sequence[Bar], causes: Mapping[str, str]) -> str:
    rows = []
    for bar in bars:
        if bar.reached is None:
            continue
        missed = causes.get(bar.key, "cause not known yet")
        verdict = "pass" if bar.passed else f"**missed**: {missed}"
        if bar.passed is None:
            verdict = "not judged: a single trial has no spread"
        reached = plus_minus(bar.reached)
        rows.append([bar.claim, bar.bar, bar.goal or "–", bar.paper or "–", reached, verdict])
    return table(["", "target", "goal", "paper", "reached", ""], rows, words=(0, 5))


def _left_out(claims: Iterable[str]) -> str:
    names = list(claims)
    return f"Not run, so not judged: {'; '.join(names)}." if names else ""


def _not_run(results: Results, names: Sequence[str], words: str) -> str:
    labels = {APT_PAPER.name: APT_PAPER.label}
    labels |= {f"ablation_{name}": label for name, (label, _) in ABLATIONS.items()}
    missing = [labels[name] for name in names if results.method(name) is None]
    return f"{words}: {'; '.join(missing)}." if missing else ""


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
        "The paper's ratios come from its Table 5 (COCO-5K, images): "
        f"{line('frechet', 'FID')}; {line('patch', 'PFID')}. Our ratios and differences are "
        "computed per trial, since methods share captions and noise. The differences without the "
        "regulariser compare the ends of two runs, and their spreads add in quadrature."
    )


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
    return table(header, [_method_row(m, figures) for m in methods])


def _words_table(methods: Sequence[MethodResult]) -> str:
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
    return table(header, [_method_row(m, figures) for m in methods])


def _method_row(method: MethodResult, figures: Sequence[str]) -> list[str]:
    label = method.label if method.cfg_scale is None else f"{method.label} {method.cfg_scale:g}"
    counts = (method.updates, method.evaluations)
    summary = method.summary()
    return [
        label,
        *("–" if count is None else str(count) for count in counts),
        *(plus_minus(summary[name]) for name in figures),
    ]


_JUDGED = (("frechet", "Fréchet distance, ratio"), ("accuracy", "accuracy, difference"))


def _judges(results: Results) -> list[str]:
    names = [name for name in (FRAMES, BLURRED) if name in results.classifiers]
    if not names:
        return []
    right = "; ".join(
        f"*{name}*: {DESCRIPTIONS[name]}; it is right on "
        f"{percent(results.classifiers[name]['test'].all)} of real held-out handwriting"
        for name in names
    )
    rows = []
    for other in (CONSISTENCY, DIFFUSION_GUIDED):
        for figure, words in _JUDGED:
            form = results.ratio if figure == "frechet" else results.difference
            zero = 1.0 if figure == "frechet" else 0.0
            main = form(APT.name, other.name, figure)
            if main is None:
                continue
            row = [f"{words} to {other.label}", plus_minus(main)]
            for name in names:
                found = form(APT.name, other.name, figure, name)
                assert found is not None, "every judge has seen every trial"
                same = agrees(main.mean - zero, found.mean - zero)
                near = abs(main.mean - zero) <= main.known or abs(found.mean - zero) <= found.known
                verdict = "agrees" if same else "differs"
                row.append(f"{plus_minus(found)}, {verdict}{' (within the spread)' * near}")
            rows.append(row)
    if not rows:
        return []
    return [
        "## Independent judges",
        f"Other classifiers compare one-step APT with its rivals. {right}.",
        table(["one-step APT", "main judge", *names], rows),
    ]


def _regulariser(pictures: Pictures) -> list[str]:
    title = "## With and without the regulariser (APT Figure 5)"
    if pictures.regulariser is None:
        return [title, "Not run (`diffusion-apt train digits_ablations`)."]
    return [
        title,
        image(pictures.regulariser, "D's loss, its input gradient, diversity and distances"),
        "Learning rates are constant, and training goes past the peak of quality. D's loss is "
        "shown without the penalty. At this scale, samples do not collapse to plain colours "
        "without the regulariser; that would need a much stronger D. `examples/minimal.py` shows "
        "on a mixture in two dimensions that the game does not converge without it.",
    ]


def _ablations(results: Results) -> list[str]:
    found = [m for m in results.methods if m.group == "ablation"]
    reference = results.method(f"ablation_{LONG}")
    if reference is None or len(found) < 2:
        return ["## Ablations", "Not run (`diffusion-apt train digits_ablations`)."]
    base = reference.summary()
    header = [
        "changed",
        "updates",
        "Fréchet ↓",
        "patch ↓",
        "accuracy ↑",
        "diversity within",
        "the paper",
        "here",
    ]
    figures = ("frechet", "patch", "accuracy", "within")
    rows = []
    for method in found:
        summary = method.summary()
        said = "–" if method is reference else ABLATIONS[method.name.removeprefix("ablation_")][1]
        verdict = "–" if method is reference else _compared(base, summary)
        updates = str(method.updates) if method.updates else "–"
        cells = (plus_minus(summary[name]) for name in figures)
        rows.append([method.label, updates, *cells, said, verdict])
    return [
        "## Ablations",
        "All use one step with the EMA weights, after equally many updates from the same start at "
        "constant learning rates. The last column compares both distances with those of the whole "
        "method; differences below the spreads, added in quadrature, do not count.",
        table(header, rows, words=(0, 6, 7)),
        _not_run(results, [f"ablation_{name}" for name in ABLATIONS], "Not run"),
    ]


def _compared(base: Mapping[str, Spread], other: Mapping[str, Spread]) -> str:
    """Say whether both distances are worse than the base's."""
    words = []
    for figure, name in (("frechet", "Fréchet"), ("patch", "patch")):
        change = other[figure].mean - base[figure].mean
        limit = math.hypot(base[figure].std, other[figure].std)
        if abs(change) <= limit:
            words.append(f"{name} within the spread")
            continue
        alone = "" if math.isfinite(limit) else " in a single trial"
        words.append(f"{name} {'worse' if change > 0 else 'better'}{alone}")
    return ", ".join(words)


def _progress(results: Results, pictures: Pictures) -> list[str]:
    title = "## Quality against updates, EMA and raw weights (APT Figure 9)"
    rows = _snapshot_rows(results, APT.run)
    if not rows:
        return [title, "Not run: no snapshots were found."]
    start = "The row of 0 updates is the consistency model, from which APT starts. "
    return [
        title,
        image(pictures.progress, "Quality against updates, EMA and raw weights"),
        table(_SNAPSHOT_HEADER, rows),
        (start if rows[0][0] == "0" else "") + _snapshot_note(results),
    ]


def _inside(pictures: Pictures) -> list[str]:
    if not pictures.layers:
        return []
    return [
        "## Inside the model (APT Appendices G and I)",
        "A linear projection per layer predicts the final latents of the one-step model "
        "(`diffusion-apt probe`). The plot shows its error on noise that it was not fitted on; "
        "the sheet shows its predictions.",
        image(pictures.errors, "Error of each layer's projection"),
        image(pictures.layers, "What each layer knows"),
        "Samples of one caption on the path from one noise to a second and a third "
        "(`diffusion-apt traverse`). If a model switches between modes, its largest step is far "
        "above the mean step.",
        image(pictures.ways, "Paths between three noises"),
    ]


def _walks(pictures: Pictures) -> list[str]:
    if not pictures.walks:
        return []
    return [
        "## Rendered video: first-person walks",
        "The same four stages on clips that a game engine renders (`diffusion-apt data vizdoom`, "
        "1,500 clips of 64×64 pixels), in about an hour of one CPU core (`diffusion-apt train "
        "walks`): a first look, one run and one evaluation seed. Captions are those of 96 clips of "
        f"another seed. `diffusion-apt evaluate clips` made [all figures]({pictures.walks}). The "
        "codec limits detail: APT in one step comes close to the patch distance of the codec's own "
        "reconstructions. Motion is the weakness: most samples move less than the caption says, "
        "25 steps of diffusion included, whose loss was still falling when pre-training ended.",
        image(pictures.walks_sheet, "Walks: samples of every stage beside rendered clips"),
    ]


def _distillation(results: Results, pictures: Pictures) -> list[str]:
    rows = _snapshot_rows(results, CONSISTENCY.run)
    if not rows:
        return []
    return [
        "## The length of distillation",
        "The gain of APT over its start depends on the length of distillation, so that length was "
        "fixed before any ratio was measured.",
        image(pictures.distillation, "One-step quality against updates of distillation"),
        table(_SNAPSHOT_HEADER, rows),
        _snapshot_note(results),
    ]


_SNAPSHOT_HEADER = ["updates", "weights", "Fréchet ↓", "patch ↓", "accuracy ↑", "diversity within"]


def _snapshot_rows(results: Results, run: str) -> list[list[str]]:
    found: list[Snapshot] = [*results.of_run(run, "ema"), *results.of_run(run, "raw")]
    rows = []
    for snapshot in sorted(found, key=lambda s: (s.update, s.weights)):
        summary = snapshot.summary()
        cells = (plus_minus(summary[name]) for name in ("frechet", "patch", "accuracy", "within"))
        weights = "EMA" if snapshot.weights == "ema" else "raw"
        rows.append([str(snapshot.update), weights, *cells])
    return rows


def _snapshot_note(results: Results) -> str:
    if results.snapshot_samples == results.num_samples:
        return f"{results.snapshot_samples} samples per trial, as in the tables above."
    return (
        f"{results.snapshot_samples} samples per trial. Fréchet distances grow when there are "
        "fewer samples, so compare these only with each other."
    )


def _costs(costs: Sequence[Cost]) -> str:
    if not costs:
        return "The runs have no speed.jsonl, which holds the times of updates."
    rows = [
        [str(c.run), c.stage, str(c.updates), f"{c.seconds / 60:.1f}"]
        for c in costs
        if not c.stage.startswith("ablations/")
    ]
    ablations = [c for c in costs if c.stage.startswith("ablations/")]
    if ablations:
        minutes = sum(c.seconds for c in ablations) / 60
        updates = sum(c.updates for c in ablations)
        rows.append(["all", f"{len(ablations)} ablations", str(updates), f"{minutes:.1f}"])
    total = sum(c.seconds for c in costs) / 3600
    return (
        table(["training run", "stage", "updates", "minutes"], rows)
        + f"\n\n{total:.1f} hours of training in total (wall time)."
    )
