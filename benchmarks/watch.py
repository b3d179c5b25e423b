"""Watch processes that may die or hang: name the work that was running, and continue after it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.events import Event, begun, read_events

ROOT = Path(__file__).resolve().parents[1]

_POLL_SECONDS = 0.05
_EXIT_SECONDS = 20  # to exit after all work is done
_TIME_UP = "was killed because the time was up"
_KEPT_LINES = 60  # last lines of a process's output


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended.

    Attributes:
        finished: whether it did all its work.
        code: exit code.
        name: the work that was running; empty between two pieces of work.
        reason: how the process ended, in words.
        output: the last lines that it printed.
        time_up: whether it was killed at the deadline.
    """

    finished: bool
    code: int
    name: str
    reason: str
    output: str
    time_up: bool = False


def watch(
    command: Sequence[str],
    events: Path,
    *,
    limit: Callable[[str], float],
    start_limit: float,
    deadline: float,
    on_event: Callable[[Event], None],
    on_death: Callable[[Exit], None],
    env: Mapping[str, str] | None = None,
) -> Exit:
    """Run a command until it has done all its work; restart it each time that it dies.

    The command must write `events`, and leave out work that was already started according to that
    file, as `benchmarks.worker` and pytest with `benchmarks.pytest_events` do. Its output is passed
    on.

    Args:
        command: command to run in the checkout's root.
        events: file of events.
        limit: returns the seconds that a piece of work may take, by its name.
        start_limit: seconds between pieces of work, imports included.
        deadline: time on `time.monotonic` at which the command is killed.
        on_event: called with each event.
        on_death: called each time the command dies. It is not restarted if it started nothing new,
            or the time is up.
        env: variables added to this process's environment.

    Returns:
        How the last process ended.
    """
    while True:
        known = begun(events)
        ended = _watch_one(command, events, limit, start_limit, deadline, on_event, env)
        if ended.finished:
            return ended
        on_death(ended)
        if ended.time_up or begun(events) == known:
            return ended


def _watch_one(
    command: Sequence[str],
    events: Path,
    limit: Callable[[str], float],
    start_limit: float,
    deadline: float,
    on_event: Callable[[Event], None],
    env: Mapping[str, str] | None,
) -> Exit:
    seen = len(read_events(events))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children can be killed with it
    )
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    echo = threading.Thread(target=_pass_on, args=(process, kept), daemon=True)
    echo.start()
    current, since, finished, reason = "", time.monotonic(), False, ""
    try:
        while True:
            ended = process.poll() is not None
            for event in read_events(events)[seen:]:
                seen += 1
                since = time.monotonic()
                current = event["name"] if event["kind"] == "begin" else ""
                finished = event["kind"] == "finished"
                on_event(event)
            if ended:
                break
            now, allowed = time.monotonic(), limit(current) if current else start_limit
            allowed = _EXIT_SECONDS if finished else allowed
            if now > deadline:
                reason = _TIME_UP
            elif now - since > allowed:
                reason = f"was killed because it took more than {allowed:.0f} s"
            if reason:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        _end(process)
        echo.join(timeout=5)
    return Exit(
        finished=finished,
        code=process.returncode,
        name=current,
        reason=reason or _in_words(process.returncode),
        output="".join(kept).rstrip(),
        time_up=reason == _TIME_UP,
    )


def _pass_on(process: subprocess.Popen[str], kept: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        kept.append(line)
        sys.stdout.write(line)
        sys.stdout.flush()


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process and its children."""
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _in_words(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
