"""Generate samples of one model for many prompts and seeds, in a folder with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apt.distributed.parallel import Parallel
from apt.errors import AptError
from apt.evaluate.models import SampleModel
from apt.media import write_media
from apt.outputs import RECORD_SUFFIX, Output, OutputRecord, check_folder
from apt.samples import MANIFEST, SampleKey

LOSSLESS = ".mkv"
_OF_RANKS = f"{Path(MANIFEST).stem}-rank*{RECORD_SUFFIX}"


def generate_samples(
    folder: Path,
    model: SampleModel,
    keys: Sequence[SampleKey],
    *,
    lossless: bool = False,
    parallel: Parallel | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a file for each prompt and seed: .mp4, or .png if the model makes single frames.

    If a call was interrupted, or files were damaged or lost, repeat it to make the rest, on any
    number of ranks. Samples that a model computes in one batch are made again together, so the
    results do not depend on interruptions or ranks.

    Args:
        folder: for the files and their manifest (`apt.samples`); created if missing.
        model: generates the samples.
        keys: prompts and seeds, all different.
        lossless: store videos without loss, at their own size, as .mkv.
        parallel: ranks that share the work; each records what it made in its own manifest.
        progress: called with the numbers of finished samples and of all samples.

    Returns the folder.

    Raises:
        InputError: a prompt, seed or option that does not fit; a folder that cannot be written, or
            that has samples of other settings, or of other prompts under the same names.
        PeerError: an error of another rank, raised after this one has made its share.
    """
    check_folder(folder)
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world_size)
    together(parallel, lambda: gather_manifests(folder, model))
    outputs = plan_outputs(folder, model, keys, lossless=lossless)
    record = _record(folder / MANIFEST, model)
    record.check(outputs)
    left = [
        output
        for batch in _batches(outputs, model)
        if not all(record.has(output) for output in batch)
        for output in batch
    ]
    problem: AptError | None = None
    try:
        make_share(
            folder,
            model,
            left,
            rank=rank,
            world=world,
            progress=lambda made: progress(len(outputs) - len(left) + made, len(outputs)),
        )
    except AptError as error:
        problem = error
    if parallel is not None:
        parallel.agree(problem)
    elif problem is not None:
        raise problem
    together(parallel, lambda: gather_manifests(folder, model))
    progress(len(outputs), len(outputs))
    return folder


def plan_outputs(
    folder: Path, model: SampleModel, keys: Sequence[SampleKey], *, lossless: bool = False
) -> list[Output]:
    """Return the file of each prompt and seed, in order; prompts are numbered as they occur."""
    suffix = ".png" if model.frames == 1 else LOSSLESS if lossless else ".mp4"
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in keys))}
    return [
        Output(
            path=folder / f"prompt{numbers[prompt]}-seed{seed}{suffix}", prompt=prompt, seed=seed
        )
        for prompt, seed in keys
    ]


def make_share(
    folder: Path,
    model: SampleModel,
    left: Sequence[Output],
    *,
    rank: int,
    world: int,
    progress: Callable[[int], None] = lambda made: None,
) -> None:
    """Generate one rank's share of the remaining outputs, and record it.

    Args:
        folder: contains the manifests.
        model: generates the samples.
        left: the remaining outputs, the same for all ranks: whole batches of the model, in order.
        rank, world: which rank, of how many.
        progress: called with the number of files that all ranks have made, if all are equally fast.

    Raises InputError as `generate_samples` does.
    """
    share = [output for batch in _batches(left, model)[rank::world] for output in batch]
    progress(0)
    if not share:
        return
    name = MANIFEST if world == 1 else _OF_RANKS.replace("*", str(rank))
    record = _record(folder / name, model)
    samples = model.stream([(output.prompt, output.seed) for output in share])
    for made, (output, video) in enumerate(zip(share, samples, strict=True), start=1):
        scale = 1 if output.path.suffix == LOSSLESS else None
        write_media(output.path, video, fps=model.fps, scale=scale)
        record.add(output)
        progress(min(made * world, len(left)))


def gather_manifests(folder: Path, model: SampleModel) -> None:
    """Merge the manifests of ranks into the folder's own.

    Raises InputError for manifests of other settings, or if a file cannot be written.
    """
    found = sorted(folder.glob(_OF_RANKS))
    if not found:
        return
    whole = _record(folder / MANIFEST, model)
    for path in found:
        whole.take(_record(path, model))
        path.unlink()


def _batches(outputs: Sequence[Output], model: SampleModel) -> list[Sequence[Output]]:
    size = model.batch_size
    return [outputs[start : start + size] for start in range(0, len(outputs), size)]


def _record(path: Path, model: SampleModel) -> OutputRecord:
    return OutputRecord(
        path,
        model.settings,
        resume=True,
        again="repeat the command; finished samples are kept",
        anew="choose another folder or name",
    )


def together(parallel: Parallel | None, action: Callable[[], object]) -> None:
    """Run an action on rank 0 while the others wait; if it fails, it fails on all."""
    if parallel is None:
        action()
    else:
        parallel.on_main(action)
