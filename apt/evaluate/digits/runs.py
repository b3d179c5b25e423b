"""Read what a training run leaves behind: log, times, snapshots, and what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apt.checkpoints.info import read_info
from apt.checkpoints.runs import read_log
from apt.data.digits import Setting, clip_size
from apt.errors import CheckpointError, DataError
from apt.evaluate.digits.methods import LOG, SNAPSHOTS, SPEED
from apt.evaluate.digits.results import Cost, Curve

DISCRIMINATOR_LOSS = "discriminator/loss"
INPUT_GRADIENT = "discriminator/input_gradient"
CURVES = (DISCRIMINATOR_LOSS, INPUT_GRADIENT)
_SECONDS = "speed/seconds_per_update"


def check_data(folder: Path, setting: Setting) -> None:
    """Raise CheckpointError unless a model was trained on the digits of a setting."""
    info = read_info(folder)
    digits, found = clip_size(setting), info.sample
    if (found.frames, found.height, found.width) != (digits.frames, digits.side, digits.side):
        raise CheckpointError(
            f"{str(folder)!r} makes {found.frames} frames of {found.height}x{found.width}, but the "
            f"judges read the {setting} digits, {digits.frames} of {digits.side}x{digits.side}; "
            "name runs on those digits, or set --classifier.setting"
        )
    data = info.training.get("config", {}).get("data", {})
    source, of = data.get("source", "digits"), data.get("setting", setting)
    if source != "digits":
        raise CheckpointError(
            f"{str(folder)!r} was trained on the data source {source!r}, but the judges read "
            "only the built-in digits (`diffusion-apt train digits`)"
        )
    if of != setting:
        raise CheckpointError(
            f"{str(folder)!r} was trained on the {of} digits, but the judges read the {setting} "
            f"ones; add --classifier.setting {of}"
        )


def read_curves(run: Path) -> dict[str, Curve]:
    """Read D's loss and its gradient at its input from ``log.jsonl``; empty if there is no log.

    Raises ``DataError`` for a damaged line, or a log without D's loss. If a kill truncated the last
    line, it is ignored, as on a resume.
    """
    file = run / LOG
    if not file.is_file():
        return {}
    curves = {name: Curve(updates=[], values=[]) for name in CURVES}
    for update, entry in _entries(file):
        for name in CURVES:
            if (value := entry.get(name)) is not None:
                curves[name].updates.append(update)
                curves[name].values.append(value)
    if not curves[DISCRIMINATOR_LOSS].values:
        raise DataError(
            f"{str(file)!r} has no {DISCRIMINATOR_LOSS!r}, so the run is not adversarial."
        )
    return {name: curve for name, curve in curves.items() if curve.values}


def snapshot_folders(run: Path) -> list[tuple[int, str, Path]]:
    """Return (update, "ema" or "raw", model folder) of every snapshot of a run, in order."""
    folder = run / SNAPSHOTS
    if not folder.is_dir():
        return []
    updates = [path for path in folder.iterdir() if path.name.isdigit()]
    return sorted(
        (int(path.name), weights, path / weights)
        for path in updates
        for weights in ("ema", "raw")
        if (path / weights).is_dir()
    )


def read_cost(root: Path, stage: str, run: int) -> Cost | None:
    """Read the time of a stage's updates, resumed or not, from ``speed.jsonl``; None if missing.

    Raises ``DataError`` for a damaged line.
    """
    file = root / stage / SPEED
    if not file.is_file():
        return None
    times = {update: entry.get(_SECONDS) for update, entry in _entries(file)}
    seconds = {update: value for update, value in times.items() if value is not None}
    return Cost(run=run, stage=stage, updates=len(seconds), seconds=sum(seconds.values()))


def _entries(file: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Yield each update of a log with its entry, without a last line that a kill truncated."""
    for entry in read_log(file.parent, file.name):
        yield int(entry["step"] or 0), entry
