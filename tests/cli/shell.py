"""Run the command line: in a separate process like a shell or, for speed, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from apt.cli.app import main

ROOT = Path(__file__).resolve().parents[2]

Result = subprocess.CompletedProcess[str]


def run_cli(*args: str | Path, cwd: Path | None = None) -> Result:
    """`diffusion-apt ARGS` with this checkout's package, in a terminal of 100 columns."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "apt", *args],
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "100", "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
    )


def invoke(*args: str | Path) -> Result:
    """The same in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit_:  # the parser's, for --help and options it does not know
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def error_line(result: Result) -> str:
    """Return the one line of a user error; fail if there is more output."""
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stderr}"
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")
