"""Training: recipes, the trainer, and what keeps a run safe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt.train.trainer import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module 'apt.train' has no attribute {name!r}")
    # Late, so that one who asks for a recipe's name does not wait for the trainer.
    from apt.train.trainer import run

    return run
