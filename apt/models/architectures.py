"""Architectures by name: the configurations that `apt.models.create` builds from.

A builder takes no argument and returns a frozen config dataclass with a `build()` method; overrides
replace its fields. A model's identity in a file is its registered name and its config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from apt.errors import InputError
from apt.hub.pretrained import PretrainedEntry
from apt.models.protocols import PromptCheck
from apt.registry import B, Registry


class Buildable(Protocol):
    """A frozen config dataclass."""

    def build(self) -> Any: ...


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
            "apt.from_pretrained loads folders and Hub repositories"
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
