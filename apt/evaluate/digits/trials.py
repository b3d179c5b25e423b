"""Sample the models of training runs with the harness, and measure every trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from apt.distributed.parallel import Parallel
from apt.evaluate.choice import ModelChoice
from apt.evaluate.digits.classifier import Accuracy, load_classifier
from apt.evaluate.digits.clips import (
    CaptionSet,
    caption_set,
    read_digits,
    real_for_captions,
    real_reference,
)
from apt.evaluate.digits.config import EvaluateConfig
from apt.evaluate.digits.judges import independent_judges
from apt.evaluate.digits.measure import Judge, Measurement, pixel_diversity
from apt.evaluate.digits.methods import ABLATED, APT, CONSISTENCY, Method
from apt.evaluate.digits.protocol import digits_protocol
from apt.evaluate.digits.reconstruction import Reconstruction
from apt.evaluate.digits.results import MethodResult, trial
from apt.evaluate.digits.runs import snapshot_folders
from apt.evaluate.generate import together
from apt.evaluate.harness import Progress, make_samples, measure_samples
from apt.evaluate.models import DtypeName, SampleModel, load_model
from apt.evaluate.protocol import Protocol
from apt.generate_options import GenerateOptions
from apt.metrics import power_spectrum
from apt.samples import read_samples

_MAIN = "main"
_DTYPES: dict[str, DtypeName] = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A model, and the method that samples it.

    Attributes:
        method, folder: how to sample, and where the model is.
        run: number of the training run, counted from 1.
        snapshot: run folder, weights and update; None is the end of a stage.
    """

    method: Method
    folder: Path
    run: int
    snapshot: tuple[str, str, int] | None = None

    @property
    def title(self) -> str:
        """A short description."""
        if self.snapshot is None:
            return f"run {self.run}, {self.method.label}"
        run, weights, update = self.snapshot
        return f"run {self.run}, {run} after {update} updates, {weights}"


def list_snapshots(roots: Sequence[Path]) -> list[Sampling]:
    """Return every snapshot of the stages that have any, with the start of APT as its update 0."""
    found = []
    for number, root in enumerate(roots, start=1):
        for run in (CONSISTENCY.run, APT.run, *ABLATED):
            folders = snapshot_folders(root / run)
            if folders and run != CONSISTENCY.run:
                start = CONSISTENCY.folder(root)
                folders = [(0, weights, start) for weights in ("ema", "raw")] + folders
            found += [
                Sampling(method=APT, folder=folder, run=number, snapshot=(run, weights, update))
                for update, weights, folder in folders
            ]
    return found


@dataclass(frozen=True)
class Judges:
    """The judges, their accuracies, and the spectrum of real clips."""

    judge: Judge
    accuracies: dict[str, dict[str, Accuracy]]
    reference_power: list[float]

    @classmethod
    def load(cls, config: EvaluateConfig) -> Judges:
        """Train the judges, or load them from the cache."""
        configs = {_MAIN: config.classifier}
        if config.independent_judges:
            configs |= independent_judges(config.classifier)
        loaded = {name: load_classifier(one, config.kept) for name, one in configs.items()}
        others = {name: found for name, (found, _) in loaded.items() if name != _MAIN}
        reference = real_reference(config.num_reference, config.classifier.setting)
        return cls(
            Judge(loaded[_MAIN][0], reference, others),
            {name: accuracies for name, (_, accuracies) in loaded.items()},
            power_spectrum(reference).spatial.tolist(),
        )


