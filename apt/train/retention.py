"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

from apt.distributed.collectives import everywhere
from apt.train import checkpoint

__all__ = ["Retention"]

Signature = tuple[tuple[str, int, int], ...]


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


def _signature(path: Path) -> Signature:
    """Names, sizes and times of the files."""
    stats = ((file.name, file.stat()) for file in path.iterdir())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
