"""Fresh processes that use this checkout's package against the local Hub."""

from __future__ import annotations

from pathlib import Path

from tests.hub.server import HubServer
from tests.processes import Result, Running, start

QUICK = "import apt.hub.client; apt.hub.client.FIRST_WAIT = 0.01\n"
"""Retries do not wait, as they would for a real Hub."""


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


def start_python(
    hub: HubServer, home: Path, code: str, *args: str | Path, token: str | None = None, **env: str
) -> Running:
    """As `run_python`, without waiting."""
    home.mkdir(parents=True, exist_ok=True)
    environment = hub.environment(home, token=token, COLUMNS="100", **env)
    return start(code, *args, folder=home, env=environment)
