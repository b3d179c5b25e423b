"""What the site has beside the files of docs/: pages of the repository's root, and the reference.

The reference has a page for each public module, found in the package itself, and one for all that
is registered by name. So it needs no change when a module or an entry comes, goes or moves.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import pkgutil
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from references import link  # noqa: E402

import apt  # noqa: E402
from apt.registry import Registry  # noqa: E402

# Pages of the repository outside docs/, and what they are called here.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/NOTES.md": "benchmarks.md",
}
# From the first hour to the details. A strict build refuses a page that is missing here.
GUIDES = (
    "training.md",
    "own_parts.md",
    "wan.md",
    "evaluation.md",
    "measures.md",
    "vbench.md",
    "study.md",
    "inside.md",
    "plan.md",
    "scale.md",
    "sequence.md",
    "parallel.md",
    "kernels.md",
    "paper.md",
    "architecture.md",
    "troubleshooting.md",
)
NAMES = "reference/names.md"
_LINK = re.compile(r"\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """The navigation, from what is there."""
    docs = Path(config.docs_dir)
    results = [path.relative_to(docs).as_posix() for path in sorted(docs.glob("results/**/*.md"))]
    outside = [name for name in PAGES.values() if name != "index.md"]
    config.nav = [
        {"Home": "index.md"},
        {"Guides": [{_title(name): name} for name in GUIDES]},
        {"Results": [{_title(name): name} for name in results]},
        {
            "Reference": [
                {"Public API": _page("apt")},
                {"Registered names": NAMES},
                *_tree(modules()),
            ]
        },
        {"Project": [{_title(name): name} for name in outside]},
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, and those that are made here."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, NAMES, content=registered_names()))
    for name in modules():
        files.append(File.generated(config, _page(name), content=module_page(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository lead to their pages, names of the package to theirs."""
    place = page.file.src_uri
    if place.startswith("reference/"):
        return markdown
    source = next((s for s, target in PAGES.items() if target == place), f"docs/{place}")
    moved = _moved(markdown, source, place, files, config)
    # The changelog names what is gone, too.
    return moved if source == "CHANGELOG.md" else link(moved)


# --- the reference -----------------------------------------------------------------------------


@functools.cache
def modules() -> list[str]:
    """Every module of the package without an underscore in its path."""
    found = ["apt"] + [info.name for info in pkgutil.walk_packages(apt.__path__, "apt.")]
    return sorted(name for name in found if not re.search(r"\._", name))


def module_page(name: str) -> str:
    """What a module defines itself; of a package also links to what it re-exports."""
    members = "".join(f"\n        - {member}" for member in own_names(name)) or " []"
    text = f"::: {name}\n    options:\n      members:{members}\n"
    exported = _exports(name)
    if exported:
        text += "\n## Exports\n\n" + "\n".join(f"- {entry}" for entry in exported) + "\n"
    return text


@functools.cache
def own_names(module: str) -> tuple[str, ...]:
    """Public names that a module defines, in order, and does not merely import."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return tuple(name for name in dict.fromkeys(names) if not name.startswith("_"))


def registered_names() -> str:
    """Every registry of the package, with the first line that each entry says of itself."""
    lines = ["# Names", ""]
    for registry in _registries():
        rows = [(_linked(registry.get(n), n), registry.summary(n)) for n in registry.names()]
        lines += _table(_plural(registry.kind), rows)
    for title, found in (("Methods", _methods()), ("Kernels", _kernels())):
        lines += _table(title, [(_linked(value, value.__name__), text) for value, text in found])
    return "\n".join(lines)


def _exports(name: str) -> list[str]:
    """A package's `__all__` as list entries: name and first line, linked to where it is defined."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return []
    entries = []
    for exported in sorted(getattr(module, "__all__", [])):
        value = getattr(module, exported)
        entries.append(" — ".join(filter(None, [_linked(value, exported), _first_line(value)])))
    return entries


