"""Where a run is inside an update, so that an error in the middle loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PartsDone"]


@dataclass
class PartsDone:
    """The parts of the update under way that have moved weights, and what they measured.

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
