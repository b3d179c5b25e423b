"""Architectures by name: the configurations that `apt.models.create` builds from.

A builder takes no argument and returns a frozen config dataclass with a `build()` method; overrides
replace its fields. A model's identity in a file is its registered name and its config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from apt.checkpoints.info import SampleInfo, SamplingInfo
from apt.condition import PromptCheck
from apt.errors import InputError
from apt.registry import B, Buildable, Registry


@dataclass(frozen=True, kw_only=True)
class PretrainedEntry:
    """Published weights of one registered model.

    Attributes:
        repo: Hub id of a diffusers folder.
        revision: commit, tag or branch; None is the newest.
        subfolder: of the transformer in it.
        license: SPDX identifier, or the Hub's name of another licence.
        source: who published it, and the paper or page.
        gated: whether the licence must be accepted on the Hub first.
        codec, text_encoder: registered names of the parts that go with it.
        compression: pixels per latent of that codec along time (after the first frame), height and
            width.
        text_tokens: the length of the sequence that the model reads for any prompt.
        sample: the size of what it makes best.
        sampling: how its authors sample it; a shift that the folder's scheduler gives is taken
            instead of this one.
        lowest_t: the least t in [0, 1] that it was trained at; above 0 for an expert of several.
        note: what a user has to know before they choose it.
    """

    repo: str
    license: str
    source: str
    codec: str
    text_encoder: str
    compression: tuple[int, int, int]
    text_tokens: int
    sample: SampleInfo
    sampling: SamplingInfo
    revision: str | None = None
    subfolder: str = "transformer"
    gated: bool = False
    lowest_t: float = 0.0
    note: str = ""


class BuildableText(Buildable, Protocol):
    """The config of a text encoder."""

    def prompt_check(self) -> PromptCheck:
        """What `build()` would check prompts with, without its weights."""
        ...


class ModelRegistry(Registry[Buildable]):
    """Model sizes by name, each with the published weights that exist for it."""

    def __init__(self) -> None:
        super().__init__("model")
        self._pretrained: dict[str, Mapping[str, PretrainedEntry]] = {}

    def register(
        self, name: str, *, pretrained: Mapping[str, PretrainedEntry] | None = None
    ) -> Callable[[B], B]:
        """Decorator: put a builder under `name`; `pretrained` maps tags to weights, best first."""
        add = super().register(name)

        def add_with_weights(builder: B) -> B:
            add(builder)
            self._pretrained[name] = dict(pretrained or {})
            return builder

        return add_with_weights

    def pretrained(self, name: str) -> Mapping[str, PretrainedEntry]:
        """Published weights of a model by tag; the first is the default. Empty: there are none."""
        self.get(name)
        return self._pretrained[name]


MODELS = ModelRegistry()
TEXT_ENCODERS: Registry[BuildableText] = Registry("text encoder")
CODECS: Registry[Buildable] = Registry("latent codec")
HEADS: Registry[nn.Module] = Registry("discriminator head")


def split_tag(name: str) -> tuple[str, str | None]:
    """ "arch.tag" in two; names of models may have dots too. The tag is None without one."""
    architecture, dot, tag = name.rpartition(".")
    if name in MODELS.names() or not dot or architecture not in MODELS.names():
        return name, None
    return architecture, tag


def find_tag(name: str, tag: bool | str) -> str:
    """The tag of published weights of a model; True is its first.

    Raises InputError if there is none of that name, listing those there are.
    """
    tags = list(MODELS.pretrained(name))
    if not tags:
        published = [other for other in MODELS.names() if MODELS.pretrained(other)]
        raise InputError(
            f"no weights are published for {name!r}; there are for {', '.join(published)}, and "
            "apt.load_model loads folders and Hub repositories"
        )
    if tag is True:
        return tags[0]
    if tag not in tags:
        raise InputError(f"{name!r} has no weights {tag!r}; choose from: {', '.join(tags)}")
    return str(tag)


def untrained_timesteps(name: str, timesteps: Iterable[float]) -> str | None:
    """What is wrong with timesteps above 0 that published weights of a model were not trained at.

    None if nothing is. The weights are those of the first tag.
    """
    entry = next(iter(MODELS.pretrained(name).values()), None)
    below = [t for t in timesteps if entry is not None and 0 < t < entry.lowest_t]
    if entry is None or not below:
        return None
    return (
        f"{name!r} is an expert for t >= {entry.lowest_t:g}, and was not trained at "
        f"{len(below)} of these timesteps, down to {min(below):.3g}: expect poor results there"
    )


def list_models(pattern: str = "*") -> list[str]:
    """Names of registered backbones that match a shell-style pattern."""
    return MODELS.names(pattern)
