"""What is evaluated: our models at any stage and number of steps, diffusers pipelines, and peers.

A model is named as NAME=PLACE,option=value,...; the name and the options may be left out. PLACE is
a model of ours (a built-in name, a folder or a Hub id), a peer (`apt.evaluate.peers`), or
"diffusers:" with the folder or Hub id of a pipeline.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from apt.checkpoints.source import list_pretrained, locate, split_hub_id
from apt.errors import CheckpointError, InputError
from apt.evaluate.peers import PEERS
from apt.generate_options import GenerateOptions
from apt.registry import suggest

PIPELINE_PREFIX = "diffusers:"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model that was asked for.

    Attributes:
        name: in folders, tables and pages.
        place: see the head of this file.
        options: how it samples; what they leave open is the protocol's, or else its own.
        fps: frames per second, of models that do not say.
        unet: a safetensors file in place of a peer's own weights.
    """

    name: str
    place: str
    options: GenerateOptions = GenerateOptions()
    fps: float | None = None
    unet: Path | None = None

    def sized(self, options: GenerateOptions) -> ModelChoice:
        """With the size of other options where it leaves its own open."""
        size = {
            name: getattr(options, name)
            for name in ("frames", "height", "width")
            if getattr(self.options, name) is None
        }
        return dataclasses.replace(self, options=self.options.replace(size))


def parse_name(text: str) -> tuple[str, str]:
    """The name and the place of NAME=PLACE; without a name, the last part of the place.

    Raises InputError for a name that could not be a folder's.
    """
    name, sign, place = text.partition("=")
    if not sign or "/" in name:
        name, place = Path(text.removeprefix(PIPELINE_PREFIX)).name, text
    if not re.fullmatch(r"[\w.@+-]+", name) or name in (".", ".."):
        raise InputError(
            f"{name!r} is no name of a model here; name it with letters, digits and -, as in "
            f"apt={place}"
        )
    return name, place


def parse_model(text: str) -> ModelChoice:
    """What NAME=PLACE,option=value,... asks for.

    Raises InputError for an option that does not exist.
    """
    values: dict[str, object] = {}
    rest = text
    while found := re.fullmatch(r"(.+),(\w+)=([^,=]*)", rest):
        try:
            values[found[2]] = ast.literal_eval(found[3])
        except (ValueError, SyntaxError):
            values[found[2]] = found[3]
        rest = found[1]
    name, place = parse_name(rest)
    unet, asked = values.pop("unet", None), values.pop("fps", None)
    fps = None
    if asked is not None:
        if not (isinstance(asked, int | float) and 0 < asked <= 1000):
            raise InputError(f"fps must be above 0 and at most 1000, got {asked!r} in {text!r}")
        fps = float(asked)
    return ModelChoice(
        name=name,
        place=place,
        options=GenerateOptions().replace(values),
        fps=fps,
        unet=None if unet is None else Path(str(unet)),
    )


def check_model(choice: ModelChoice) -> None:
    """Look at a choice before anything large is fetched.

    Raises CheckpointError for a model that is nowhere, InputError for an option that it ignores.
    """
    if choice.place in PEERS:
        if choice.fps is not None:
            raise InputError(f"{choice.place} makes pictures, which have no fps; leave it out")
        return
    if choice.unet is not None:
        raise InputError(f"{choice.place} is none of the peers, so it takes no unet; leave it out")
    place = choice.place.removeprefix(PIPELINE_PREFIX)
    known = place in list_pretrained() or Path(place).expanduser().exists()
    if not known and split_hub_id(place) is None:
        names = [*list_pretrained(), *PEERS]
        raise CheckpointError(
            f"there is no model {choice.place!r}: {suggest(place, names)}; a folder, a Hub id "
            f"(owner/name), or {PIPELINE_PREFIX}FOLDER or {PIPELINE_PREFIX}owner/name for a "
            "pipeline of diffusers"
        )
    locate(place)