def _registries() -> list[Registry[Any]]:
    """All registries of the package, by what they hold."""
    found = {
        id(value): value
        for name in modules()
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, Registry)
    }
    return sorted(found.values(), key=lambda registry: registry.kind)


def _methods() -> list[tuple[type, str]]:
    """Every method's config, and what comes out."""
    found = {
        value: value.summary
        for name in modules()
        for value in vars(importlib.import_module(name)).values()
        if inspect.isclass(value) and {"exports_as", "summary"} <= vars(value).keys()
    }
    return sorted(found.items(), key=lambda item: item[0].__name__)


def _kernels() -> list[tuple[Any, str]]:
    """Every op that runs on one of several backends, and what it says of itself."""
    kernels = importlib.import_module("apt.kernels")
    ops = [getattr(kernels, name) for name in kernels.__all__]
    return [
        (op, _first_line(op))
        for op in ops
        if callable(op) and "backend" in inspect.signature(op).parameters
    ]


def _linked(value: Any, name: str) -> str:
    """The name, as a link to where the package defines the value, if it is public there."""
    if inspect.ismodule(value):
        return f"[`{name}`][{value.__name__}]"
    module, inside = getattr(value, "__module__", ""), getattr(value, "__qualname__", name)
    if inside not in own_names(module if module in modules() else "apt"):
        module = next((m for m in modules() if _defines(m, name, value)), "")
    return f"[`{name}`][{module}.{inside}]" if module else f"`{name}`"


def _defines(module: str, name: str, value: Any) -> bool:
    return name in own_names(module) and getattr(sys.modules[module], name) is value


def _first_line(value: Any) -> str:
    described = inspect.ismodule(value) or callable(value)
    return (inspect.getdoc(value) or "").partition("\n")[0] if described else ""


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    cells = [f"| {name} | {text.replace('|', '&#124;')} |" for name, text in rows]
    return [f"## {title}", "", "| name | what it is |", "| --- | --- |", *cells, ""]


def _plural(kind: str) -> str:
    stem, ending = (kind[:-1], "ies") if kind.endswith("y") else (kind, "s")
    return (stem + ("es" if kind.endswith("s") else ending)).capitalize()


# --- the pages of the repository ---------------------------------------------------------------


def _moved(text: str, source: str, place: str, files: Files, config: MkDocsConfig) -> str:
    """A page of the repository for its place in the site: its links follow.

    What has no page is copied as it is; of a folder only the words stay.
    """
    here, folder = PurePosixPath(place).parent, PurePosixPath(source).parent

    def moved(match: re.Match[str]) -> str:
        words, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        if re.match(r"[a-z]+:", target):
            return match.group()
        path = os.path.normpath(folder / target)
        if (ROOT / path).is_dir():
            return words
        return f"[{words}]({os.path.relpath(_place(path, files, config), here)}{anchor})"

    return _LINK.sub(moved, text)


def _place(path: str, files: Files, config: MkDocsConfig) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("apt/") and path.endswith(".py"):
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return _page(name)
    # A suffix keeps the site from taking it for a page.
    place = f"source/{path}" + ("" if Path(path).suffix not in ("", ".md") else ".txt")
    if files.get_file_from_path(place) is None:
        content = (ROOT / path).read_bytes()
        files.append(File.generated(config, place, content=content))
    return place


def _page(module: str) -> str:
    return f"reference/{module}.md"


def _tree(names: list[str]) -> list[Any]:
    """The modules as a navigation, packages with theirs below them."""
    parts: dict[str, list[str]] = {}
    for name in names:
        if name != "apt":
            parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return [
        {top: [{name: _page(name)} for name in inside] if len(inside) > 1 else _page(top)}
        for top, inside in parts.items()
    ]


def _title(path: str) -> str:
    """The first heading of a page of docs/ or of the repository."""
    sources = {target: ROOT / source for source, target in PAGES.items()}
    lines = sources.get(path, ROOT / "docs" / path).read_text(encoding="utf-8").splitlines()
    return next(line.lstrip("# ") for line in lines if line.startswith("# "))
