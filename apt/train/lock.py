"""A lock file with a heartbeat, which allows one run at a time in a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import InputError

__all__ = ["AGE_LIMIT", "LOCK_NAME", "FolderInUse", "RunLock"]

LOCK_NAME = "run.lock"
HEARTBEAT = 10.0
AGE_LIMIT = 60.0


class FolderInUse(InputError):
    """Another process is training in this run folder, or has taken it over."""


class RunLock:
    """Context manager that keeps other runs out of a folder.

    The file names the process, and a thread touches it every few seconds. A lock is stale if it was
    not touched for `age_limit`, or if its process was on this machine and is dead; then it is
    taken. So a killed run can be continued, on the same machine at once.

    Args:
        folder: the run folder; created if missing.
        take_over: take the lock from its owner, which notices this before its next save, and stops.
        heartbeat: seconds between signs of life.
        age_limit: seconds without a sign of life after which a lock is stale. Times come from the
            file system's clock, so machines that share it agree.

    Attributes:
        lost: whether the thread has noticed that another process took the folder over.

    Raises:
        FolderInUse: on entering, if another process holds the lock.
        OSError: the folder cannot be created or written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        take_over: bool = False,
        heartbeat: float = HEARTBEAT,
        age_limit: float = AGE_LIMIT,
    ) -> None:
        self.path = folder / LOCK_NAME
        self.take_over = take_over
        self.heartbeat = heartbeat
        self.age_limit = age_limit
        self.lost = False
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def check(self) -> None:
        """Raise FolderInUse if another process has taken the folder over."""
        owner = _read(self.path)
        if owner is not None and owner.get("token") != self._token:
            raise FolderInUse(
                f"{_who(owner)} has taken over {self.path.parent}; this process stops and "
                "does not change the folder any more"
            )

    def __enter__(self) -> RunLock:
        made = _make(self.path.parent)
        try:
            self._acquire()
        except BaseException:
            _remove_empty(made)
            raise
        self._made = made
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        # An error here must not hide the one that ended the run; a lock that stays becomes stale.
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()
            _remove_empty(self._made)

    def _is_ours(self) -> bool:
        owner = _read(self.path)
        return owner is not None and owner.get("token") == self._token

    def _acquire(self) -> None:
        clock = self.path.with_name(f".{LOCK_NAME}.{self._token}")
        try:
            clock.touch()
            while not _create(self.path, {**_identity(), "token": self._token}):
                owner, age = _read(self.path), _age(self.path, clock)
                if owner is None or age is None:
                    continue  # it was released meanwhile
                if not (self.take_over or age > self.age_limit or _is_dead(owner)):
                    raise FolderInUse(
                        f"{self.path.parent} is in use by {_who(owner)}, which gave a sign of life "
                        f"{max(age, 0.0):.0f} s ago. Wait until it ends, choose another --run-dir, "
                        "or add --take-over to stop it (the lock expires after "
                        f"{self.age_limit:.0f} s without a sign of life)"
                    )
                self._move_away(owner)
        finally:
            clock.unlink(missing_ok=True)

    def _move_away(self, owner: Mapping[str, Any]) -> None:
        """Remove the lock of `owner`, but not a new one that has replaced it meanwhile."""
        away = self.path.with_name(f".{LOCK_NAME}.{self._token}.old")
        try:
            self.path.rename(away)
        except FileNotFoundError:
            return
        found = _read(away)
        if found is not None and found.get("token") != owner.get("token"):
            _create(self.path, found)
        away.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat):
            # A disk that fails now may work next time, and `check` reports a lost lock.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self.path)
                elif self.path.exists():
                    self.lost = True


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a file if it does not exist; return whether it was written."""
    try:
        stream = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with stream:
            json.dump(content, stream)
    except OSError:
        path.unlink()
        raise
    return True


def _make(folder: Path) -> list[Path]:
    """Create a folder; return the folders that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that this run created, if they are still empty."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the contents of a lock; None if there is none, an empty dict if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _age(path: Path, clock: Path) -> float | None:
    """Return seconds since a file was touched, by its file system's clock; None if it is gone."""
    os.utime(clock)
    try:
        return clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _identity() -> dict[str, Any]:
    """Describe this process, so that a later one with the same process ID is told apart."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _started(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _machine() -> list[str]:
    """Return IDs of this boot and of the PID namespace, because containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return [boot, os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux
        return [socket.gethostname()]


def _started(pid: int) -> str | None:
    """Return when a process was started, in kernel ticks; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # Skip the command's name, which may have spaces and brackets; state is field 3, start 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """Return whether this machine can tell that the lock's process is dead."""
    if owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return owner.get("started") is not None and owner["started"] != _started(owner["pid"])


def _who(owner: Mapping[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')} (since {owner.get('since')})"
