"""Processes forked from one that has torch and our package loaded (`tests.nursery`)."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]

Result = subprocess.CompletedProcess[str]


class Running:
    """A process under way."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder

    def wait_for(self, timeout: float = 3600) -> Result:
        """Wait for its end. A process that was killed has minus the signal as its code."""
        code = self.folder / "code"
        wait_until(lambda: code.exists() or not self.alive(), timeout)
        return self._result(int(code.read_text()) if code.exists() else -signal.SIGKILL)

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.alive())

    def _result(self, code: int) -> Result:
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], code, out, err)


def start(code: str, *args: str | Path, folder: Path, env: dict[str, str]) -> Running:
    """Run Python code in a process of its own, with this environment; its output is in `folder`."""
    place = Path(tempfile.mkdtemp(prefix="process-", dir=folder))
    request = {
        "code": code,
        "args": [str(arg) for arg in args],
        "env": env,
        "folder": str(place),
    }
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    return Running(int(nursery.stdout.readline()), place)


def start_main(module: str, *args: int | str | Path | list[str], folder: Path) -> Running:
    """`main(*args)` of a module of the tests, in a process of its own."""
    given = ", ".join(f"Path({str(a)!r})" if isinstance(a, Path) else repr(a) for a in args)
    code = f"from pathlib import Path\nfrom {module} import main\nmain({given})\n"
    return start(code, folder=folder, env=dict(os.environ))


def run_main(module: str, *args: int | str | Path | list[str], folder: Path) -> Result:
    """Like `start_main`, but wait for the end; fail if the process fails."""
    done = start_main(module, *args, folder=folder).wait_for()
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """One for all tests; it ends with this process, which closes its stdin."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.nursery"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
