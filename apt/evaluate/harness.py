"""Run a protocol: generate the samples of each model, measure them, and write the page."""

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
"""Makes a progress bar with a description; the bar is called with (done, total)."""


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
    """Evaluate models by a protocol; return the page, or None on ranks other than 0.

    Writes ``samples/<model>/`` and, named after the protocol, a page as Markdown and as one HTML
    file, and a JSON file of every figure. Repeat an interrupted call to continue it: existing
    samples and figures are kept, and damaged files are made again.

    Args:
        config: the protocol's options.
        models: at least one, with different names.
        out: folder for the results, created if missing.
        device: None uses a GPU if there is one.
        dtype: of the weights; None is float32, or what a peer's card says.
        command: the command line, shown on the page.
        parallel: ranks that share the samples.
        progress: makes progress bars.

    Raises:
        InputError: models, options or files that do not fit, or a file that cannot be written.
        CheckpointError: a model that does not exist or cannot be loaded.
        DataError: a sample or a reference that cannot be read.
    """
    names = [choice.name for choice in models]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"expected at least one model, all with different names, got {names}; add NAME=..."
        )
    for choice in models:
        check_model(choice)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    protocol = config.build(Request(out, tuple(models)))
    with progress("references") as update:
        update(0, 1)
        together(parallel, protocol.prepare)
    folders = {name: out / "samples" / name for name in names}
    for choice in models:
        with progress(f"samples of {choice.name}") as update:
            model = load_model(choice.sized(protocol.options), device=device, dtype=dtype)
            make_samples(protocol, model, folders[choice.name], parallel=parallel, progress=update)
        del model  # frees memory for the next one
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
    """Generate a model's samples for a protocol, of all evaluation seeds, into a folder.

    Raises what `apt.evaluate.generate.generate_samples` raises.
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
    """Return every figure of every model and seed, reusing those of earlier calls."""
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
    """Return the figures of one model's samples, by evaluation seed and name.

    Args:
        protocol: defines the measures.
        folder: the samples.
        out: folder of the file of known figures, which are not measured again.
        first: the first model's samples, for pair measures; None, or the same samples, skips these.
        progress: called with the numbers of finished seeds and of all seeds.

    Raises DataError for a sample that changed since it was made, and what the measures raise.
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
    """Return the samples in the protocol's order. Raises DataError for one that has changed."""
    samples = [folder.samples[key] for key in protocol.keys(seed)]
    for sample in samples:
        try:
            whole = file_content(sample.path)[1] == sample.sha256
        except OSError:
            whole = False
        if not whole:
            raise DataError(
                f"{str(sample.path)!r} was truncated or changed since it was made; evaluate "
                "again: it is made again, and everything else is kept"
            )
    return samples
