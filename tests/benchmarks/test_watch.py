"""A step that dies, hangs or raises is named, and the others still run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.events import Events, begun, read_events
from benchmarks.watch import Exit, watch

COMMAND = (sys.executable, "-m", "benchmarks.worker")


def job(name: str, **options: Any) -> dict[str, Any]:
    call = f"tests.benchmarks.faults:{name}"
    return {"name": name, "call": call, "seconds": 1, "options": options}


def run(
    folder: Path, *jobs: dict[str, Any], seconds: float = 60, limit: float = 60
) -> tuple[dict[str, dict[str, Any]], list[Exit]]:
    """Return how every finished job ended, and the deaths."""
    deadline = time.monotonic() + seconds
    plan = {"context": {"rehearsal": False}, "deadline": deadline, "jobs": jobs}
    (folder / "plan").write_text(json.dumps(plan))
    told: list[dict[str, Any]] = []
    deaths: list[Exit] = []
    watch(
        [*COMMAND, str(folder / "plan"), str(folder / "events")],
        folder / "events",
        limit=lambda name: 0.7 if name == "hangs" else limit,
        start_limit=60,
        deadline=deadline,
        on_event=told.append,
        on_death=deaths.append,
    )
    assert told == read_events(folder / "events")
    return {event["name"]: event for event in told if event["kind"] == "end"}, deaths


def test_whatever_a_job_does_the_others_run(tmp_path, capfd):
    broken = ("aborts", "raises", "exits", "hangs")
    ends, deaths = run(tmp_path, *map(job, broken), job("measures", only=["a"]))
    assert [(death.name, death.reason) for death in deaths] == [
        ("aborts", "was killed by SIGABRT"),
        ("exits", "ended with exit code 7"),
        ("hangs", "was killed because it took more than 1 s"),
    ]
    assert "about to abort" in deaths[0].output
    assert ends.keys() == {"raises", "measures"}
    assert ends["measures"]["measurements"][0]["case"]["kernels"] == "a"
    assert ends["raises"]["traceback"].endswith(
        "RuntimeError: CUDA error: invalid configuration argument\n"
    )
    assert "working\n" in capfd.readouterr().out  # what a process prints is passed on


def test_when_the_time_is_up_nothing_is_begun_and_nothing_runs_on(tmp_path):
    long = job("hangs") | {"name": "long"}
    ends, (death,) = run(
        tmp_path, job("measures"), job("raises") | {"seconds": 99}, long, seconds=1.5
    )
    assert (death.name, death.reason) == ("long", "was killed because the time was up")
    assert ends.keys() == {"measures"}
    assert [e["name"] for e in read_events(tmp_path / "events") if e["kind"] == "skip"] == [
        "raises"
    ]


def test_a_command_that_never_begins_is_started_once(tmp_path):
    deaths: list[Exit] = []
    watch(
        [sys.executable, "-c", "raise SystemExit('no module named torch')"],
        tmp_path / "events",
        limit=lambda name: 60,
        start_limit=60,
        deadline=time.monotonic() + 60,
        on_event=lambda event: None,
        on_death=deaths.append,
    )
    (death,) = deaths
    assert (death.name, death.reason) == ("", "ended with exit code 1")
    assert death.output == "no module named torch"


def test_an_event_that_was_cut_short_is_none(tmp_path):
    events = Events(tmp_path / "events")
    events.write("begin", "a")
    events.write("skip", "b")
    with (tmp_path / "events").open("a") as file:
        file.write('{"kind": "begin", "na')
    assert begun(tmp_path / "events") == {"a", "b"}
    assert read_events(tmp_path / "nowhere") == []


TESTS = """
import os, time, pytest

@pytest.mark.parametrize("what", ["first", "abort", "fail", "skip", "abort last"])
def test(what):
    if what.startswith("abort"):
        os.abort()
    if what == "skip":
        pytest.skip("no need")
    assert what != "fail", "a wrong value"
"""


def test_a_test_that_ends_its_process_ends_no_other_test(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    events, ends, deaths = tmp_path / "events", [], []
    watch(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.pytest_events", "-p",
            "no:cacheprovider", "--noconftest", str(tmp_path / "test_it.py"),
        ],
        events,
        limit=lambda name: 60,
        start_limit=60,
        deadline=time.monotonic() + 120,
        on_event=lambda event: ends.append(event) if event["kind"] == "end" else None,
        on_death=deaths.append,
        env={"APT_TEST_EVENTS": str(events), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert [(death.name.rpartition("[")[2], death.reason) for death in deaths] == [
        ("abort]", "was killed by SIGABRT"),
        ("abort last]", "was killed by SIGABRT"),
    ]
    outcomes = {event["name"].rpartition("[")[2]: event["outcome"] for event in ends}
    assert outcomes == {"first]": "passed", "fail]": "failed", "skip]": "skipped"}
    (failed,) = [event for event in ends if event["outcome"] == "failed"]
    assert "a wrong value" in failed["traceback"]
