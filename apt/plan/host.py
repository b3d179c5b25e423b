"""What a planned run gives its stage: the trainer's own host, with models that nobody loads."""

from __future__ import annotations

import dataclasses

from apt.checkpoints.bundle import ModelBundle
from apt.checkpoints.info import ModelInfo
from apt.models.transformer import DiffusionTransformer
from apt.plan.models import PlannedModel
from apt.train.host import RunHost

__all__ = ["PlannedHost"]


@dataclasses.dataclass(frozen=True)
class PlannedHost(RunHost):
    """A `RunHost` whose models are built, not loaded.

    Attributes:
        start: what the stage starts from.
        others: the models of its other fields.
    """

    start: PlannedModel | None = None
    others: dict[str, PlannedModel] = dataclasses.field(default_factory=dict)

    def model(self) -> ModelBundle:
        assert self.start is not None
        return self.start.bundle()

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        bundle = self.others[field].bundle()
        return bundle.backbone, bundle.info
