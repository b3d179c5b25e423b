"""What is done of an update, and checkpoints: written while training goes on, the newest stay."""

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
_TIMEOUT = timedelta(hours=2)  # ranks may have much to write, and not all as much

Position = tuple[int, int]
"""Whole updates, and parts of the next one."""

Signature = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of a checkpoint's files."""


@dataclass
class PartsDone:
    """The parts of the update under way that have moved weights, and what they measured: with it an
    error in the middle of an update loses nothing.

    Attributes:
        parts: names of the parts that are done: of an adversarial update, the discriminator's half
            and the generator's.
        metrics: of those parts, means over all ranks.
    """

    parts: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any] | None) -> PartsDone:
        """What a checkpoint says; nothing, if it was saved between updates."""
        under_way = (meta or {}).get("under_way")
        if under_way is None:
            return cls()
        return cls(list(under_way["parts"]), dict(under_way["metrics"]))

    def as_meta(self) -> dict[str, Any]:
        """What a checkpoint has to say of it."""
        if not self.parts:
            return {}
        # Pairs: a manifest sorts its keys, and a log has them in the order of the update.
        metrics = [[name, value] for name, value in self.metrics.items()]
        return {"under_way": {"parts": list(self.parts), "metrics": metrics}}

    def finish(self, part: str, metrics: Mapping[str, float]) -> None:
        """A part has moved its weights."""
        self.parts.append(part)
        self.metrics |= metrics

    def clear(self) -> None:
        """The update is over and recorded."""
        self.parts.clear()
        self.metrics.clear()


class Retention:
    """Keeps the newest good checkpoints of a run, and deletes older ones.

    What this process has saved or verified is known to be good for as long as its files stay
    untouched; anything else is read before it counts. Every rank makes one and calls it alike.

    Args:
        root: folder of the run's checkpoints.
        keep: how many good ones stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep
        self._known: dict[str, Signature] = {}

    def trust(self, path: Path) -> None:
        """This checkpoint was just saved, or has just been verified."""
        self._known[path.name] = everywhere(lambda: _signature(path))[0]

    def prune(self) -> None:
        """Delete what is older than the ones to keep. Raises CheckpointError if that fails."""
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

    The copy is what training waits for. Hashing, writing and deleting older checkpoints go on
    beside it, one checkpoint at a time; until the new one has its name, the ones before it are
    there. The memory of the copy is kept for the next one. Every rank makes one and calls it alike.

    Args:
        retention: where to, and what stays.
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
            # Other ranks may not be there any more; the checkpoint before this one is.
            alone = self._parallel.world_size == 1
            self._thread.join(None if alone or kind is None else _PATIENCE)
            if self._thread.is_alive():
                return
        self._copies.close()
        self._stack.close()

    def begin(self, position: Position, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy the state, and start to write it as the checkpoint of `position`.

        The one before must have been waited for. Raises TypeError as `checkpoint.save`.
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
        """Whether a checkpoint was begun, and all ranks have written it."""
        if self._thread is None:
            return False
        return not self._parallel.any(self._thread.is_alive())

    def wait(self) -> Position | None:
        """Wait for the checkpoint that is being written; its position, None if there is none.

        Raises:
            CheckpointError: it could not be written, on any rank.
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
