"""Fresh processes that use this checkout's package against the local Hub."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.hub.server import HubServer
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]

Result = subprocess.CompletedProcess[str]

QUICK = "import apt.hub.client; apt.hub.client.FIRST_WAIT = 0.01\n"
"""Try again at once: tests need not wait as a real Hub deserves."""


def run_python(
    hub: HubServer, home: Path, code: str, *args: str | Path, token: str | None = None, **env: str
) -> Result:
    """Run Python code in a process whose Hub is `hub`, and whose cache is in `home`."""
    return start_python(hub, home, code, *args, token=token, **env).wait_for()


def run_cli(
    hub: HubServer, home: Path, *args: str | Path, token: str | None = None, **env: str
) -> Result:
    """`diffusion-apt ARGS` in such a process."""
    code = QUICK + "import sys; from apt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return run_python(hub, home, code, *args, token=token, **env)


class Running:
    """A process under way."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder

    def wait_for(self, timeout: float = 300) -> Result:
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


def start_python(
    hub: HubServer, home: Path, code: str, *args: str | Path, token: str | None = None, **env: str
) -> Running:
    """As `run_python`, without waiting."""
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="process-", dir=home))
    environment = hub.environment(home, token=token, COLUMNS="100", **env)
    request = {
        "code": code,
        "args": [str(arg) for arg in args],
        "env": environment,
        "folder": str(folder),
    }
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    return Running(int(nursery.stdout.readline()), folder)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """One for all tests; it ends with this process, which closes its stdin."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.hub.nursery"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
