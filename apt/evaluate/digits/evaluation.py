"""`diffusion-apt evaluate digits`: from trained models to the results page, without a hand between.

A training run is a root with folders ``pretrain``, ``distill``, ``apt`` and perhaps ``apt_paper``
and ``ablations/<name>``, each with ``log.jsonl``, ``export/`` (the model), perhaps
``speed.jsonl``, which knows the time, and perhaps ``snapshots/<update>/{ema,raw}/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from apt.checkpoints.info import read_info
from apt.checkpoints.runs import is_run
from apt.errors import CheckpointError, ConfigError
from apt.evaluate.digits.classifier import (
    Accuracy,
    DigitsClassifier,
    load_classifier,
)
from apt.evaluate.digits.clips import (
    CaptionSet,
    caption_set,
    generate,
    real_for_captions,
    real_reference,
)
from apt.evaluate.digits.config import EvaluateConfig
from apt.evaluate.digits.inside import write_inside
from apt.evaluate.digits.judges import independent_judges
from apt.evaluate.digits.measure import Judge, Measurement, pixel_diversity
from apt.evaluate.digits.methods import (
    APT,
    CONSISTENCY,
    LONG,
    MAIN_METHODS,
    NO_REGULARISER,
    Method,
    ablation_methods,
)
from apt.evaluate.digits.page import render_page, shown_captions, write_page
from apt.evaluate.digits.results import Cost, Curve, MethodResult, Results, Snapshot, trial
from apt.evaluate.digits.runs import check_data, read_cost, read_curves, snapshot_folders
from apt.evaluate.machine import machine
from apt.metrics import Diversity, power_spectrum

_MAIN_JUDGE = "main"
_ABLATED = (f"ablations/{LONG}", f"ablations/{NO_REGULARISER}")
_STAGES = ("codec", "pretrain", "distill", "apt", "apt_paper")


def evaluate_digits(config: EvaluateConfig) -> Path:
    """Measure every model of the runs and write the report; returns its path.

    Writes ``digits.md``, the same as one HTML file, ``digits.json`` (every figure of every trial)
    and PNGs, some of them in ``digits_inside``. What was not trained is left out and named, unless
    it is one of the main models. Why a bar was missed is read from ``digits_causes.json`` beside
    the report. The same models and config give the same figures.

    Raises:
        CheckpointError: a main run has no exported model, or one of other data, or a model cannot
            be loaded.
        ConfigError: a method is unknown.
        DataError: there is nothing to render.
    """
    if config.render:
        return render_page(config.out)
    chosen = [_choose(config, root) for root in config.runs]
    for root, methods in zip(config.runs, chosen, strict=True):
        for method in methods:
            check_data(method.folder(root), config.classifier.setting)
    with _Evaluation.open(config) as evaluation:
        real = evaluation.measure_real()
        for number, (root, methods) in enumerate(zip(config.runs, chosen, strict=True), start=1):
            for method in methods:
                evaluation.measure(method, root, number)
        snapshots = [] if config.methods else evaluation.measure_snapshots()
    captions = evaluation.sets[0]
    if not config.methods:
        write_inside(
            config.out, config.runs[0], shown_captions(captions), batch_size=config.batch_size
        )
    results = Results(
        runs=len(config.runs),
        seeds=config.seeds,
        num_samples=config.num_samples,
        samples_per_caption=config.samples_per_caption,
        num_heldout=len(captions.heldout),
        num_reference=config.num_reference,
        snapshot_samples=config.snapshot_samples,
        setting=config.classifier.setting,
        machine=machine(),
        precision=config.precision,
        classifiers=evaluation.accuracies,
        real=real,
        methods=list(evaluation.rows.values()),
        curves=_curves(config.runs),
        snapshots=snapshots,
        costs=_costs(config.runs),
        reference_power=evaluation.reference_power,
    )
    return write_page(config.out, results, captions, evaluation.shown)


def _choose(config: EvaluateConfig, root: Path) -> list[Method]:
    """The methods of a root that are asked for and were run."""
    known = {m.name: m for m in [*MAIN_METHODS, *ablation_methods(root)]}
    unknown = [name for name in config.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown methods {unknown}; choose from {', '.join(known)}.")
    chosen = [known[name] for name in config.methods] if config.methods else list(known.values())
    for method in chosen:
        if method.group == "main" and not method.was_run(root):
            if is_run(root):
                raise CheckpointError(
                    f"{str(root)!r} is the run of one stage; --runs takes the folder that has the "
                    "runs of all stages in it"
                )
            raise CheckpointError(
                f"{str(method.folder(root))!r} is missing, which {method.name!r} needs; "
                "expected the model folder of a finished run. Train it (`diffusion-apt train "
                "digits`), or name other methods."
            )
    return [method for method in chosen if method.was_run(root)]


@dataclass
class _Evaluation:
    """The judges at work, and what they have found."""

    config: EvaluateConfig
    judge: Judge
    accuracies: dict[str, dict[str, Accuracy]]
    reference_power: list[float]
    say: Callable[[str], None]
    advance: Callable[[int], None]
    sets: list[CaptionSet]
    diversities: dict[tuple[int, int], Diversity] = field(default_factory=dict)
    rows: dict[str, MethodResult] = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, config: EvaluateConfig) -> Iterator[_Evaluation]:
        """Train the judges or take them from the cache, and show how far the work is."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        configs = {_MAIN_JUDGE: config.classifier}
        if config.independent_judges:
            configs |= independent_judges(config.classifier)
        classifiers: dict[str, DigitsClassifier] = {}
        accuracies: dict[str, dict[str, Accuracy]] = {}
        for name, one in configs.items():
            console.print(f"judge {name!r}: training it, or taking it from the cache")
            classifiers[name], accuracies[name] = load_classifier(one, config.kept)
            right = accuracies[name]["test"].all
            console.print(f"judge {name!r}: {right:.3f} right on real held-out handwriting")
        setting = config.classifier.setting
        reference = real_reference(config.num_reference, setting)
        main = classifiers.pop(_MAIN_JUDGE)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
        ) as progress:
            task = progress.add_task("network evaluations", total=None)
            yield cls(
                config=config,
                judge=Judge(main, reference, classifiers),
                accuracies=accuracies,
                reference_power=power_spectrum(reference).spatial.tolist(),
                say=lambda text: console.print(text),
                advance=lambda done: progress.advance(task, done),
                sets=[
                    caption_set(seed, config.num_samples, config.samples_per_caption, setting)
                    for seed in config.seeds
                ],
            )

    def measure_real(self) -> list[MethodResult]:
        """Rows of real clips of both handwritings."""
        rows = {
            name: MethodResult(name=f"real_{name}", label=label, group="real")
            for name, label in (
                ("test", "real clips, held-out handwriting"),
                ("train", "real clips, training handwriting"),
            )
        }
        for captions in self.sets:
            for name, row in rows.items():
                clips = real_for_captions(captions, "test" if name == "test" else "train")
                row.measurements[trial(1, captions.seed)] = self._figures(clips, captions)
                if name == "test":
                    self.shown.setdefault("real", clips)
        return list(rows.values())

    def measure(self, method: Method, root: Path, run: int) -> None:
        """One method of one training run, at every seed."""
        found = {}
        for captions in self.sets:
            clips = self._generate(method, method.folder(root), captions)
            found[trial(run, captions.seed)] = self._figures(clips, captions)
            if method.group != "ablation":
                self.shown.setdefault(method.name, clips)
        row = self.rows.setdefault(
            method.name, MethodResult.of(method, {}, read_info(method.folder(root)))
        )
        row.measurements.update(found)
        summary = row.summary()
        figures = (
            f"{name} {summary[name].mean:.3f}"
            for name in ("frechet", "patch", "accuracy", "within")
        )
        self.say(f"run {run}, {method.label}: {', '.join(figures)}")

    def measure_snapshots(self) -> list[Snapshot]:
        """Every snapshot of the stages that have any, with the start of APT as its update 0."""
        found: dict[tuple[str, str, int], dict[str, Measurement]] = {}
        config = self.config
        sets = [
            caption_set(
                seed,
                config.snapshot_samples,
                config.samples_per_caption,
                config.classifier.setting,
            )
            for seed in config.seeds
        ]
        for number, root in enumerate(config.runs, start=1):
            for run in (CONSISTENCY.run, APT.run, *_ABLATED):
                folders = snapshot_folders(root / run)
                if folders and run != CONSISTENCY.run:
                    start = CONSISTENCY.folder(root)
                    folders = [(0, weights, start) for weights in ("ema", "raw")] + folders
                for update, weights, folder in folders:
                    for captions in sets:
                        clips = self._generate(APT, folder, captions)
                        key = (run, weights, update)
                        found.setdefault(key, {})[trial(number, captions.seed)] = self._figures(
                            clips, captions
                        )
                    self.say(f"run {number}, {run} after {update} updates, {weights}: measured")
        return [
            Snapshot(run=run, weights=weights, update=update, measurements=measurements)
            for (run, weights, update), measurements in found.items()
        ]

    def _generate(self, method: Method, folder: Path, captions: CaptionSet) -> Tensor:
        return generate(
            method,
            folder,
            captions,
            batch_size=self.config.batch_size,
            precision=self.config.precision,
            cache=self.config.kept,
            advance=self.advance,
        )

    def _figures(self, clips: Tensor, captions: CaptionSet) -> Measurement:
        """Measure clips; diversity 1 is that of real clips of the same captions."""
        key = (captions.seed, len(captions.labels))
        if key not in self.diversities:
            self.diversities[key] = pixel_diversity(real_for_captions(captions, "test"), captions)
        return self.judge.measure(clips, captions, self.diversities[key])


def _curves(roots: Sequence[Path]) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = {}
    for root in roots:
        for run in (APT.run, *_ABLATED):
            if run not in curves and (found := read_curves(root / run)):
                curves[run] = found
    return curves


def _costs(roots: Sequence[Path]) -> list[Cost]:
    found = []
    for number, root in enumerate(roots, start=1):
        ablations = root / "ablations"
        names = sorted(p.name for p in ablations.iterdir()) if ablations.is_dir() else []
        for stage in (*_STAGES, *(f"ablations/{name}" for name in names)):
            cost = read_cost(root, stage, number)
            if cost is not None:
                found.append(cost)
    return found
