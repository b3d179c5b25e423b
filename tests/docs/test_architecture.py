"""docs/architecture.md names files that exist, and links to places that do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/architecture.md", "README.md", "AGENTS.md", "CONTRIBUTING.md")


def named_files(page: str) -> list[str]:
    """Paths in backticks or in links, from the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"`((?:apt|tests|benchmarks|examples)/[\w/.]+\.\w+)`", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_is_there(page: str) -> None:
    named = named_files(page)
    assert named
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).is_file()]


def test_the_ways_are_told() -> None:
    named = named_files(PAGES[0])
    rooms = {name.split("/")[1] for name in named}
    assert {"cli", "data", "train", "methods", "models", "kernels", "checkpoints", "hub"} <= rooms
