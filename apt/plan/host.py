"""The host of a planned run: the trainer's own host, with models that are never loaded."""

from __future__ import annotations

import dataclasses

from torch import nn

from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import ModelBundle
from apt.checkpoints.origin import fill_from_origins
from apt.models.transformer import DiffusionTransformer
from apt.plan.models import PlannedModel
from apt.train.host import RunHost

__all__ = ["PlannedHost"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedHost(RunHost):
    """A `RunHost` whose models are built, not loaded.

    Attributes:
        start: the model that the stage starts from.
        others: the models that other fields of the stage name, by field.
    """

    start: PlannedModel
    others: dict[str, PlannedModel] = dataclasses.field(default_factory=dict)

    def model(self) -> ModelBundle:
        return self.start.bundle(loads=self.config.stage.start_field is not None)

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        bundle = self.others[field].bundle(loads=True)
        return bundle.backbone, bundle.info

    def fill(self, network: nn.Module) -> None:
        # Without the other ranks, which are only simulated and could not report a failure.
        fill_from_origins(network, self.device, self.frozen)
