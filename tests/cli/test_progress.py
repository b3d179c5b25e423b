"""How far a command is, where nobody can see a bar."""

from __future__ import annotations

import sys
import threading

import pytest

from apt.cli.progress import progress_bar
from tests.waiting import wait_until


def test_without_a_terminal_lines_say_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def seen(line: str) -> bool:
        said.extend(capfd.readouterr().err.splitlines())
        return line in said

    with progress_bar("samples", interval=0.01) as update:
        wait_until(lambda: seen("samples: 0"))
        update(3, 9)
        wait_until(lambda: seen("samples: 3/9"))
    before = threading.active_count()
    capfd.readouterr()
    with progress_bar("short", 2) as update:
        update(1)
        update(2)
    assert capfd.readouterr().err == "" and threading.active_count() == before


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    before = threading.active_count()
    with progress_bar("samples", interval=0.01) as update:
        update(1)
        assert threading.active_count() == before and not sys.stderr.isatty()
