"""The models to evaluate: ours at any stage and number of steps, diffusers pipelines, and peers.

A model is given as NAME=PLACE,option=value,...; name and options are optional. PLACE is one of our
models (a built-in name, a folder or a Hub id), a peer (`apt.evaluate.peers`), or "diffusers:"
followed by the folder or Hub id of a pipeline.
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
    """A model to evaluate.

    Attributes:
        name: used in folders, tables and pages.
        place: see the module's docstring.
        options: how to sample; unset ones come from the protocol, or else from the model.
        fps: frames per second, for models that do not define it.
        unet: a safetensors file that replaces the weights of a peer's UNet.
    """

    name: str
    place: str
    options: GenerateOptions = GenerateOptions()
    fps: float | None = None
    unet: Path | None = None

    def sized(self, options: GenerateOptions) -> ModelChoice:
        """Return this choice, with frames, height and width from `options` where unset."""
        size = {
            name: getattr(options, name)
            for name in ("frames", "height", "width")
            if getattr(self.options, name) is None
        }
        return dataclasses.replace(self, options=self.options.replace(size))


def parse_name(text: str) -> tuple[str, str]:
    """Split NAME=PLACE into name and place; without a name, use the last part of the place.

    Raises InputError for a name that cannot be the name of a folder.
    """
    name, sign, place = text.partition("=")
    if not sign or "/" in name:
        name, place = Path(text.removeprefix(PIPELINE_PREFIX)).name, text
    if not re.fullmatch(r"[\w.@+-]+", name) or name in (".", ".."):
        raise InputError(
            f"{name!r} cannot be the name of a model; use letters, digits and -, as in apt={place}"
        )
    return name, place


def parse_model(text: str) -> ModelChoice:
    """Parse NAME=PLACE,option=value,... into a choice.

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
    """Check a choice before anything large is downloaded.

    Raises CheckpointError for a model that does not exist, InputError for an option that does not
    apply to it.
    """
    if choice.place in PEERS:
        if choice.fps is not None:
            raise InputError(f"{choice.place} makes images, which have no fps; leave it out")
        return
    if choice.unet is not None:
        raise InputError(f"{choice.place} is not a peer, so it takes no unet; leave it out")
    place = choice.place.removeprefix(PIPELINE_PREFIX)
    known = place in list_pretrained() or Path(place).expanduser().exists()
    if not known and split_hub_id(place) is None:
        names = [*list_pretrained(), *PEERS]
        raise CheckpointError(
            f"there is no model {choice.place!r}: {suggest(place, names)}; or give a folder, a Hub "
            f"id (owner/name), or {PIPELINE_PREFIX}FOLDER or {PIPELINE_PREFIX}owner/name for a "
            "diffusers pipeline"
        )
    locate(place)
