"""Downloads by the real huggingface_hub client, in fresh processes, from a local Hub."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.hub.processes import QUICK, Result, run_python, start_python
from tests.hub.server import STRANGER, TOKEN, HubServer
from tests.waiting import wait_until

LARGE = os.urandom(3_000_000)
FILES = {"config.json": b'{"a": 1}', "sub/model.safetensors": LARGE, "model.bin": b"pickle"}

DOWNLOAD = (
    QUICK
    + """
import sys
from pathlib import Path
from apt.errors import InputError
from apt.hub.download import download
for name in sys.argv[1:]:
    repo, _, rest = name.partition("@")
    revision, _, local_dir = rest.partition(">")
    try:
        folder = download(
            repo, revision or None, ["*.json", "*.safetensors"], local_dir=local_dir or None
        )
        files = [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]
        print("OK", folder.name, *sorted(f"{p.name}:{p.stat().st_size}" for p in files))
    except InputError as error:
        print(error)
"""
)
WHOLE = f"config.json:8 model.safetensors:{len(LARGE)}"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("owner/model", dict(FILES))
        yield server


def download(hub: HubServer, home: Path, *names: str, **options: str) -> list[str]:
    return lines_of(run_python(hub, home, DOWNLOAD, *names, **options))


def lines_of(result: Result) -> list[str]:
    assert result.returncode == 0, result.stderr
    assert not result.stderr, "what matters is in the error itself"
    return result.stdout.splitlines()


def cached(home: Path) -> list[Path]:
    return [path for path in home.rglob("blobs/*") if path.is_file()]


def test_only_what_was_asked_for_comes_and_only_once(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.repos["owner/model"].sha(0)
    assert download(hub, tmp_path, "owner/model") == [f"OK {sha} {WHOLE}"]
    assert not hub.requests("model.bin")
    asked = len(hub.requests("GET /storage"))
    assert asked == 1
    assert download(hub, tmp_path, "owner/model", f"owner/model@{sha}") == [f"OK {sha} {WHOLE}"] * 2
    assert len(hub.requests("GET /storage")) == asked
    assert not hub.leaks


def test_a_token_never_goes_to_the_storage_host(hub: HubServer, tmp_path: Path) -> None:
    hub.repos["owner/model"].private = True
    (line,) = download(hub, tmp_path, "owner/model", token=TOKEN)
    assert line.endswith(WHOLE)
    assert hub.requests("GET /storage") and not hub.leaks


def test_revisions_are_branches_and_commits(hub: HubServer, tmp_path: Path) -> None:
    old = hub.repos["owner/model"].sha(0)
    new = hub.add("owner/model", {"config.json": b"{}"})
    side = hub.add("owner/model", {"config.json": b"[]  "}, branch="side")
    lines = download(
        hub, tmp_path, "owner/model", f"owner/model@{old}", "owner/model@side", "owner/model@none"
    )
    assert lines[0] == f"OK {new} config.json:2"
    assert lines[1] == f"OK {old} {WHOLE}"
    assert lines[2] == f"OK {side} config.json:4"
    assert "has no revision 'none'" in lines[3]


def test_what_has_no_access_says_where_to_get_it(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/private", dict(FILES), private=True)
    hub.add("owner/gated", dict(FILES), gated=True)
    names = ("owner/none", "owner/private", "owner/gated", "not/an/id")
    missing, private, gated, wrong = download(hub, tmp_path, *names)
    for line in (missing, private):
        assert "no such model, or it is private" in line
    assert f"accept the licence at {hub.endpoint}/owner/gated" in gated
    for line in (missing, private, gated):
        assert "log in with `hf auth login`, or set HF_TOKEN" in line
    assert "neither a folder nor a Hub id" in wrong

    _, private, gated, _ = download(hub, tmp_path, *names, token=STRANGER)
    assert "no such model, or it is private" in private
    assert "accept the licence at" in gated
    for line in (private, gated):
        assert "that has access: the current one has none" in line

    _, private, gated, _ = download(hub, tmp_path, *names, token=TOKEN)
    assert private.endswith(WHOLE) and gated.endswith(WHOLE)

    (refused,) = download(hub, tmp_path, "owner/private@x", token="hf_nonsense")
    assert "HF_TOKEN" in refused


def test_offline_the_cache_serves_and_says_what_it_lacks(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.repos["owner/model"].sha(0)
    download(hub, tmp_path, "owner/model")
    asked = len(hub.log)
    lines = download(
        hub, tmp_path, "owner/model", f"owner/model@{sha}", "owner/other", HF_HUB_OFFLINE="1"
    )
    assert lines[:2] == [f"OK {sha} {WHOLE}"] * 2
    assert "nor complete in the local cache, and HF_HUB_OFFLINE is set" in lines[2]
    assert len(hub.log) == asked, "offline means offline"


def test_without_a_connection_the_cache_serves(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.repos["owner/model"].sha(0)
    download(hub, tmp_path, "owner/model")
    with HubServer() as closed:
        endpoint = closed.endpoint
    names = ("owner/model", f"owner/model@{sha}", "owner/other", "owner/model")
    result = run_python(hub, tmp_path, DOWNLOAD, *names, HF_ENDPOINT=endpoint)
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"OK {sha} {WHOLE}"] * 2 and lines[3] == lines[0]
    assert f"the Hub cannot be reached at {endpoint}" in lines[2]
    (told,) = result.stderr.splitlines()
    assert endpoint in told and "using the copy of 'owner/model' on this disk" in told


def test_a_hub_that_is_silent_is_not_waited_for(hub: HubServer, tmp_path: Path) -> None:
    """A proxy that takes the connection and never answers; the test ends, or hangs."""
    sha = hub.repos["owner/model"].sha(0)
    download(hub, tmp_path, "owner/model")
    impatient = "import apt.hub.download; apt.hub.download.PATIENCE = 0.1\n"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = run_python(
            hub,
            tmp_path,
            impatient + DOWNLOAD,
            "owner/model",
            f"owner/model@{sha}",
            "owner/other",
            HF_ENDPOINT=endpoint,
            HF_HUB_ETAG_TIMEOUT="1",
        )
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"OK {sha} {WHOLE}"] * 2
    assert f"the Hub cannot be reached at {endpoint}" in lines[2]
    (told,) = result.stderr.splitlines()
    assert "timed out" in told and "using the copy of 'owner/model' on this disk" in told


def test_a_broken_hub_is_not_waited_for_either(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.repos["owner/model"].sha(0)
    download(hub, tmp_path, "owner/model")
    hub.faults.failures = 10**6
    result = run_python(hub, tmp_path, DOWNLOAD, "owner/model")
    assert result.stdout == f"OK {sha} {WHOLE}\n"
    assert "answers 503; using the copy of 'owner/model'" in result.stderr


def test_names_that_lead_out_of_the_folder_write_nothing(hub: HubServer, tmp_path: Path) -> None:
    names = (
        "../evil.json",
        "sub/../../../../evil.json",
        f"{tmp_path}/evil.json",
        "a\\..\\evil.json",
    )
    for number, name in enumerate(names):
        hub.add(f"owner/evil{number}", {"config.json": b"{}", name: b"{}"})
    target = tmp_path / "here"
    lines = download(
        hub,
        tmp_path / "home",
        *(f"owner/evil{number}{place}" for number in range(4) for place in ("", f"@>{target}")),
    )
    assert len(lines) == 8
    for line in lines:
        assert "cannot download 'owner/evil" in line and "evil.json" in line
    assert not list(tmp_path.rglob("*evil.json"))


def test_a_link_in_the_cache_that_leads_out_of_it(hub: HubServer, tmp_path: Path) -> None:
    download(hub, tmp_path, "owner/model")
    (secret := tmp_path / "secret.json").write_text('{"password": 1}')
    (file,) = tmp_path.rglob("snapshots/*/config.json")
    file.unlink()
    file.symlink_to(secret)
    (line,) = download(hub, tmp_path, "owner/model", HF_HUB_OFFLINE="1")
    assert f"is a link to '{secret}', outside its folder" in line


class LoginPage(BaseHTTPRequestHandler):
    """The login page of a network such as a hotel's."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def test_what_is_no_hub_says_so(hub: HubServer, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), LoginPage) as page:
        Thread(target=page.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{page.server_port}"
        (line,) = download(hub, tmp_path, "owner/model", HF_ENDPOINT=endpoint)
        page.shutdown()
    assert f"{endpoint} does not answer like the Hub" in line
    (line,) = download(hub, tmp_path, "owner/model", HF_ENDPOINT="nowhere")
    assert "cannot download 'owner/model'" in line
    (line,) = download(hub, tmp_path, "owner/model", HF_ENDPOINT="http://[oops")
    assert "check HF_ENDPOINT" in line


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    home = str(tmp_path / "file" / "home")
    for line in download(
        hub, tmp_path, "owner/model", f"owner/model@>{tmp_path}/file/here", HF_HOME=home
    ):
        assert f"cannot write '{tmp_path}/file" in line and "set HF_HOME or --local-dir" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
@pytest.mark.slow
def test_a_cache_on_a_read_only_disk_serves(hub: HubServer, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        (whole,) = download(hub, tmp_path, "owner/model", HF_HOME=str(disk))
        hub.add("owner/another", dict(FILES))
        shutil.rmtree(next(disk.rglob("apt-verified")))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        there, refused = download(hub, tmp_path, "owner/model", "owner/another", HF_HOME=str(disk))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert there == whole
    assert "cannot write" in refused and "Read-only file system" in refused


@pytest.mark.parametrize("at_start", [False, True])
def test_cut_connections_are_taken_up_again(hub: HubServer, tmp_path: Path, at_start: bool) -> None:
    hub.faults.cuts, hub.faults.cut_at_start = 2, at_start
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)
    assert len(hub.requests("GET /storage")) == 3


def test_a_server_without_ranges_starts_over(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.cuts, hub.faults.no_ranges = 1, True
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_hub_is_asked_again(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.faults.failures, hub.faults.status = 2, status
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)


def test_a_hub_that_stays_down(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.failures = 10**6
    (line,) = download(hub, tmp_path, "owner/model")
    assert "nor complete in the local cache, and the Hub answers 503" in line


def test_a_listed_file_that_is_missing_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.missing = {"sub/model.safetensors"}
    (line,) = download(hub, tmp_path, "owner/model")
    assert "its file 'sub/model.safetensors' is listed but missing" in line


@pytest.mark.parametrize("place", ["", ">here"])
def test_altered_content_is_fetched_again(hub: HubServer, tmp_path: Path, place: str) -> None:
    hub.faults.altered = 1
    name = f"owner/model@>{tmp_path / 'here'}" if place else "owner/model"
    (line,) = download(hub, tmp_path, name)
    assert line.endswith(WHOLE)
    assert len(hub.requests("GET /storage")) == 2
    (file,) = [p for p in tmp_path.rglob("model.safetensors") if ".cache" not in p.parts]
    assert file.read_bytes() == LARGE


def test_content_that_stays_altered_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.altered = 10**6
    (line,) = download(hub, tmp_path, "owner/model")
    assert "sub/model.safetensors differs from the Hub's checksum, twice" in line
    assert not [path for path in cached(tmp_path) if path.stat().st_size == len(LARGE)]
    hub.faults.altered = 0
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)


def test_damage_in_the_cache_is_seen_and_mended(hub: HubServer, tmp_path: Path) -> None:
    download(hub, tmp_path, "owner/model")
    (blob,) = [path for path in cached(tmp_path) if path.stat().st_size == len(LARGE)]
    blob.write_bytes(b"\0" + LARGE[1:])
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)
    assert blob.read_bytes() == LARGE


def test_a_process_that_is_killed_leaves_nothing_that_counts(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.faults.gate.clear()
    running = start_python(hub, tmp_path, DOWNLOAD, "owner/model")
    wait_until(lambda: list(tmp_path.rglob("*.incomplete")) or not running.alive())
    running.kill()
    running.wait_for()
    assert not [path for path in tmp_path.rglob("model.safetensors")]
    (offline,) = download(hub, tmp_path, "owner/model", HF_HUB_OFFLINE="1")
    assert "nor complete in the local cache" in offline
    hub.faults.gate.set()
    (line,) = download(hub, tmp_path, "owner/model")
    assert line.endswith(WHOLE)


def test_two_processes_at_once_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.gate.clear()
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    both = [start_python(hub, tmp_path, DOWNLOAD, "owner/model", **patient) for _ in range(2)]
    # Both have asked for the file, and neither has it
    asked = re.compile("HEAD .*/model.safetensors")
    wait_until(lambda: sum(bool(asked.match(line)) for line in list(hub.log)) == 2)
    hub.faults.gate.set()
    for running in both:
        (line,) = lines_of(running.wait_for())
        assert line.endswith(WHOLE)
    assert len(hub.requests("GET /storage")) == 1


def test_a_disk_that_takes_no_more(hub: HubServer, tmp_path: Path) -> None:
    """The system refuses files above a size, as a full disk does at some point."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    (line,) = lines_of(run_python(hub, tmp_path, limit + DOWNLOAD, "owner/model"))
    assert "the disk is full" in line and "HF_HOME" in line
    assert not [path for path in cached(tmp_path) if path.stat().st_size > 1000]
