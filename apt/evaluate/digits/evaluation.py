"""`diffusion-apt evaluate digits`: measure trained models and write the results page.

A training run is a root folder with ``pretrain``, ``distill``, ``apt`` and optionally ``apt_paper``
and ``ablations/<name>``. Each of these has ``log.jsonl``, ``export/`` (the model) and optionally
``speed.jsonl`` (times) and ``snapshots/<update>/{ema,raw}/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from apt.checkpoints.info import read_info
from apt.checkpoints.runs import is_run
from apt.distributed.parallel import Parallel
from apt.errors import CheckpointError, ConfigError
from apt.evaluate.digits.clips import real_for_captions
from apt.evaluate.digits.config import EvaluateConfig
from apt.evaluate.digits.inside import write_inside
from apt.evaluate.digits.methods import (
    ABLATED,
    APT,
    MAIN_METHODS,
    Method,
    ablation_methods,
)
from apt.evaluate.digits.page import render_page, shown_captions, shown_positions, write_page
from apt.evaluate.digits.results import Cost, Curve, MethodResult, Results, Snapshot
from apt.evaluate.digits.runs import check_data, read_cost, read_curves
from apt.evaluate.digits.trials import Sampling, Trials, list_snapshots
from apt.evaluate.harness import Progress
from apt.evaluate.machine import machine

_STAGES = ("codec", "pretrain", "distill", "apt", "apt_paper")


def evaluate_digits(
    config: EvaluateConfig,
    *,
    parallel: Parallel | None = None,
    progress: Progress = lambda _: nullcontext(lambda done, total: None),
) -> Path | None:
    """Measure every model of the runs and write the report; return its path (None on other ranks).

    Samples are made and measured as in any protocol (`apt.evaluate.harness`): ranks share them, and
    an interrupted call is repeated to continue it. Writes ``digits.md``, the same page as one HTML
    file, ``digits.json`` (every figure of every trial) and PNGs, some of them in ``digits_inside``.
    The page leaves out and names models that were not trained; the main models are required. The
    reasons for missed targets are read from ``digits_causes.json`` beside the report. The same
    models and config give the same figures.

    Args:
        config: what to evaluate.
        parallel: ranks that share the samples.
        progress: makes progress bars.

    Raises:
        CheckpointError: a main run has no exported model or was trained on other data, or a model
            cannot be loaded.
        ConfigError: a method is unknown.
        DataError: there is nothing to render, or a sample changed since it was made.
        InputError: a file cannot be written.
    """
    is_main = parallel is None or parallel.is_main
    if config.render:
        return render_page(config.out) if is_main else None
    chosen = [_choose(config, root) for root in config.runs]
    for root, methods in zip(config.runs, chosen, strict=True):
        for method in methods:
            check_data(method.folder(root), config.classifier.setting)
    whole = [
        Sampling(method=method, folder=method.folder(root), run=number)
        for number, (root, methods) in enumerate(zip(config.runs, chosen, strict=True), start=1)
        for method in methods
    ]
    stages = [] if config.methods else list_snapshots(config.runs)
    trials = Trials.prepare(config, parallel, progress)
    for sampling in [*whole, *stages]:
        trials.make(sampling)
    if not is_main:
        return None
    captions = trials.sets[0]
    shown = {"real": real_for_captions(captions, "test", shown_positions(captions))}
    rows: dict[str, MethodResult] = {}
    for sampling in whole:
        method = sampling.method
        row = MethodResult.of(method, {}, read_info(sampling.folder))
        rows.setdefault(method.name, row).measurements.update(trials.measure(sampling))
        if method.group != "ablation" and method.name not in shown:
            shown[method.name] = trials.clips(sampling, shown_positions(captions))
    snapshots: dict[tuple[str, str, int], Snapshot] = {}
    for sampling in stages:
        assert sampling.snapshot is not None
        run, weights, updates = sampling.snapshot
        one = Snapshot(run=run, weights=weights, update=updates, measurements={})
        snapshots.setdefault(sampling.snapshot, one).measurements.update(trials.measure(sampling))
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
        classifiers=trials.judges.accuracies,
        real=trials.measure_real(),
        methods=list(rows.values()),
        curves=_curves(config.runs),
        snapshots=list(snapshots.values()),
        costs=_costs(config.runs),
        reference_power=trials.judges.reference_power,
    )
    return write_page(config.out, results, captions, shown)


def _choose(config: EvaluateConfig, root: Path) -> list[Method]:
    """Return the requested methods of a root that were run."""
    known = {m.name: m for m in [*MAIN_METHODS, *ablation_methods(root)]}
    unknown = [name for name in config.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown methods {unknown}; choose from {', '.join(known)}.")
    chosen = [known[name] for name in config.methods] if config.methods else list(known.values())
    for method in chosen:
        if method.group == "main" and not method.was_run(root):
            if is_run(root):
                raise CheckpointError(
                    f"{str(root)!r} is the run of one stage; --runs takes the folder that contains "
                    "the runs of all stages"
                )
            raise CheckpointError(
                f"{str(method.folder(root))!r} is missing, but {method.name!r} needs it; "
                "expected the model folder of a finished run. Train it (`diffusion-apt train "
                "digits`), or choose other methods."
            )
    return [method for method in chosen if method.was_run(root)]


def _curves(roots: Sequence[Path]) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = {}
    for root in roots:
        for run in (APT.run, *ABLATED):
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
