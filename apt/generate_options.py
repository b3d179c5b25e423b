"""How to generate: the options of the pipeline, and of the command.

diffusers' names for some of them are taken at the pipeline's boundary. Inside each has one name.
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
"""What diffusers calls an option, and its name here."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a video is made of a prompt and a seed."""

    num_steps: int | None = None
    """Network evaluations; None is the model's own number (1 after APT)."""
    sampler: Literal["auto", "consistency", "euler"] = "auto"
    """Between steps: fresh noise, Euler, or what suits the model. In one step they are the same."""
    timesteps: tuple[float, ...] | None = None
    """The grid itself, falling from 1 (noise) to 0 (data), such as 1 0.6 0, in place of the number
    of steps."""
    cfg_scale: float | None = None
    """Classifier-free guidance; 1 is off. None is the model's own for diffusion, and off for
    distilled models, which have it built in."""
    negative_prompt: str | None = None
    """What guidance leads away from; None is the model's own."""
    frames: int | None = None
    """Number of frames; 1 makes an image. None, also below, is what the model was trained on."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    batch_size: int = 1
    """Videos per network call. Above 1 is faster for many, and equal to rounding only."""

    def replace(self, changes: Mapping[str, Any]) -> GenerateOptions:
        """With other values for some options, by their names here or in diffusers.

        Raises InputError for a name that is neither, with close matches, and for two names of one
        option.
        """
        known = [field.name for field in dataclasses.fields(self)]
        values: dict[str, Any] = {}
        given: dict[str, str] = {}
        for name, value in changes.items():
            own = DIFFUSERS_NAMES.get(name, name)
            if own not in known:
                raise InputError(
                    f"generating takes no option {name!r}; "
                    f"{suggest(name, [*known, *DIFFUSERS_NAMES])}"
                )
            if own in given:
                raise InputError(f"{given[own]} and {name} are one option; leave one of them out")
            given[own] = name
            values[own] = value
        if values.get("timesteps") is not None:
            values["timesteps"] = tuple(float(t) for t in values["timesteps"])
        return dataclasses.replace(self, **values)


class OptionNames(TypedDict, total=False):
    """The options as keyword arguments, with diffusers' names for some; see `GenerateOptions`."""

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
