"""Registries of architectures, from whose configurations `apt.models.create` builds modules.

A builder takes no argument and returns a frozen config dataclass with a `build()` method; overrides
replace its fields. Files identify a model by its registered name and its config.
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
        subfolder: the transformer's folder in it.
        license: SPDX identifier, or the Hub's name for another licence.
        source: who published it, and the paper or page.
        gated: whether the licence must first be accepted on the Hub.
        codec, text_encoder: registered names of the parts that it is used with.
        compression: pixels per latent of that codec along time (after the first frame), height and
            width.
        text_tokens: length of the text sequence that the model reads, for any prompt.
        sample: the size of output that it is best at.
        sampling: its authors' sampling settings; a shift in the folder's scheduler config takes
            precedence.
        lowest_t: the lowest t in [0, 1] that it was trained at; above 0 for one of several experts.
        note: what users should know before they choose it.
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
        """Return the prompt check of the encoder that `build()` makes, without loading weights."""
        ...


class ModelRegistry(Registry[Buildable]):
    """Model sizes by name, each with its published weights."""

    def __init__(self) -> None:
        super().__init__("model")
        self._pretrained: dict[str, Mapping[str, PretrainedEntry]] = {}

    def register(
        self, name: str, *, pretrained: Mapping[str, PretrainedEntry] | None = None
    ) -> Callable[[B], B]:
        """Register a builder under `name`; `pretrained` maps tags to weights, best first."""
        add = super().register(name)

        def add_with_weights(builder: B) -> B:
            add(builder)
            self._pretrained[name] = dict(pretrained or {})
            return builder

        return add_with_weights

    def pretrained(self, name: str) -> Mapping[str, PretrainedEntry]:
        """Return a model's published weights by tag; the first is the default. May be empty."""
        self.get(name)
        return self._pretrained[name]


MODELS = ModelRegistry()
TEXT_ENCODERS: Registry[BuildableText] = Registry("text encoder")
CODECS: Registry[Buildable] = Registry("latent codec")
HEADS: Registry[nn.Module] = Registry("discriminator head")


def split_tag(name: str) -> tuple[str, str | None]:
    """Split "arch.tag", where names of models may also contain dots. The tag may be None."""
    architecture, dot, tag = name.rpartition(".")
    if name in MODELS.names() or not dot or architecture not in MODELS.names():
        return name, None
    return architecture, tag


def find_tag(name: str, tag: bool | str) -> str:
    """Return the tag of a model's published weights; True is the first.

    Raises InputError, with the tags that exist, if there is no such tag.
    """
    tags = list(MODELS.pretrained(name))
    if not tags:
        published = [other for other in MODELS.names() if MODELS.pretrained(other)]
        raise InputError(
            f"no weights are published for {name!r}; choose one of {', '.join(published)}, or load "
            "a folder or Hub repository with apt.load_model"
        )
    if tag is True:
        return tags[0]
    if tag not in tags:
        raise InputError(f"{name!r} has no weights {tag!r}; choose from: {', '.join(tags)}")
    return str(tag)


def untrained_timesteps(name: str, timesteps: Iterable[float]) -> str | None:
    """Return a warning if a model's published weights were not trained at some timesteps above 0.

    None if they were trained at all of them. This is about the weights of the first tag.
    """
    entry = next(iter(MODELS.pretrained(name).values()), None)
    below = [t for t in timesteps if entry is not None and 0 < t < entry.lowest_t]
    if entry is None or not below:
        return None
    return (
        f"{name!r} is an expert for t >= {entry.lowest_t:g}, and was not trained at "
        f"{len(below)} of the timesteps, down to {min(below):.3g}; expect poor results there"
    )


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of registered backbones that match a shell-style pattern."""
    return MODELS.names(pattern)
