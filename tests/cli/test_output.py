from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apt.cli.output import printing
from apt.errors import InputError

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        said = "cannot write to standard output: No space"
        with pytest.raises(InputError, match=said), printing():
            print("a report")


def test_a_reader_that_left_is_not_the_disk() -> None:
    with pytest.raises(BrokenPipeError), printing():
        raise BrokenPipeError
