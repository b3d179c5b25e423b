"""Families of public checkpoints: what a model of another project needs beyond its module.

A family is a folder beside this file: a model with its sizes; one adapter, which says how its time
and velocity differ from ours; and one table of key rules, which turns the layout that its authors
published into ours. Parameters of our modules are named as in diffusers, so that layout needs none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apt.models.architectures import Buildable
from apt.registry import Registry


@dataclass(frozen=True, kw_only=True)
class FlowAdapter:
    """How a family's time and velocity differ from t in [0, 1], 0 is data, v = z - x.

    Attributes:
        time_scale: the family's number for t = 1.
        reversed_time: its time runs from noise to data.
        negated_velocity: it predicts x - z.
    """

    time_scale: float = 1000.0
    reversed_time: bool = False
    negated_velocity: bool = False

    def time(self, t: Tensor) -> Tensor:
        """Our t (...) in [0, 1] in the family's scale, fp32."""
        t = t.float()
        return (1 - t if self.reversed_time else t) * self.time_scale

    def velocity(self, v: Tensor) -> Tensor:
        """The family's prediction as our velocity."""
        return -v if self.negated_velocity else v


@dataclass(frozen=True, kw_only=True)
class KeyRule:
    """One line of a conversion table: a tensor of the original layout, and ours.

    Attributes:
        theirs: pattern that must match a whole original key; groups are numbers of blocks and such.
        ours: our keys, with `\\1` for groups. Several: the original is cut in as many equal parts
            along its first dimension (a fused projection).
        swap_halves: the two halves along the first dimension trade places (shift before scale).
    """

    theirs: str
    ours: tuple[str, ...]
    swap_halves: bool = False

    def match(self, key: str) -> tuple[str, ...] | None:
        """Our keys for an original key; None if the rule is not for it."""
        found = re.fullmatch(self.theirs, key)
        return None if found is None else tuple(found.expand(ours) for ours in self.ours)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of public checkpoints.

    Attributes:
        name: in messages and on the command line.
        makes: what our module of it does, such as "text-to-video".
        adapter: time and velocity.
        config_class: the dataclass that its registered sizes are made of.
        diffusers_class: the transformer's class name there; its configs and keys are understood.
        from_diffusers, to_diffusers: between that class's config.json and `config_class`.
            The first raises CheckpointError for a config that our module cannot be built from.
        rules: from the original layout to ours; each original key meets exactly one. A function of
            the config where they depend on it, as when only the last block differs; `rules_for`
            gives them either way.
        marks: fragments of original or diffusers keys that together occur in no other family.
        anchors: keys that each layout has one of: what stands before one in a file is a prefix.
        relative: what a checkpoint or LoRA of the family is if it is none that our module can take,
            such as image-to-video; None if it can. Called with shapes by key, without prefix, in
            any layout, also with underscores for dots.
        pipeline_class: diffusers' pipeline that runs an export in one step.
    """

    name: str
    makes: str
    adapter: FlowAdapter
    config_class: type
    diffusers_class: str
    from_diffusers: Callable[[Mapping[str, Any]], Buildable]
    to_diffusers: Callable[[Any], dict[str, Any]]
    rules: Sequence[KeyRule] | Callable[[Any], Sequence[KeyRule]]
    marks: Sequence[str]
    anchors: Sequence[str]
    relative: Callable[[Mapping[str, tuple[int, ...]]], str | None]
    pipeline_class: str

    def rules_for(self, config: Any) -> Sequence[KeyRule]:
        """The key rules of a model of this config, an instance of `config_class`."""
        return self.rules(config) if callable(self.rules) else self.rules


def first_kind(keys: Iterable[str], kinds: Iterable[tuple[str, Sequence[str]]]) -> str | None:
    """The first of `kinds` with a fragment that occurs in a key, whether dots or underscores part
    the names."""
    text = "\n".join(key.replace(".", "_") for key in keys)
    return next(
        (name for name, marks in kinds if any(mark.replace(".", "_") in text for mark in marks)),
        None,
    )


FAMILIES: Registry[Family] = Registry("family")
"""Functions without arguments that return a `Family`, under its name."""
