"""Every message that the page quotes still exists in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    *re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE),
    *re.findall(r"`([^`]+)`", PAGE.split("Warnings do not stop a run. ")[1].split(" point to ")[0]),
]


def flat(node: ast.expr) -> str:
    """A string literal with `…` for what is filled in; empty if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(flat(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (flat(node.left) or "…") + (flat(node.right) or "…")
    return ""


def literals(source: str) -> set[str]:
    """The strings of a module, without its docstrings."""
    tree = ast.parse(source)
    docs = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {flat(n) for n in ast.walk(tree) if isinstance(n, ast.expr) and n not in docs} - {""}


@cache
def messages() -> str:
    """All strings of the package, one a line."""
    files = sorted((ROOT / "apt").rglob("*.py"))
    found = set().union(*(literals(file.read_text(encoding="utf-8")) for file in files))
    return "\n".join(" ".join(text.split()) for text in found)


def is_there(quoted: str, among: str) -> bool:
    """Whether one message has these parts in this order."""
    return re.search(".*".join(map(re.escape, quoted.split("…"))), among) is not None


def test_messages_are_found() -> None:
    assert len(QUOTED) > 50
    source = '"""a doc"""\nraise E(f"no {kind} in "\n  f"{place!r}; try {what}")'
    among = "\n".join(literals(source))
    assert is_there("no … in …; try", among)
    assert not is_there("no … at", among) and not is_there("a doc", among)


@pytest.mark.parametrize("quoted", QUOTED)
def test_it_is_raised(quoted: str) -> None:
    assert len(quoted.replace("…", "").strip()) >= 9, "too short to be told from others"
    assert is_there(quoted, messages())
