"""Training: recipes, the trainer, checkpoints and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt.train.trainer import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module 'apt.train' has no attribute {name!r}")
    # Import it late, because code that only needs the recipes' names should not wait for it.
    from apt.train.trainer import run

    return run
