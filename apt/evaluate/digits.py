"""`diffusion-apt evaluate digits`: from trained models to the results page, without a hand between.

Runs are folders under one root: ``pretrain``, ``distill``, ``apt`` and ``ablations/<name>``, each
with ``log.jsonl``, ``export/`` (the model) and perhaps ``snapshots/<update>/{ema,raw}/``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.info import read_info
from apt.data.digits import TRAIN_LABELS
from apt.errors import CheckpointError, ConfigError
from apt.evaluate import plots
from apt.evaluate.clips import (
    CaptionSet,
    Precision,
    caption_set,
    generate,
    real_for_captions,
    real_reference,
    to_frames,
)
from apt.evaluate.digits_classifier import ClassifierConfig, load_classifier
from apt.evaluate.measure import Judge, Measurement, pixel_diversity
from apt.evaluate.methods import (
    APT,
    CONSISTENCY,
    DIFFUSION_GUIDED,
    MAIN_METHODS,
    NO_REGULARISER,
    Method,
    ablation_methods,
)
from apt.evaluate.report import Pictures, report_text
from apt.evaluate.results import LossCurve, MethodResult, Results
from apt.evaluate.results import Progress as ProgressPoint
from apt.evaluate.runs import read_loss_curve, snapshot_folders
from apt.media import write_contact_sheet
from apt.metrics import Diversity, power_spectrum

_REPORT, _DATA = "digits.md", "digits.json"
_SHEET_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, and how thoroughly.

    Attributes:
        runs: root of the training runs.
        out: folder of the report, its plots and its raw figures.
        seeds: evaluation seeds; each draws its own captions, noise and real clips.
        num_samples: samples of each method and seed; Fréchet distances compare at equal numbers.
            The default is every trained caption twice: fewer captions than the reference has
            would count as a difference from it.
        samples_per_caption: how many of them share a caption, for the diversity.
        num_reference: real clips that everything is compared with.
        snapshot_samples: samples of each snapshot and seed in the quality-against-updates plot.
        methods: names of the methods to measure; empty is all.
        batch_size: samples per network call.
        precision: that networks compute in. They are trained in bf16 autocast, and are saved in it.
        cache: folder of the classifier and of slow samples; None is ``<runs>/evaluation``.
        classifier: the judge; its setting of the digits is that of all real clips.
    """

    runs: Path = Path("runs/digits")
    out: Path = Path("docs/results")
    seeds: tuple[int, ...] = (0, 1, 2)
    num_samples: int = 432
    samples_per_caption: int = 2
    num_reference: int = 2048
    snapshot_samples: int = 216
    methods: tuple[str, ...] = ()
    batch_size: int = 32
    precision: Precision = "bf16"
    cache: Path | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different numbers, at least one; got {self.seeds}.")
        if self.samples_per_caption < 2:
            raise ConfigError(
                f"samples_per_caption is {self.samples_per_caption}; diversity within a caption "
                "needs at least 2."
            )
        most = self.samples_per_caption * len(TRAIN_LABELS)
        least = self.samples_per_caption * 2
        for name in ("num_samples", "snapshot_samples"):
            number = getattr(self, name)
            if number % self.samples_per_caption or not least <= number <= most:
                raise ConfigError(
                    f"{name} is {number}; with {self.samples_per_caption} samples per caption it "
                    f"must be a multiple of that from {least} to {most}."
                )
        for name in ("num_reference", "batch_size"):
            if getattr(self, name) < (2 if name == "num_reference" else 1):
                raise ConfigError(f"{name} is {getattr(self, name)}, which is too small.")


