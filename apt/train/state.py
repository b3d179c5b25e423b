"""What training changes: tensors by parameter name, as live views, and the parts of an update.

`model_state` and `optimizer_state` return the very tensors that train, not copies. A checkpoint is
therefore restored by loading into them in place, and the same state works in one process (plain
tensors) and under FSDP2 (DTensors, each rank holding its shard).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PartsDone", "model_state", "optimizer_state"]


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, detached, sharing their storage.

    Args:
        module: any module, sharded with FSDP2 or not.
    """
    # Only state_dict() is safe under FSDP2: its hook puts the sharded parameters back, while
    # named_parameters() yields whole ones after a forward that was not resharded.
    return dict(module.state_dict())


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return the optimiser's tensors as `{parameter name: {state name: tensor}}`, live.

    State that the optimiser has not created yet is created here as zeros, which is where
    RMSprop, Adam(W) and SGD with momentum begin. Hyper-parameters are not part of it: they
    belong to the configuration.

    Args:
        module: owns every parameter that the optimiser updates.
        optimizer: any `torch.optim` optimiser whose state starts at zero.

    Raises:
        ValueError: the optimiser updates a parameter that `module` does not own.
    """
    names: dict[int, str] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), name)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(id(p) not in names for p in parameters)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimiser's {len(parameters)} parameters are not in the module. "
            "Make the optimiser after the module was sharded, from this module's parameters."
        )
    _create_missing_state(optimizer, parameters)
    return {
        names[id(p)]: {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for p in parameters
    }


def _create_missing_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    missing = {id(p) for p in parameters if not optimizer.state[p]}
    if not missing:
        return
    gradients = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for p in parameters:
            # Ones, not zeros: with eps = 0 RMSprop would divide zero by zero.
            p.grad = torch.ones_like(p) if id(p) in missing else None
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for p in parameters:
        if id(p) in missing:
            for value in optimizer.state[p].values():
                if isinstance(value, Tensor):
                    value.zero_()


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
