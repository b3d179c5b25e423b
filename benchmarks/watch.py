"""Processes that may die or hang, watched: what they were doing is named, and the rest goes on."""

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
_EXIT_SECONDS = 20  # to leave, when all is done
_TIME_UP = "was ended, as the time was up"
_KEPT_LINES = 60  # of what a process printed before it died


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended.

    Attributes:
        finished: whether it came to its end.
        code: its exit code.
        name: the work that was in flight; empty if none had begun, or the next one had not.
        reason: how it ended, in words.
        output: the last lines that it printed.
        time_up: whether it was ended at the deadline.
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
    """Run a command until it has done all of its work, again after each death.

    The command writes `events` and leaves out what had begun there (`apt` has two such commands:
    `benchmarks.worker` and pytest with `benchmarks.pytest_events`). What it prints is passed on.

    Args:
        command: run in the checkout's root.
        events: its file.
        limit: seconds that a piece of work may take, by its name.
        start_limit: seconds between pieces of work, imports included.
        deadline: on `time.monotonic`; whatever runs then is ended.
        on_event: is told each event.
        on_death: is told each death; the command is not started again if it had begun nothing new,
            or the time is up.
        env: added to this process's.

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
        start_new_session=True,  # so that its own children end with it
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
                reason = f"was ended, as it took more than {allowed:.0f} s"
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
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # it was over
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _in_words(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
