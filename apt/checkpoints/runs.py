"""What is in the folder of a training run, and the model that it stands for where one is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from apt.checkpoints.info import INFO_FILE, PIPELINE_FILE
from apt.errors import CheckpointError, DataError

EXPORT, SNAPSHOTS = "export", "snapshots"
LOG_NAME, SPEED_NAME, STATE_NAME = "log.jsonl", "speed.jsonl", "state.json"
_STATES = {"running": "is at work, or was killed", "failed": "ended with an error"}


def is_model(folder: Path) -> bool:
    """Whether a folder is a model itself, of ours or of diffusers."""
    return any((folder / name).is_file() for name in (INFO_FILE, PIPELINE_FILE))


def is_run(folder: Path) -> bool:
    """Whether a folder is that of one training run."""
    there = (folder / EXPORT / INFO_FILE, folder / STATE_NAME, folder / LOG_NAME)
    return not is_model(folder) and any(path.exists() for path in there)


def model_folder(folder: Path) -> Path:
    """The folder of the model that a folder stands for.

    A training run stands for what it exported when it was finished, and one that is not finished
    for its last snapshot, with a warning that says so. Every other folder stands for itself.

    Raises:
        CheckpointError: a run that has neither yet, or a folder that holds several runs.
    """
    if is_model(folder):
        return folder
    if not is_run(folder):
        _refuse_several(folder)
        return folder
    if is_model(folder / EXPORT):
        return folder / EXPORT
    snapshots = snapshot_updates(folder)
    if not snapshots:
        raise CheckpointError(
            f"the training run {str(folder)!r} has no model yet{_progress(folder)}; "
            f"`diffusion-apt train --resume {folder}` goes on with it (--snapshot-at N keeps the "
            "model of update N on the way)"
        )
    taken = folder / SNAPSHOTS / str(snapshots[-1]) / "ema"
    warnings.warn(
        f"the training run {str(folder)!r} is not finished{_progress(folder)}: taking its last "
        f"snapshot, that of update {snapshots[-1]}",
        stacklevel=1,  # the same place for all, so that it is said once
    )
    return taken


def read_log(run_dir: Path, name: str = LOG_NAME) -> list[dict[str, float | None]]:
    """Read `log.jsonl` of a run, or `speed.jsonl`: one dict per line, `step` and the metrics.

    Non-finite values were written as null and come back as `None`.

    Raises:
        DataError: the file is missing, or a line before the last is no entry.
    """
    file = run_dir / name
    if not file.is_file():
        raise DataError(f"{run_dir} has no {name}; expected the folder of a training run")
    return [json.loads(line) for line in log_lines(file)]


def log_lines(file: Path) -> list[str]:
    """The lines of a log, without one that a kill cut short at the end.

    Raises DataError for one that is no entry: a whole `step`, and numbers or null by name.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is no log ({error}); restore the file, or move it away"
        ) from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise ValueError("its step is no whole number")
            for name, value in entry.items():
                if not (value is None or isinstance(value, (int, float))):
                    raise ValueError(f"{name} is no number")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{str(file)!r}, line {number}, is not a log entry ({error}); restore the file, or "
                "move it away"
            ) from error
    return lines


def snapshot_folder(run: Path, update: int, weights: str) -> Path:
    """The model of a run's snapshot. Raises CheckpointError that names those there are."""
    folder = run / SNAPSHOTS / str(update) / weights
    if not is_model(folder):
        there = snapshot_updates(run, weights)
        known = f"there are snapshots of updates {there}" if there else "the run kept none"
        raise CheckpointError(f"{str(run)!r} has no {weights} snapshot of update {update}; {known}")
    return folder


def snapshot_updates(run: Path, weights: str = "ema") -> list[int]:
    """The updates that a run has a snapshot of, in order."""
    found = (path.parent for path in run.glob(f"{SNAPSHOTS}/*/{weights}") if is_model(path))
    return sorted(int(folder.name) for folder in found if folder.name.isdigit())


def _refuse_several(folder: Path) -> None:
    """Raise CheckpointError for a folder of runs, as a recipe of several stages makes it."""
    runs = [child for child in sorted(folder.iterdir()) if child.is_dir() and is_run(child)]
    if not runs:
        return
    finished = [run for run in runs if is_model(run / EXPORT)]
    newest = max(finished, key=lambda run: (run / EXPORT / INFO_FILE).stat().st_mtime, default=None)
    raise CheckpointError(
        f"{str(folder)!r} holds the training runs {', '.join(run.name for run in runs)}; name one "
        f"of them, such as {newest or runs[-1]}"
    )


def _progress(run: Path) -> str:
    """How far a run is, as far as it says so."""
    try:
        state: dict[str, Any] = json.loads((run / STATE_NAME).read_text(encoding="utf-8"))
        words = _STATES.get(state["state"], "was stopped")
        return f" (it {words} after {state['update']} of {state['num_updates']} updates)"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
