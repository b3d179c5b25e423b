"""Options for generating, shared by the pipeline and the command line.

The pipeline also accepts diffusers' names for some of them. Internally each has one name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from apt.errors import InputError
from apt.registry import suggest

DIFFUSERS_NAMES = {
    "num_inference_steps": "num_steps",
    "guidance_scale": "cfg_scale",
    "num_frames": "frames",
}
"""diffusers' name of an option, and its name here."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to make a video from a prompt and a seed."""

    num_steps: int | None = None
    """Number of sampling steps; None is the model's own number (1 after APT)."""
    sampler: Literal["auto", "consistency", "euler"] = "auto"
    """Sampler: consistency adds fresh noise between steps, euler does not; auto takes the model's
    own. With one step they are the same."""
    timesteps: tuple[float, ...] | None = None
    """Timesteps, falling from 1 (noise) to 0 (data), such as 1 0.6 0. Replaces the number of
    steps."""
    cfg_scale: float | None = None
    """Scale of classifier-free guidance; 1 is off. None is the model's own for diffusion models,
    and off for distilled models, which have guidance built in."""
    negative_prompt: str | None = None
    """Prompt that guidance steers away from; None is the model's own."""
    frames: int | None = None
    """Number of frames; 1 makes an image. None is the number that the model was trained on."""
    height: int | None = None
    """Height in pixels; None is the height that the model was trained on."""
    width: int | None = None
    """Width in pixels; None is the width that the model was trained on."""
    batch_size: int = 1
    """Videos per network call. Above 1, many videos are faster, but differ by rounding."""

    def replace(self, changes: Mapping[str, Any]) -> GenerateOptions:
        """Return a copy with some options changed, by their names here or in diffusers.

        Raises InputError for an unknown name, with close matches, and for two names of the same
        option.
        """
        known = [field.name for field in dataclasses.fields(self)]
        values: dict[str, Any] = {}
        given: dict[str, str] = {}
        for name, value in changes.items():
            own = DIFFUSERS_NAMES.get(name, name)
            if own not in known:
                raise InputError(
                    f"there is no option {name!r} for generating; "
                    f"{suggest(name, [*known, *DIFFUSERS_NAMES])}"
                )
            if own in given:
                raise InputError(f"{given[own]} and {name} are the same option; leave one out")
            given[own] = name
            values[own] = value
        if values.get("timesteps") is not None:
            values["timesteps"] = tuple(float(t) for t in values["timesteps"])
        return dataclasses.replace(self, **values)


class OptionNames(TypedDict, total=False):
    """The options as keyword arguments, including diffusers' names; see `GenerateOptions`."""

    num_steps: int | None
    num_inference_steps: int | None
    sampler: Literal["auto", "consistency", "euler"]
    timesteps: Sequence[float] | None
    cfg_scale: float | None
    guidance_scale: float | None
    negative_prompt: str | None
    frames: int | None
    num_frames: int | None
    height: int | None
    width: int | None
    batch_size: int
