"""Run with another Triton than the installed one, in a separate folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def run_with(version: str, args: list[str]) -> int:
    """Run this package with a Triton that pip installs under build/; return the exit status.

    torch stays the installed one: kernels are launched through it, but only Triton compiles.
    """
    folder = _ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
                *("--no-deps", "--target", str(folder), f"triton=={version}"),
            ],
            check=True,
        )
    paths = [str(folder), str(_ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.aot", *args]
    return subprocess.run(command, cwd=_ROOT, env=environment).returncode
