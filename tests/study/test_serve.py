"""The server as a process: its links, its port, and its death."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from apt.errors import DataError, InputError
from apt.study.document import MEDIA
from apt.study.serve import ServeConfig, study_server
from apt.study.store import AnswerStore
from apt.study.tokens import KEY_FILE, read_key, token
from tests.cli.shell import ROOT
from tests.study.folders import small_study
from tests.study.test_store import LEFT


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and the first rater's link."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apt", "study", "serve", str(folder), "--port", "0", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("rater 1: http://127.0.0.1:"), process.communicate()
    return process, line.partition(": ")[2].strip()


def ask(link: str, path: str, document: Any = None) -> Any:
    body = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(link + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_a_killed_server_loses_nothing_and_its_links_stay(tmp_path: Path) -> None:
    study = small_study(tmp_path / "study")
    process, link = start(tmp_path / "study")
    assert ask(link, "study")["next"] == 0
    for position in range(3):
        ask(link, f"tasks/{position}", {"version": 1, "choices": LEFT})
    process.kill()
    process.communicate()
    again, new_link = start(tmp_path / "study", "--raters", "5")
    assert new_link.partition("/r/")[2] == link.partition("/r/")[2]
    # The answer whose acknowledgement was lost comes once more.
    assert ask(new_link, "tasks/2", {"version": 1, "choices": LEFT})["next"] == 3
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (0, "")
    kept = [one for one in AnswerStore(tmp_path / "study", study).everything() if one.version]
    assert [(one.position, one.version, one.choices) for one in kept] == [
        (position, 1, LEFT) for position in range(3)
    ]


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    small_study(tmp_path / "study")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(InputError, match=rf"port {port} of 127\.0\.0\.1 is in use"),
            study_server(tmp_path / "study", ServeConfig(port=port)),
        ):
            pass
    with study_server(tmp_path / "study", ServeConfig(port=port)) as (_, links):
        assert links[0].startswith(f"http://127.0.0.1:{port}/r/")
    with (
        pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1"),
        study_server(tmp_path / "study", ServeConfig(host="203.0.113.1")),
    ):
        pass
    with study_server(tmp_path / "study", ServeConfig(port=0, address="https://a.example/")) as (
        _,
        links,
    ):
        assert len(links) == 3 and links[0].startswith("https://a.example/r/")


def test_a_missing_sample_is_one_line(tmp_path: Path) -> None:
    study = small_study(tmp_path / "study")
    (tmp_path / "study" / MEDIA / study.pairs[0].files[0]).unlink()
    with (
        pytest.raises(DataError, match="1 sample of the study, such as"),
        study_server(tmp_path / "study", ServeConfig(port=0)),
    ):
        pass


def test_tokens_stay_and_tell_nothing(tmp_path: Path) -> None:
    key = read_key(tmp_path)
    assert read_key(tmp_path) == key and len(key) == 32
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    tokens = {token(key, rater) for rater in range(1, 100)}
    assert len(tokens) == 99 and {len(one) for one in tokens} == {22}
    assert token(bytes(32), 1) not in tokens
    for damaged in ("xyz", "00" * 31):
        (tmp_path / KEY_FILE).write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            read_key(tmp_path)


def test_options_are_checked() -> None:
    for options, message in (
        ({"raters": 0}, "raters must be from 1 to"),
        ({"pairs_per_rater": 0}, "pairs_per_rater must be at least 1"),
        ({"port": 70_000}, "port must be from 0 to 65535"),
    ):
        with pytest.raises(InputError, match=message):
            ServeConfig(**options)
