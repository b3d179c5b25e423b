"""What a training run leaves behind: its log, its times, its snapshots, and what it trained on."""

from __future__ import annotations

import json
from pathlib import Path

from apt.checkpoints.info import read_info
from apt.data.digits import Setting, clip_size
from apt.errors import CheckpointError, DataError
from apt.evaluate.methods import LOG, SNAPSHOTS
from apt.evaluate.results import Cost, Curve

DISCRIMINATOR_LOSS = "discriminator/loss"
INPUT_GRADIENT = "discriminator/input_gradient"
CURVES = (DISCRIMINATOR_LOSS, INPUT_GRADIENT)


def check_data(folder: Path, setting: Setting) -> None:
    """Raise CheckpointError for a model that was not trained on the digits of a setting."""
    info = read_info(folder)
    digits, found = clip_size(setting), info.sample
    if (found.frames, found.height, found.width) != (digits.frames, digits.side, digits.side):
        raise CheckpointError(
            f"{str(folder)!r} makes {found.frames} frames of {found.height}x{found.width}; the "
            f"judges read the {setting} digits, {digits.frames} of {digits.side}x{digits.side}; "
            "name runs of those, or their setting with --classifier.setting"
        )
    data = info.training.get("config", {}).get("data", {})
    source, of = data.get("source", "digits"), data.get("setting", setting)
    if source != "digits":
        raise CheckpointError(
            f"{str(folder)!r} was trained on the data source {source!r}; the judges read the "
            "built-in digits alone (`diffusion-apt train digits`)"
        )
    if of != setting:
        raise CheckpointError(
            f"{str(folder)!r} was trained on the {of} digits, and the judges read the {setting} "
            f"ones; add --classifier.setting {of}"
        )


def read_curves(run: Path) -> dict[str, Curve]:
    """D's loss and its gradient at its input from ``log.jsonl``; empty if there is no such log.

    Raises ``DataError`` for a damaged line, or a log without D's loss. A last line that was cut
    short by a kill is left out, as on a resume.
    """
    file = run / LOG
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    curves = {name: Curve(updates=[], values=[]) for name in CURVES}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            update = int(entry["step"])
            found = {name: float(entry[name]) for name in CURVES if entry.get(name) is not None}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{str(file)!r}, line {number}, is not a log entry ({error}); expected JSON with "
                "'step'. Restore the file, or remove it to leave its curve out."
            ) from error
        for name, value in found.items():
            curves[name].updates.append(update)
            curves[name].values.append(value)
    if not curves[DISCRIMINATOR_LOSS].values:
        raise DataError(f"{str(file)!r} holds no {DISCRIMINATOR_LOSS!r}; it is no adversarial run.")
    return {name: curve for name, curve in curves.items() if curve.values}


def snapshot_folders(run: Path) -> list[tuple[int, str, Path]]:
    """(update, "ema" or "raw", model folder) of every snapshot of a run, in order."""
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
    """The time of a stage's updates, resumed or not, from its TensorBoard files; None without."""
    folder = root / stage / "tensorboard"
    if not folder.is_dir():
        return None
    # Slow to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    name = "seconds_per_update"
    if name not in events.Tags()["scalars"]:
        return None
    seconds = {event.step: event.value for event in events.Scalars(name)}
    return Cost(run=run, stage=stage, updates=len(seconds), seconds=sum(seconds.values()))
