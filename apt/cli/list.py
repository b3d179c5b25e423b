"""`diffusion-apt list`: list everything that is chosen by name."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from apt.cli.app import parse

if TYPE_CHECKING:
    from apt.kernels import BackendStatus
    from apt.models.catalogue import CatalogueEntry
    from apt.registry import Registry

Section = Literal[
    "all", "models", "text_encoders", "codecs", "heads", "losses", "datasets", "recipes",
    "features", "protocols", "peers", "kernels", "attention",
]  # fmt: skip


@dataclass(frozen=True)
class ListCommand:
    """List what can be chosen by name, and which kernels and attention run on this machine."""

    section: Annotated[tyro.conf.Positional[Section], tyro.conf.arg(metavar="SECTION")] = "all"
    """all, or one of: models, text_encoders, codecs, heads, losses, datasets, recipes, features,
    protocols and peers (of `evaluate`), kernels, attention."""
    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*"
    """List only names that match this shell-style pattern; put it in quotes."""


@dataclass(frozen=True)
class Row:
    """One line: a name and its description."""

    name: str
    text: str


def main(args: Sequence[str], *, prog: str) -> None:
    """Print one section, or all of them."""
    command = parse(ListCommand, args, prog=prog)
    chosen = SECTIONS if command.section == "all" else {command.section: SECTIONS[command.section]}
    for title, rows in chosen.items():
        matching = [row for row in rows() if fnmatch(row.name, command.pattern)]
        if matching or command.section != "all":
            print(format_section(title, matching))


def format_section(title: str, rows: Sequence[Row]) -> str:
    """Format a title, aligned rows, and an empty line.

    Long rows are wrapped in a terminal; otherwise each row is one line, for `grep`.
    """
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"  {row.name:<{width}}  {row.text}".rstrip() for row in rows]
    if sys.stdout.isatty():
        columns = max(shutil.get_terminal_size().columns, width + 24)
        # Users copy names, so they must not be split at hyphens.
        fold = textwrap.TextWrapper(
            columns, subsequent_indent=" " * (width + 4), break_on_hyphens=False
        )
        lines = [part for line in lines for part in fold.wrap(line)]
    return "\n".join([f"{title}:", *(lines or ["  (none match)"]), ""])


def _registered(registry: Registry[Any]) -> list[Row]:
    return [Row(name, registry.summary(name)) for name in registry.names()]


def _status(rows: Sequence[BackendStatus]) -> list[Row]:
    return [
        Row(row.name, f"{'available  ' if row.available else 'unavailable'}  {row.reason}")
        for row in rows
    ]


def _models() -> list[Row]:
    from apt.models.catalogue import catalogue
    from apt.models.layers import count_words

    entries = catalogue()
    cells = []
    for entry in entries:
        published = next(iter(entry.pretrained.values()), None)
        gated = " (gated)" if published is not None and published.gated else ""
        cells.append(
            (
                count_words(entry.parameters),
                ", ".join(entry.formats),
                (published.license if published else "no published weights") + gated,
                _origin(entry),
                " ".join(filter(None, [entry.summary, published.source if published else ""])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        Row(
            entry.name,
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)),
        )
        for entry, row in zip(entries, cells, strict=True)
    ]


def _origin(entry: CatalogueEntry) -> str:
    """Return the repositories of the weights, with the tags if there are several."""
    repos = dict.fromkeys(weights.repo for weights in entry.pretrained.values())
    tags = f" (tags {', '.join(entry.pretrained)})" if len(entry.pretrained) > 1 else ""
    return ", ".join(repos) + tags


def _text_encoders() -> list[Row]:
    from apt.models import TEXT_ENCODERS

    return _registered(TEXT_ENCODERS)


def _codecs() -> list[Row]:
    from apt.models import CODECS

    return _registered(CODECS)


def _heads() -> list[Row]:
    from apt.models import HEADS

    return _registered(HEADS)


def _losses() -> list[Row]:
    from apt.losses import LOSSES

    return _registered(LOSSES)


def _datasets() -> list[Row]:
    from apt.data.builtin_sources import DATASETS

    return _registered(DATASETS)


def _recipes() -> list[Row]:
    from apt.train.recipes import RECIPES

    return _registered(RECIPES)


def _features() -> list[Row]:
    from apt.evaluate.features import FEATURES

    return _registered(FEATURES)


def _protocols() -> list[Row]:
    from apt.evaluate.protocols import PROTOCOLS

    return _registered(PROTOCOLS)


def _peers() -> list[Row]:
    from apt.evaluate.peers import PEERS

    return [Row(name, f"{peer.about} ({peer.licence})") for name, peer in PEERS.items()]


def _kernels() -> list[Row]:
    from apt.kernels import kernel_status

    return _status(kernel_status())


def _attention() -> list[Row]:
    from apt.kernels import attention_status

    return _status(attention_status())


# Functions, so that asking for one section imports only what that section needs.
SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "models": _models,
    "text_encoders": _text_encoders,
    "codecs": _codecs,
    "heads": _heads,
    "losses": _losses,
    "datasets": _datasets,
    "recipes": _recipes,
    "features": _features,
    "protocols": _protocols,
    "peers": _peers,
    "kernels": _kernels,
    "attention": _attention,
}
