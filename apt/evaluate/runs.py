"""What a training run leaves behind: its log and its snapshots."""

from __future__ import annotations

import json
from pathlib import Path

from apt.errors import DataError
from apt.evaluate.methods import LOG, SNAPSHOTS
from apt.evaluate.results import LossCurve

DISCRIMINATOR_LOSS = "discriminator/loss"


def read_loss_curve(run: Path, label: str) -> LossCurve | None:
    """Discriminator loss of a run from its ``log.jsonl``; None if there is no such log.

    Raises ``DataError`` for a damaged line, or a log without that loss. A last line that was cut
    short by a kill is left out, as on a resume.
    """
    file = run / LOG
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    updates, losses = [], []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            update, loss = int(entry["step"]), entry.get(DISCRIMINATOR_LOSS)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{str(file)!r}, line {number}, is not a log entry ({error}); expected JSON with "
                "'step'. Restore the file, or remove it to leave its curve out."
            ) from error
        if loss is not None:
            updates.append(update)
            losses.append(float(loss))
    if not losses:
        raise DataError(f"{str(file)!r} holds no {DISCRIMINATOR_LOSS!r}; it is no adversarial run.")
    return LossCurve(label=label, updates=updates, losses=losses)


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