class Trials:
    """Makes and measures samples by two protocols: for whole stages, and for their snapshots.

    Attributes:
        sets: captions of whole stages, by evaluation seed.
    """

    def __init__(
        self, config: EvaluateConfig, parallel: Parallel | None, progress: Progress
    ) -> None:
        self._config, self._parallel, self._progress = config, parallel, progress
        self._judges = cache(lambda: Judges.load(config))
        self.sets = self._captions(config.num_samples)
        self._whole = self._protocol(self.sets)
        self._snapshots = self._protocol(self._captions(config.snapshot_samples))
        self._folders: dict[Sampling, Path] = {}

    @classmethod
    def prepare(
        cls, config: EvaluateConfig, parallel: Parallel | None, progress: Progress
    ) -> Trials:
        """Build the trials and load the judges, which only rank 0 needs."""
        trials = cls(config, parallel, progress)
        with progress("judges") as update:
            update(0, 1)
            together(parallel, trials._judges)
        return trials

    @property
    def judges(self) -> Judges:
        """The judges, loaded once."""
        return self._judges()

    def make(self, sampling: Sampling) -> None:
        """Make missing samples, in a folder whose name depends on everything that determines them.

        Raises CheckpointError for a model that cannot be loaded, InputError for a file that cannot
        be written.
        """
        protocol = self._protocol_of(sampling)
        model = self._load(sampling, protocol)
        about = json.dumps([model.settings, protocol.settings["samples"]], sort_keys=True)
        name = f"{sampling.method.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
        folder = self._folders[sampling] = self._config.kept / "samples" / name
        with self._progress(f"samples of {sampling.title}") as update:
            make_samples(protocol, model, folder, parallel=self._parallel, progress=update)

    def measure(self, sampling: Sampling) -> dict[str, Measurement]:
        """Return the figures of samples by trial. Raises DataError for a damaged sample."""
        with self._progress(f"figures of {sampling.title}") as update:
            found = measure_samples(
                self._protocol_of(sampling),
                read_samples(self._folders[sampling]),
                self._config.kept,
                progress=update,
            )
        return {
            trial(sampling.run, seed): Measurement.of_flat(figures)
            for seed, figures in found.items()
        }

    def measure_real(self) -> list[MethodResult]:
        """Return rows of real clips in both kinds of handwriting."""
        found = []
        for split, words in (("test", "held-out"), ("train", "training")):
            row = MethodResult(
                name=f"real_{split}", label=f"real clips, {words} handwriting", group="real"
            )
            for captions in self.sets:
                clips = real_for_captions(captions, "test" if split == "test" else "train")
                real = pixel_diversity(real_for_captions(captions, "test"), captions)
                measured = self.judges.judge.measure(clips, captions, real)
                row.measurements[trial(1, captions.seed)] = measured
            found.append(row)
        return found

    def clips(self, sampling: Sampling, positions: Sequence[int]) -> Tensor:
        """Return some samples of the first evaluation seed, (N, 3, T, H, W) in [-1, 1]."""
        samples = read_samples(self._folders[sampling]).samples
        keys = self.sets[0].keys
        setting = self.sets[0].setting
        return torch.stack([read_digits(samples[keys[i]].path, setting) for i in positions])

    def _protocol_of(self, sampling: Sampling) -> Protocol:
        return self._whole if sampling.snapshot is None else self._snapshots

    def _captions(self, number: int) -> list[CaptionSet]:
        config = self._config
        return [
            caption_set(seed, number, config.samples_per_caption, config.classifier.setting)
            for seed in config.seeds
        ]

    def _protocol(self, sets: Sequence[CaptionSet]) -> Protocol:
        config = self._config
        settings = {
            "samples": len(sets[0].trained),
            "samples_per_caption": config.samples_per_caption,
            "num_reference": config.num_reference,
            "independent_judges": config.independent_judges,
            "classifier": dataclasses.asdict(config.classifier),
        }
        return digits_protocol(sets, lambda: self.judges.judge, settings=settings)

    def _load(self, sampling: Sampling, protocol: Protocol) -> SampleModel:
        method, size = sampling.method, self._config.batch_size
        if not method.num_steps:
            return Reconstruction(sampling.folder, self.sets, batch_size=size)
        options = GenerateOptions(
            num_steps=method.num_steps, cfg_scale=None if method.guided else 1.0, batch_size=size
        )
        choice = ModelChoice(name=method.name, place=str(sampling.folder), options=options)
        device = None if self._parallel is None else self._parallel.device
        dtype = _DTYPES[self._config.precision]
        return load_model(choice.sized(protocol.options), device=device, dtype=dtype)
