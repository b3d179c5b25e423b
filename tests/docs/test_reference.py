"""The site: dead links fail the build, and names of the package are links."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocstrings")

import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import apt

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_site"


@pytest.fixture(scope="module")
def made() -> Any:
    """The hooks of the site, and the modules beside them that they import."""
    sys.path.insert(0, str(SITE))
    try:
        yield importlib.import_module("hooks")
    finally:
        sys.path.remove(str(SITE))


def build_site(folder: Path, docstring: str) -> None:
    """Build a page for a package with one function, with the site's settings."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    for plugin in settings["plugins"]:
        if "mkdocstrings" in plugin:
            python = plugin["mkdocstrings"]["handlers"]["python"]
            python["paths"] = [str(folder)]
            python["options"]["extensions"] = [str(SITE / "references.py")]
    settings |= {"docs_dir": "docs", "site_dir": "site", "hooks": [], "exclude_docs": ""}
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text("::: apt\n")
    (folder / "apt").mkdir()
    source = (
        f'"""Made up."""\n\ndef there(width: int, height: int) -> None:\n    """{docstring}"""\n'
    )
    (folder / "apt" / "__init__.py").write_text(source)
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    build(load_config(str(folder / "mkdocs.yml")))


@pytest.mark.parametrize(
    "docstring",
    [
        "See `apt.nowhere`.",
        "See [that][apt.nowhere].",
        "Sizes.\n\n    Args:\n        width, depth: in pixels.\n    ",
    ],
)
def test_a_docstring_that_leads_nowhere_fails_the_build(tmp_path: Path, docstring: str) -> None:
    with pytest.raises(Abort):
        build_site(tmp_path, docstring)


def test_names_of_the_package_are_links(tmp_path: Path) -> None:
    build_site(
        tmp_path,
        "See `apt.there` and `apt.json`.\n\n    Args:\n        width, height: in pixels.\n    ",
    )
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'href="#apt.there"><code>apt.there</code></a> and <code>apt.json</code>' in page
    assert page.count("<p>in pixels.</p>") == 2  # of each


def test_every_public_module_has_a_page(made: Any) -> None:
    listed = set(made.modules())
    for path in (ROOT / "apt").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        assert (name in listed) == (not any(part.startswith("_") for part in name.split(".")))


def test_the_public_names_lead_to_where_they_are_defined(made: Any) -> None:
    page = made.module_page("apt")
    for name in apt.__all__:
        assert f"`{name}`" in page
    assert "[`generate`][apt.methods.apt.generate] — " in page


def test_what_is_registered_is_listed(made: Any) -> None:
    page = made.registered_names()
    for title in ("Models", "Losses", "Latent codecs", "Recipes", "Methods", "Kernels"):
        assert f"## {title}\n" in page
    for name in ("approximate_r1", "mmdit_digits", "digits_apt", "AdversarialConfig"):
        assert f"[`{name}`][apt." in page
    assert "[`query_pooling`][" in page
