"""One way for all: generate what a protocol asks of each model, measure it, write the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch

from apt.distributed.parallel import Parallel
from apt.errors import DataError, InputError
from apt.evaluate.choice import ModelChoice, check_model
from apt.evaluate.generate import generate_samples, together
from apt.evaluate.machine import machine
from apt.evaluate.measured import Measured
from apt.evaluate.models import DtypeName, SampleModel, load_model
from apt.evaluate.protocol import Protocol, ProtocolConfig, Request
from apt.evaluate.report import write_report
from apt.evaluate.results import Evaluation, ModelResult
from apt.outputs import check_folder, file_content
from apt.samples import Sample, SampleFolder, read_samples
from apt.version import __version__

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""A bar with a description, which is told what is done and of how much."""


def evaluate(
    config: ProtocolConfig,
    models: Sequence[ModelChoice],
    out: Path,
    *,
    device: torch.device | str | None = None,
    dtype: DtypeName | None = None,
    command: str = "",
    parallel: Parallel | None = None,
    progress: Progress = lambda _: nullcontext(lambda done, total: None),
) -> Path | None:
    """Evaluate models by a protocol; returns the page, None on other ranks than the first.

    Writes ``samples/<model>/`` and, by the protocol's name, a page as Markdown and as one HTML
    file, and a JSON file of every figure. An interrupted call is repeated: samples and figures
    that are there are kept, files that were damaged are made again.

    Args:
        config: the protocol's options.
        models: at least one, with different names.
        out: folder, made if need be.
        device: None takes a GPU if there is one.
        dtype: of the weights; None is float32, and what a peer's card says.
        command: that was called, for the page.
        parallel: ranks that share the samples.
        progress: shows how far the work is.

    Raises:
        InputError: models, options or files that do not fit, or a disk that refuses.
        CheckpointError: a model that is nowhere, or cannot be loaded.
        DataError: a sample or a reference that cannot be read.
    """
    names = [choice.name for choice in models]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"models need different names, and at least one; got {names}; name them with NAME=..."
        )
    for choice in models:
        check_model(choice)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    protocol = config.build(Request(out, tuple(models)))
    with progress("what is real") as update:
        update(0, 1)
        together(parallel, protocol.prepare)
    folders = {name: out / "samples" / name for name in names}
    for choice in models:
        with progress(f"samples of {choice.name}") as update:
            model = load_model(choice.sized(protocol.options), device=device, dtype=dtype)
            make_samples(protocol, model, folders[choice.name], parallel=parallel, progress=update)
        del model  # the next one needs its memory
    if parallel is not None and not parallel.is_main:
        return None
    found = {name: read_samples(folder) for name, folder in folders.items()}
    evaluation = Evaluation(
        protocol=protocol,
        command=command,
        machine=machine(),
        software=f"diffusion-apt {__version__}",
        models=measure(protocol, models, found, out, progress),
        baselines={name: figures() for name, figures in protocol.baselines.items()},
    )
    return write_report(out, evaluation, found)


def make_samples(
    protocol: Protocol,
    model: SampleModel,
    folder: Path,
    *,
    parallel: Parallel | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """What a protocol asks of a model, of all evaluation seeds, in a folder.

    Raises as `apt.evaluate.generate.generate_samples`.
    """
    sets = [protocol.keys(seed) for seed in protocol.seeds]
    total = sum(map(len, sets))
    before = 0

    def tell(done: int, _: int) -> None:
        progress(before + done, total)

    for keys in sets:
        generate_samples(
            folder,
            model,
            keys,
            lossless=protocol.lossless,
            parallel=parallel,
            progress=tell,
        )
        before += len(keys)


def measure(
    protocol: Protocol,
    models: Sequence[ModelChoice],
    folders: dict[str, SampleFolder],
    out: Path,
    progress: Progress,
) -> list[ModelResult]:
    """Every figure of every model and seed; those of earlier calls are not measured again."""
    results = []
    first = folders[models[0].name]
    for choice in models:
        folder = folders[choice.name]
        with progress(f"figures of {choice.name}") as update:
            figures = measure_samples(protocol, folder, out, first=first, progress=update)
        results.append(
            ModelResult(
                name=choice.name, place=choice.place, settings=folder.settings, figures=figures
            )
        )
    return results


def measure_samples(
    protocol: Protocol,
    folder: SampleFolder,
    out: Path,
    *,
    first: SampleFolder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, float]]:
    """Figures of one model's samples by evaluation seed, and then by name.

    Args:
        protocol: that is followed.
        folder: the samples.
        out: of the file of what is measured, which is not measured again.
        first: samples that pairs are made with; None, or the same ones, makes none.
        progress: called with the number of seeds that are done, and of all.

    Raises DataError for a sample that is not as it was made, and what the measures raise.
    """
    measured = Measured(out, [protocol.name, dict(protocol.settings), __version__])
    figures = {}
    for done, seed in enumerate(protocol.seeds):
        progress(done, len(protocol.seeds))
        figures[seed] = _figures(protocol, seed, folder, first or folder, measured)
    return figures


def _figures(
    protocol: Protocol, seed: int, folder: SampleFolder, first: SampleFolder, measured: Measured
) -> dict[str, float]:
    samples = _samples(protocol, seed, folder)
    figures: dict[str, float] = {}
    for number, one in enumerate(protocol.measures):
        figures |= measured.get(number, [samples], partial(one, samples))
    if protocol.pair_measures and folder is not first:
        others = _samples(protocol, seed, first)
        for number, pair in enumerate(protocol.pair_measures, start=len(protocol.measures)):
            figures |= measured.get(number, [samples, others], partial(pair, samples, others))
    return figures


def _samples(protocol: Protocol, seed: int, folder: SampleFolder) -> list[Sample]:
    """In the protocol's order, as they were made. Raises DataError for one that is not."""
    samples = [folder.samples[key] for key in protocol.keys(seed)]
    for sample in samples:
        try:
            whole = file_content(sample.path)[1] == sample.sha256
        except OSError:
            whole = False
        if not whole:
            raise DataError(
                f"{str(sample.path)!r} was cut off or changed since it was made; evaluate again: "
                "it is made anew, and what else is there is kept"
            )
    return samples
