"""Save the progress of a run in checkpoints while training continues, and delete old ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from apt.distributed.collectives import everywhere, own_group
from apt.distributed.parallel import Parallel
from apt.distributed.storage import HostCopies
from apt.train import checkpoint

__all__ = ["PartsDone", "Retention", "Saver"]

_PATIENCE = 60.0
_TIMEOUT = timedelta(hours=2)  # ranks may have much to write, some more than others

Position = tuple[int, int]
"""Number of whole updates, and of finished parts of the next one."""

Signature = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of a checkpoint's files."""


@dataclass
class PartsDone:
    """The finished parts of the current update, so that an error inside an update loses nothing.

    Attributes:
        parts: names of the parts that have updated their weights, such as the discriminator's and
            the generator's in an adversarial update.
        metrics: metrics of these parts, averaged over all ranks.
    """

    parts: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any] | None) -> PartsDone:
        """Read the parts from a checkpoint's meta; none if it was saved between updates."""
        under_way = (meta or {}).get("under_way")
        if under_way is None:
            return cls()
        return cls(list(under_way["parts"]), dict(under_way["metrics"]))

    def as_meta(self) -> dict[str, Any]:
        """Return the entry for a checkpoint's meta."""
        if not self.parts:
            return {}
        # Use pairs, because a manifest sorts keys, but a log has them in the update's order.
        metrics = [[name, value] for name, value in self.metrics.items()]
        return {"under_way": {"parts": list(self.parts), "metrics": metrics}}

    def finish(self, part: str, metrics: Mapping[str, float]) -> None:
        """Record a part that has updated its weights."""
        self.parts.append(part)
        self.metrics |= metrics

    def clear(self) -> None:
        """Forget the parts, because the update is finished and recorded."""
        self.parts.clear()
        self.metrics.clear()


class Retention:
    """Keeps the newest intact checkpoints of a run, and deletes older ones.

    Checkpoints that this process saved or verified count as intact while their files are untouched;
    others are verified first. All calls are collective.

    Args:
        root: folder of the run's checkpoints.
        keep: number of intact checkpoints to keep.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep
        self._known: dict[str, Signature] = {}

    def trust(self, path: Path) -> None:
        """Record a checkpoint that was just saved or verified."""
        self._known[path.name] = everywhere(lambda: _signature(path))[0]

    def prune(self) -> None:
        """Delete checkpoints older than those to keep. Raises CheckpointError if this fails."""
        checkpoint.prune(self.root, self.keep, intact=self._intact)

    def _intact(self, path: Path) -> bool:
        signature = everywhere(lambda: _signature(path))[0]
        if self._known.get(path.name) == signature:
            return True
        if not checkpoint.is_intact(path):
            return False
        self._known[path.name] = signature
        return True


class Saver:
    """Context manager that copies a state to host memory, and writes the copy in a thread.

    Training waits only for the copy. The thread hashes and writes it, and deletes older
    checkpoints, one checkpoint at a time. Earlier checkpoints stay until the new one has its final
    name. The memory of the copy is reused. All calls are collective.

    Args:
        retention: the folder of checkpoints, and which to keep.
        parallel: the ranks.
    """

    def __init__(self, retention: Retention, parallel: Parallel) -> None:
        self._retention = retention
        self._parallel = parallel
        self._thread: threading.Thread | None = None
        self._position: Position = (0, 0)
        self._error: BaseException | None = None
        self._stack = contextlib.ExitStack()
        self._copies = HostCopies(parallel.device)

    def __enter__(self) -> Saver:
        self._run = self._stack.enter_context(own_group(_TIMEOUT))
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._thread is not None:
            # Other ranks may be gone, so do not wait forever; the previous checkpoint remains.
            alone = self._parallel.world_size == 1
            self._thread.join(None if alone or kind is None else _PATIENCE)
            if self._thread.is_alive():
                return
        self._copies.close()
        self._stack.close()

    def begin(self, position: Position, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy the state, and start writing it as the checkpoint of `position`.

        Call `wait` for the previous one first. Raises TypeError like `checkpoint.save`.
        """
        assert self._thread is None
        tensors, values = checkpoint.flatten(state)
        self._position, self._error = position, None
        contents = (self._copies.of(tensors), values)
        self._thread = threading.Thread(
            target=self._write, args=(contents, meta), name="checkpoint", daemon=True
        )
        self._thread.start()

    def is_over(self) -> bool:
        """Return whether a checkpoint was started, and all ranks have written it."""
        if self._thread is None:
            return False
        return not self._parallel.any(self._thread.is_alive())

    def wait(self) -> Position | None:
        """Wait for the checkpoint that is being written, and return its position; None without one.

        Raises:
            CheckpointError: it could not be written on any rank.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        return self._position

    def _write(self, contents: checkpoint.Contents, meta: dict[str, Any]) -> None:
        def work() -> None:
            path = checkpoint.write(self._retention.root, self._position[0], contents, meta)
            self._retention.trust(path)
            self._retention.prune()

        try:
            with torch.no_grad():
                self._run(work)
        except BaseException as error:
            self._error = error


def _signature(path: Path) -> Signature:
    stats = ((file.name, file.stat()) for file in path.iterdir())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
