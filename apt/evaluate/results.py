"""The results of an evaluation, before they are formatted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apt.evaluate.protocol import Protocol
from apt.evaluate.spread import Spread, spread


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """The results of one model.

    Attributes:
        name, place: of the choice.
        settings: of its samples, from their manifest.
        figures: by evaluation seed, then by name.
    """

    name: str
    place: str
    settings: Mapping[str, Any]
    figures: dict[int, dict[str, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Spread]:
        """Return the mean and spread of every figure over the seeds."""
        names = dict.fromkeys(name for figures in self.figures.values() for name in figures)
        return {
            name: spread([figures[name] for figures in self.figures.values() if name in figures])
            for name in names
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything the page is written from.

    Attributes:
        protocol: the protocol.
        command: the command line.
        machine: where it was measured.
        software: this package and its version.
        models: in the order of the command.
        baselines: figures of the protocol's baselines, by name.
    """

    protocol: Protocol
    command: str
    machine: str
    software: str
    models: list[ModelResult]
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return every figure, and everything that determines it, as JSON."""
        protocol = self.protocol
        return {
            "protocol": protocol.name,
            "command": self.command,
            "machine": self.machine,
            "software": self.software,
            "settings": dict(protocol.settings),
            "prompts": len(protocol.prompts),
            "samples_per_prompt": protocol.samples_per_prompt,
            "seeds": list(protocol.seeds),
            "figures": {
                name: {"title": figure.title, "better": figure.better}
                for name, figure in protocol.figures.items()
            },
            "baselines": {name: dict(figures) for name, figures in self.baselines.items()},
            "models": [
                {
                    "name": model.name,
                    "place": model.place,
                    "settings": dict(model.settings),
                    "figures": {f"seed {seed}": dict(f) for seed, f in model.figures.items()},
                    "summary": {
                        name: {"mean": value.mean, "std": value.std}
                        for name, value in model.summary().items()
                    },
                }
                for model in self.models
            ],
        }
