"""The logs of a run: metrics and speed, in JSONL files, TensorBoard and a progress line.

FLOPs are those of the model's matrix products and attention: once for the forward pass, once for
gradients of inputs and once for gradients of weights. Recomputation is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from apt.checkpoints.runs import LOG_NAME, SPEED_NAME, log_lines, read_log
from apt.distributed.parallel import Parallel
from apt.errors import InputError, counted
from apt.kernels.roofline import GPUS
from apt.methods.base import Pass
from apt.models.costs import COUNTERS, dit_cost

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

    from apt.train.weights_and_biases import WandbLog

__all__ = [
    "LOG_NAME",
    "SPEED_NAME",
    "RunLog",
    "Update",
    "model_flops",
    "peak_memory",
    "peak_tflops",
    "probe_seconds",
    "read_log",
    "speed",
]

_COLUMNS = 80
_SHOWN = 3
"""Updates before the expected time is shown, because the first one is slower than the others."""

_MUCH_WAITING = 0.3
"""Share of an update's time above which waiting for data is reported."""

_PROBES = 8

_COUNTED: dict[str, float | None] = {}


class RunLog:
    """Writes the metrics of a run on rank 0; does nothing on other ranks.

    `log.jsonl` holds nothing that depends on the clock or the machine's load, so the file of a
    resumed run equals that of an uninterrupted run byte for byte. Times and memory go to
    `speed.jsonl`. On a terminal, a progress bar shows the time left; elsewhere a line is printed
    from time to time. Both fit into 80 columns and show two metrics. After three updates, a line
    says how long the rest is expected to take. Without tensorboard there are no TensorBoard files,
    and without rich no progress bar; a message at the start says so.

    Args:
        run_dir: folder of the run; created if missing.
        num_updates: updates of the whole run.
        done: updates already done; later lines of an earlier attempt are removed.
        enabled: whether this rank writes (rank 0).
        title: the name of the run in the progress line.
        interval: seconds between progress lines if stderr is not a terminal.
        also: another log that gets the same, and is closed with this one.

    Raises:
        DataError: an existing log was not written by this package.
        OSError: the folder cannot be written; later writes raise it too.
    """

    def __init__(
        self,
        run_dir: Path,
        num_updates: int,
        done: int,
        enabled: bool = True,
        *,
        title: str = "training",
        interval: float = 15.0,
        also: WandbLog | None = None,
    ) -> None:
        self.enabled = enabled
        self._also = also
        if not enabled:
            return
        self._total = num_updates
        self._first = done
        self._title = title
        self._interval = interval
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / LOG_NAME
        self._file = _open_after(self._path, done)
        self._speed_path = run_dir / SPEED_NAME
        self._speed = _open_after(self._speed_path, done)
        self._seconds: list[float] = []  # of the first updates
        self._waits: list[float] = []  # the part of it spent waiting for data
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._progress: Progress | None = None
        self._board = self._open_board(run_dir / "tensorboard", done)
        self._start = time.monotonic()
        self._printed = -math.inf
        self._last_line = (-1, "")
        if sys.stderr.isatty():
            self._start_bar()

    def write(
        self, update: int, metrics: Mapping[str, float], timing: Mapping[str, float] | None = None
    ) -> None:
        """Record the metrics of an update.

        Args:
            update: number of updates done, counted from 1.
            metrics: finite or not; a non-finite value becomes null in the JSONL file.
            timing: figures that depend on the clock or the machine (seconds, memory), for
                `speed.jsonl`.
        """
        if not self.enabled:
            return
        # Writes are not buffered, so that a killed process loses at most the line that it was
        # writing, and a full disk raises here.
        _write_all(self._file, _line(update, metrics), self._path)
        if timing:
            _write_all(self._speed, _line(update, timing), self._speed_path)
        scalars = {key: float(value) for key, value in {**metrics, **(timing or {})}.items()}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, update)
        if self._also is not None:
            self._also.write(update, scalars)
        self._show(update, _figures(metrics))
        if timing and "speed/seconds_per_update" in timing:
            waited = timing.get("speed/data_wait_seconds", 0.0)
            self._expect(update, timing["speed/seconds_per_update"], waited)

    def picture(self, update: int, path: Path) -> None:
        """Show a PNG of an update, such as a sample sheet, in TensorBoard."""
        if not self.enabled:
            return
        if self._board is not None:
            from PIL.PngImagePlugin import PngImageFile

            # `Image.open` refuses a sheet of many large frames as an attack.
            with PngImageFile(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._board.add_image("samples", pixels, update, dataformats="HWC")
        if self._also is not None:
            self._also.picture(update, path)

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if not self.enabled:
            return
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sync(self, *, tensorboard: bool = True) -> None:
        """Flush the log to disk; called before a checkpoint, which the log must not lag behind."""
        if self.enabled:
            os.fsync(self._file.fileno())
            if tensorboard and self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Close the files and the progress bar; further calls do nothing."""
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.stop()
        elif self._last_line[0] >= 0:
            self._print_line(*self._last_line)
        self.enabled = False
        self._file.close()
        self._speed.close()
        if self._also is not None:
            self._also.close()
        if self._board is not None:
            self._board.close()
        threading.excepthook = self._hook

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # A full disk fails here again; the first error is the one to report.
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            self.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Ignore disk errors of TensorBoard's thread, because the next write here raises them."""
        if not issubclass(failure.exc_type, OSError):
            self._hook(failure)

    def _open_board(self, folder: Path, done: int) -> SummaryWriter | None:
        # Import it here: this takes seconds, and the other ranks and commands do not need it.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.message(
                f"no TensorBoard files ({error}): {LOG_NAME} has all metrics; for TensorBoard, "
                "`pip install tensorboard`"
            )
            return None
        return SummaryWriter(str(folder), purge_step=done + 1)

    def _start_bar(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError as error:
            self.message(f"no progress bar ({error}): to get one, `pip install rich`")
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(
            _cut(self._title, 18), total=self._total, completed=self._first, metrics=""
        )
        self._progress.start()

    def _expect(self, update: int, seconds: float, waited: float) -> None:
        """Print once how long the rest should take, and whether much of it is waiting for data."""
        if len(self._seconds) == _SHOWN:
            return
        self._seconds.append(seconds)
        self._waits.append(waited)
        left = self._total - update
        if len(self._seconds) < _SHOWN or not left:
            return
        each = statistics.median(self._seconds)
        time_left = timedelta(seconds=round(each * left))
        self.message(f"  expected time: {time_left} for {counted(left, 'update')} of {each:.2g} s")
        share = statistics.median(self._waits) / max(each, 1e-9)
        if share > _MUCH_WAITING:
            self.message(f"  {share:.0%} of it is spent waiting for data: raise --data.num-workers")

    def _show(self, update: int, shown: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=update, metrics=shown)
        elif time.monotonic() - self._printed >= self._interval:
            self._print_line(update, shown)
        else:
            self._last_line = (update, shown)

    def _print_line(self, update: int, shown: str) -> None:
        self._printed = time.monotonic()
        self._last_line = (-1, "")
        per_update = (self._printed - self._start) / max(update - self._first, 1)
        left = timedelta(seconds=round(per_update * (self._total - update)))
        rest = f": {update}/{self._total}  {left} left  {shown}"
        self.message(_cut(self._title, _COLUMNS - len(rest)) + rest)


def _figures(metrics: Mapping[str, float]) -> str:
    """Return the two metrics that fit into a progress line, preferably losses."""
    losses = [key for key in metrics if key.endswith("loss")]
    chosen = [*losses, *(key for key in metrics if key not in losses)][:2]
    return "  ".join(f"{_short(key)} {float(metrics[key]):.4g}" for key in chosen)


def _short(key: str) -> str:
    """Return a metric's short name for the progress line."""
    part, _, kind = key.rpartition("/")
    network = {"generator": "G ", "discriminator": "D "}.get(part, "")
    held_out = "held-out " if part.startswith("heldout/") else ""
    return (network or held_out) + _cut(kind, 12)


def _cut(text: str, size: int) -> str:
    size = max(size, 6)
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _line(update: int, values: Mapping[str, float]) -> bytes:
    entry = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    return (json.dumps({"step": update, **entry}) + "\n").encode()


def _write_all(file: io.RawIOBase, data: bytes, path: Path) -> None:
    try:
        while data:
            data = data[file.write(data) or 0 :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _open_after(file: Path, done: int) -> io.RawIOBase:
    """Open a log for appending after the line of update `done`, and drop later lines."""
    if file.exists():
        lines = log_lines(file)
        kept = "".join(line for line in lines if json.loads(line)["step"] <= done)
        temporary = file.with_name(f".{file.name}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(kept)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    return file.open("ab", buffering=0)


def model_flops(passes: Sequence[Pass], latent_shape: tuple[int, ...]) -> float | None:
    """Return the model's FLOPs for one sample of an update.

    Returns None for a network without a counter, or sizes that its counter does not take. Text is
    not counted, except in Wan, which pads every prompt to one length.

    Args:
        passes: the passes of the stage, see `Stage.passes`.
        latent_shape: (T, H, W) of the sample.
    """
    total = 0.0
    for one in passes:
        config: Any = one.backbone.config
        if type(config) not in COUNTERS:
            return None
        # A discriminator has no blocks after its last head.
        flops = _forward_flops(dataclasses.replace(config, depth=one.backbone.depth), latent_shape)
        if flops is None:
            return None
        total += one.samples * (1 + one.backward) * flops
    return total


def _forward_flops(config: Any, latent_shape: tuple[int, ...]) -> float | None:
    """Return the FLOPs of a forward pass, cached because every update needs them."""
    key = repr((config, latent_shape))
    if key not in _COUNTED:
        frames, height, width = latent_shape
        try:
            cost = dit_cost(config, 1, (frames, height, width), text_tokens=0)
            _COUNTED[key] = cost.flops
        except InputError:
            _COUNTED[key] = None
    return _COUNTED[key]


def peak_tflops(device: torch.device) -> float | None:
    """Return the vendor's figure for dense bf16 on this GPU, in TFLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    here = torch.cuda.get_device_name(device).upper()
    for key, gpu in GPUS.items():
        word, _, kind = key.upper().removeprefix("RTX").partition("-")
        if word in here and (kind == "PCIE") == ("PCIE" in here):
            return gpu.peak.matmul_tflops
    return None


def probe_seconds(device: torch.device) -> float:
    """Return the seconds that a fixed set of matrix products takes on this rank now.

    This finds a rank that computes slower than the others. The length of an update does not show
    it, because all ranks wait for the slowest.
    """
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    x = torch.ones(size, size, dtype=dtype, device=device)
    x @ x  # the first one may choose a kernel
    _wait(device)
    begin = time.perf_counter()
    for _ in range(_PROBES):
        x @ x
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Update:
    """A finished update.

    Attributes:
        seconds: its duration.
        waited: seconds of it that this rank waited for data.
        samples: samples on all ranks.
        latent_shape: (T, H, W) of each sample; None if unknown.
    """

    seconds: float
    waited: float
    samples: int
    latent_shape: tuple[int, ...] | None


def speed(update: Update, passes: Sequence[Pass], parallel: Parallel) -> dict[str, float]:
    """Return the figures for `speed.jsonl`. Collective."""
    seconds = max(update.seconds, 1e-9)
    found = {
        "speed/seconds_per_update": update.seconds,
        "speed/samples_per_second": update.samples / seconds,
    }
    waits = parallel.of_each(update.waited)
    found["speed/data_wait_seconds"] = max(waits)
    if len(waits) > 1:
        found["speed/data_wait_spread_seconds"] = max(waits) - min(waits)
        found["speed/slowest_rank"] = float(waits.index(max(waits)))
        probes = parallel.of_each(probe_seconds(parallel.device))
        found["speed/probe_ratio"] = max(probes) / statistics.median(probes)
        found["speed/slowest_computing_rank"] = float(probes.index(max(probes)))
    if not passes or update.latent_shape is None:
        return found
    tokens = math.prod(passes[0].backbone.token_grid(update.latent_shape))
    found["speed/tokens_per_second"] = update.samples * tokens / seconds
    flops = model_flops(passes, update.latent_shape)
    if flops is None:
        return found
    tflops = update.samples * flops / seconds / parallel.world_size / 1e12
    found["speed/model_tflops_per_rank"] = tflops
    peak = peak_tflops(parallel.device)
    if peak is not None:
        found["speed/mfu"] = tflops / peak
    return found


def peak_memory(device: torch.device) -> int | None:
    """Return this process's peak memory in bytes: that of tensors on a GPU, else main memory.

    Returns None if it is unknown.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