def evaluate_digits(config: EvaluateConfig) -> Path:
    """Measure every model under ``config.runs`` and write the report; returns its path.

    Writes ``digits.md``, ``digits.json`` (every figure of every seed) and PNGs. A run that is
    missing is shown as not run, unless it is one of the three main ones. The same models and
    config give the same figures.

    Raises:
        CheckpointError: a main run has no exported model, or a model cannot be loaded.
        ConfigError: a method is unknown.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    cache = config.runs / "evaluation" if config.cache is None else config.cache
    methods = _choose(config)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print("classifier: training it, or taking it from the cache")
    classifier, accuracies = load_classifier(config.classifier, cache)
    console.print(f"classifier: {accuracies['test'].all:.3f} right on real held-out handwriting")
    setting = config.classifier.setting
    reference = real_reference(config.num_reference, setting)
    judge = Judge(classifier, reference)
    sets, small = (
        [caption_set(s, num, config.samples_per_caption, setting) for s in config.seeds]
        for num in (config.num_samples, config.snapshot_samples)
    )
    ready = [method for method in methods if method.was_run(config.runs)]
    snapshots = snapshot_folders(config.runs / APT.run)
    if snapshots and CONSISTENCY.was_run(config.runs):
        start = CONSISTENCY.folder(config.runs)
        snapshots = [(0, weights, start) for weights in ("ema", "raw")] + snapshots

    work = sum(len(c.labels) * m.evaluations for m in ready for c in sets)
    work += len(snapshots) * sum(len(c.labels) for c in small)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("sampling", total=work)

        def advance(evaluations: int) -> None:
            progress.advance(task, evaluations)

        real, diversities = _measure_real(judge, sets)
        results: list[MethodResult] = []
        shown: dict[str, Tensor] = {"real clips": real_for_captions(sets[0], "test")}
        for method in methods:
            measurements: list[Measurement] = []
            for captions, diversity in zip(sets, diversities, strict=True):
                if method not in ready:
                    continue
                progress.update(task, description=method.label)
                clips = generate(
                    method,
                    method.folder(config.runs),
                    captions,
                    batch_size=config.batch_size,
                    precision=config.precision,
                    cache=cache,
                    advance=advance,
                )
                measurements.append(judge.measure(clips, captions, diversity))
                shown.setdefault(method.label, clips)
            info = read_info(method.folder(config.runs)) if measurements else None
            results.append(MethodResult.of(method, measurements, info))
            console.print(_line(results[-1]))
        points = _measure_snapshots(config, judge, snapshots, small, cache, advance)

    found = Results(
        seeds=config.seeds,
        num_samples=config.num_samples,
        samples_per_caption=config.samples_per_caption,
        num_heldout=len(sets[0].heldout),
        num_reference=config.num_reference,
        snapshot_samples=config.snapshot_samples,
        machine=_machine(),
        precision=config.precision,
        classifier=accuracies,
        real=real,
        methods=results,
        curves=_curves(config.runs),
        progress=points,
        reference_power=power_spectrum(reference).spatial.tolist(),
    )
    return _write(config, found, sets[0], shown)


def _choose(config: EvaluateConfig) -> list[Method]:
    known = {m.name: m for m in [*MAIN_METHODS, *ablation_methods(config.runs)]}
    unknown = [name for name in config.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown methods {unknown}; choose from {', '.join(known)}.")
    chosen = [known[name] for name in config.methods] if config.methods else list(known.values())
    for method in chosen:
        if method.group == "main" and not method.was_run(config.runs):
            raise CheckpointError(
                f"{str(method.folder(config.runs))!r} is missing, which {method.name!r} needs; "
                "expected the model folder of a finished run. Train it (`diffusion-apt train "
                "digits`), or name other methods."
            )
    return chosen


def _measure_real(
    judge: Judge, sets: Sequence[CaptionSet]
) -> tuple[list[MethodResult], list[Diversity]]:
    """Rows of real clips of both handwritings, and the diversity that is 1 at each seed."""
    diversities, test, train = [], [], []
    for captions in sets:
        clips = real_for_captions(captions, "test")
        diversity = pixel_diversity(clips, captions)
        diversities.append(diversity)
        test.append(judge.measure(clips, captions, diversity))
        train.append(judge.measure(real_for_captions(captions, "train"), captions, diversity))

    def row(name: str, label: str, measurements: list[Measurement]) -> MethodResult:
        return MethodResult(
            name=name,
            label=label,
            group="real",
            num_steps=None,
            evaluations=None,
            updates=None,
            cfg_scale=None,
            measurements=measurements,
        )

    rows = [
        row("real_test", "real clips, held-out handwriting", test),
        row("real_train", "real clips, training handwriting", train),
    ]
    return rows, diversities


def _measure_snapshots(
    config: EvaluateConfig,
    judge: Judge,
    snapshots: Sequence[tuple[int, str, Path]],
    sets: Sequence[CaptionSet],
    cache: Path,
    advance: Callable[[int], None],
) -> list[ProgressPoint]:
    if not snapshots:
        return []
    diversities = [pixel_diversity(real_for_captions(c, "test"), c) for c in sets]
    points = []
    for update, weights, folder in snapshots:
        measurements = []
        for captions, diversity in zip(sets, diversities, strict=True):
            clips = generate(
                APT,
                folder,
                captions,
                batch_size=config.batch_size,
                precision=config.precision,
                cache=cache,
                advance=advance,
            )
            measurements.append(judge.measure(clips, captions, diversity))
        points.append(ProgressPoint(weights=weights, update=update, measurements=measurements))
    return points


def _curves(runs: Path) -> dict[str, LossCurve]:
    wanted = {
        "apt": (runs / APT.run, "with regulariser"),
        NO_REGULARISER: (runs / "ablations" / NO_REGULARISER, "without regulariser"),
    }
    found = {key: read_loss_curve(folder, label) for key, (folder, label) in wanted.items()}
    return {key: curve for key, curve in found.items() if curve is not None}


def _write(
    config: EvaluateConfig, results: Results, captions: CaptionSet, shown: dict[str, Tensor]
) -> Path:
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    # One sample of each of the first captions.
    rows = list(range(0, len(captions.trained), config.samples_per_caption))[:_SHEET_ROWS]
    texts = [captions.trained[i].caption for i in rows]
    names = {m.label: m.name for m in results.methods} | {"real clips": "real"}
    sheets = {}
    for label, clips in shown.items():
        cells = [[to_frames(clips[i])[::2]] for i in rows]
        file = out / f"digits_samples_{names[label]}.png"
        write_contact_sheet(file, cells, rows=texts, columns=[label], scale=2)
        sheets[label] = file.name
    main = [
        "real clips",
        *(m.label for m in (DIFFUSION_GUIDED, CONSISTENCY, APT) if m.label in shown),
    ]
    comparison = out / "digits_comparison.png"
    write_contact_sheet(
        comparison,
        [[to_frames(shown[label][i])[::4] for label in main] for i in rows],
        rows=texts,
        columns=main,
        scale=2,
    )
    pictures = Pictures(
        methods=_name(plots.plot_methods(results, out / "digits_methods.png")),
        discriminator_loss=_name(
            plots.plot_discriminator_loss(results.curves, out / "digits_discriminator_loss.png")
        ),
        progress=_name(plots.plot_progress(results, out / "digits_progress.png")),
        spectrum=_name(plots.plot_spectrum(results, out / "digits_spectrum.png")),
        comparison=comparison.name,
        sheets=sheets,
    )
    document = json.dumps(_finite(dataclasses.asdict(results)), indent=1) + "\n"
    (out / _DATA).write_text(document, encoding="utf-8")
    report = out / _REPORT
    text = report_text(results, pictures, command="diffusion-apt evaluate digits", data_file=_DATA)
    report.write_text(text, encoding="utf-8")
    return report


def _line(result: MethodResult) -> str:
    if not result.was_run:
        return f"{result.label}: not run"
    summary = result.summary()
    figures = ", ".join(
        f"{name} {summary[name].mean:.3f}" for name in ("frechet", "patch", "accuracy", "within")
    )
    return f"{result.label}: {figures}"


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _finite(value: Any) -> Any:
    """JSON has no infinity and no nan: both become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
