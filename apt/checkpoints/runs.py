"""The contents of a training run's folder, and the model that it stands for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from apt.checkpoints.info import INFO_FILE, PIPELINE_FILE
from apt.errors import CheckpointError, DataError, counted

EXPORT, SNAPSHOTS = "export", "snapshots"
LOG_NAME, SPEED_NAME, STATE_NAME = "log.jsonl", "speed.jsonl", "state.json"
_STATES = {"running": "is running, or was killed", "failed": "failed"}


def is_model(folder: Path) -> bool:
    """Whether a folder is a model, of ours or of diffusers."""
    return any((folder / name).is_file() for name in (INFO_FILE, PIPELINE_FILE))


def is_run(folder: Path) -> bool:
    """Whether a folder is the folder of one training run."""
    there = (folder / EXPORT / INFO_FILE, folder / STATE_NAME, folder / LOG_NAME)
    return not is_model(folder) and any(path.exists() for path in there)


def model_folder(folder: Path) -> Path:
    """Return the folder of the model that a folder stands for.

    A finished training run stands for its export, and an unfinished one for its last snapshot, with
    a warning. Any other folder stands for itself.

    Raises:
        CheckpointError: for a run that has neither yet, or a folder with several runs.
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
            f"the training run {str(folder)!r} has no model yet{_progress(folder)}; continue it "
            f"with `diffusion-apt train --resume {folder}` (--snapshot-at N also saves the model "
            "of update N)"
        )
    taken = folder / SNAPSHOTS / str(snapshots[-1]) / "ema"
    warnings.warn(
        f"the training run {str(folder)!r} is not finished{_progress(folder)}; using its last "
        f"snapshot, from update {snapshots[-1]}",
        stacklevel=1,  # the same place for all callers, so that it is shown once
    )
    return taken


def read_log(run_dir: Path, name: str = LOG_NAME) -> list[dict[str, float | None]]:
    """Read a run's `log.jsonl` or `speed.jsonl`: one dict per line, with `step` and the metrics.

    Non-finite values were written as null and are returned as `None`.

    Raises:
        DataError: if the file is missing, or a line before the last is not an entry.
    """
    file = run_dir / name
    if not file.is_file():
        raise DataError(f"{run_dir} has no {name}; expected the folder of a training run")
    return [json.loads(line) for line in log_lines(file)]


def log_lines(file: Path) -> list[str]:
    """Return the lines of a log, without an incomplete last line, which a kill may leave.

    Raises DataError for a line that is not an entry: an integer `step`, and numbers or null by
    name.
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
                raise ValueError("its step is not an integer")
            for name, value in entry.items():
                if not (value is None or isinstance(value, (int, float))):
                    raise ValueError(f"{name} is not a number")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{str(file)!r}, line {number}, is not a log entry ({error}); restore the file, or "
                "move it away"
            ) from error
    return lines


def snapshot_folder(run: Path, update: int, weights: str) -> Path:
    """Return the model folder of a run's snapshot.

    Raises CheckpointError, which lists the snapshots that exist, if there is no such one.
    """
    folder = run / SNAPSHOTS / str(update) / weights
    if not is_model(folder):
        there = snapshot_updates(run, weights)
        known = f"choose from updates {there}" if there else "the run has no snapshots"
        raise CheckpointError(f"{str(run)!r} has no {weights} snapshot of update {update}; {known}")
    return folder


def snapshot_updates(run: Path, weights: str = "ema") -> list[int]:
    """Return the updates of which a run has snapshots, in order."""
    found = (path.parent for path in run.glob(f"{SNAPSHOTS}/*/{weights}") if is_model(path))
    return sorted(int(folder.name) for folder in found if folder.name.isdigit())


def _refuse_several(folder: Path) -> None:
    """Raise CheckpointError for a folder of runs, which recipes with several stages create."""
    runs = [child for child in sorted(folder.iterdir()) if child.is_dir() and is_run(child)]
    if not runs:
        return
    finished = [run for run in runs if is_model(run / EXPORT)]
    newest = max(finished, key=lambda run: (run / EXPORT / INFO_FILE).stat().st_mtime, default=None)
    raise CheckpointError(
        f"{str(folder)!r} has several training runs ({', '.join(run.name for run in runs)}); name "
        f"one of them, such as {newest or runs[-1]}"
    )


def _progress(run: Path) -> str:
    """Describe the progress of a run, if its state is known."""
    try:
        state: dict[str, Any] = json.loads((run / STATE_NAME).read_text(encoding="utf-8"))
        words = _STATES.get(state["state"], "was stopped")
        return f" (it {words} after {state['update']} of {counted(state['num_updates'], 'update')})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
