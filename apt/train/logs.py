"""What a run tells while it trains: a JSONL file, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apt.errors import DataError

__all__ = ["LOG_NAME", "RunLog", "read_log"]

LOG_NAME = "log.jsonl"


def read_log(run_dir: Path) -> list[dict[str, float | None]]:
    """Read `log.jsonl` of a run: one dict per line, `step` and the metrics.

    Non-finite values were written as null and come back as `None`.

    Raises:
        DataError: the file is missing, or a line before the last is not JSON.
    """
    file = run_dir / LOG_NAME
    if not file.is_file():
        raise DataError(f"{run_dir} has no {LOG_NAME}; expected the folder of a training run")
    return [json.loads(line) for line in _whole_lines(file)]


def _whole_lines(file: Path) -> list[str]:
    """The lines of a JSONL file, without one that a kill cut short at the end."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}, line {number}, is not a log entry: {error}") from error
    return lines


class RunLog:
    """Writes metrics of a run; silent on ranks other than 0.

    `log.jsonl` holds nothing that depends on the clock or the machine's load, so that the file
    of a resumed run equals the one of an uninterrupted run byte for byte. On a terminal a progress
    bar shows the time left; elsewhere a plain line is printed from time to time.

    Args:
        run_dir: folder of the run; created if missing.
        total_steps: number of updates of the whole run.
        resume_step: updates already done; later lines of an earlier attempt are removed.
        enabled: whether this rank writes (rank 0).
        title: what the progress line calls the run.
        interval: seconds between progress lines where stderr is no terminal.

    Raises:
        DataError: an existing log is not one of ours.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        resume_step: int,
        enabled: bool = True,
        *,
        title: str = "training",
        interval: float = 15.0,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        # Imported here: it takes seconds, and the other ranks and commands never need it.
        from torch.utils.tensorboard import SummaryWriter

        self._total = total_steps
        self._first = resume_step
        self._title = title
        self._interval = interval
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = _open_after(run_dir / LOG_NAME, resume_step)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        self._console = Console(stderr=True)
        self._start = time.monotonic()
        self._printed = -math.inf
        self._last_line = (-1, "")
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                title, total=total_steps, completed=resume_step, metrics=""
            )
            self._progress.start()

    def write(
        self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float] | None = None
    ) -> None:
        """Record the metrics of an update.

        Args:
            step: number of updates done, counted from 1.
            metrics: finite or not; a non-finite value becomes null in the JSONL file.
            timing: what depends on the clock (seconds, samples per second): TensorBoard only.
        """
        if not self.enabled:
            return
        entry = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **entry}) + "\n")
        # Flushed line by line, so that a killed process loses at most the line it was writing.
        self._file.flush()
        for key, value in {**metrics, **(timing or {})}.items():
            self._board.add_scalar(key, float(value), step)
        shown = "  ".join(f"{key} {float(value):.4g}" for key, value in metrics.items())
        self._show(step, shown)

    def message(self, text: str) -> None:
        """Print a line for the user above the progress bar."""
        if self.enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """Force the log onto the disk; called before a checkpoint, which must not outlive it."""
        if self.enabled:
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Close the files and the progress bar; further calls do nothing."""
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.stop()
        elif self._last_line[0] >= 0:
            self._print_line(*self._last_line)
        self._file.close()
        self._board.close()
        self.enabled = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _show(self, step: int, shown: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, metrics=shown)
        elif time.monotonic() - self._printed >= self._interval:
            self._print_line(step, shown)
        else:
            self._last_line = (step, shown)

    def _print_line(self, step: int, shown: str) -> None:
        self._printed = time.monotonic()
        self._last_line = (-1, "")
        per_step = (self._printed - self._start) / max(step - self._first, 1)
        left = timedelta(seconds=round(per_step * (self._total - step)))
        self.message(
            f"{self._title}: {step}/{self._total}  {per_step:.2f} s/update, {left} left  {shown}"
        )


def _open_after(file: Path, resume_step: int) -> IO[str]:
    """Open the log for appending behind the line of `resume_step`, dropping what is later."""
    if file.exists():
        lines = _whole_lines(file)
        kept = "".join(line for line in lines if json.loads(line)["step"] <= resume_step)
        temporary = file.with_name(f".{file.name}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(kept)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    return file.open("a", encoding="utf-8")
