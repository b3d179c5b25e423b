"""What the server answers, request by request."""

from __future__ import annotations

import gc
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.study.app import MAX_BODY, StudyApp
from apt.study.document import MEDIA, STUDY_FILE, Study
from apt.study.store import ANSWERS_FILE, AnswerStore
from tests.study.folders import PROMPTS, small_study
from tests.study.test_store import LEFT, RIGHT

TOKEN, OTHER = "A" * 22, "b-_" + "B" * 19


class Browser:
    """Requests as a browser or an attacker would make them."""

    def __init__(self, app: StudyApp, token: str = TOKEN) -> None:
        self.app, self.token = app, token

    def request(
        self, path: str, method: str = "GET", body: bytes = b"", **environ: str
    ) -> tuple[int, dict[str, str], bytes]:
        got: list[Any] = []
        environ = {"CONTENT_TYPE": "application/json", **environ}
        blocks = self.app(
            {
                "PATH_INFO": path,
                "REQUEST_METHOD": method,
                "wsgi.input": io.BytesIO(body),
                **environ,
            },
            lambda *start: got.extend(start),
        )
        try:
            return int(got[0].split()[0]), dict(got[1]), b"".join(blocks)
        finally:
            if hasattr(blocks, "close"):  # as servers do
                blocks.close()

    def get(self, path: str) -> Any:
        status, _, body = self.request(f"/r/{self.token}/{path}")
        return json.loads(body) | {"status": status}

    def post(self, position: int, document: Any) -> Any:
        status, _, body = self.request(
            f"/r/{self.token}/tasks/{position}", "POST", json.dumps(document).encode()
        )
        return json.loads(body) | {"status": status}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "study"
    small_study(folder)
    return folder


@pytest.fixture
def study(folder: Path) -> Study:
    from apt.study.document import read_study

    return read_study(folder)


@pytest.fixture
def browser(tmp_path: Path, folder: Path, study: Study) -> Browser:
    store = AnswerStore(tmp_path, study)
    return Browser(StudyApp(study, folder, store, {TOKEN: 1, OTHER: 2}))


def test_a_rater_answers_goes_back_and_ends(browser: Browser, study: Study) -> None:
    about = browser.get("study")
    assert (about["next"], about["tasks"] > len(study.pairs)) == (0, True)
    assert [criterion["name"] for criterion in about["criteria"]] == list(LEFT)
    for position in range(about["tasks"]):
        task = browser.get(f"tasks/{position}")
        assert task["prompt"] in PROMPTS and task["kind"] == "video"
        assert (task["version"], task["choices"]) == (0, None)
        done = browser.post(position, {"version": 1, "choices": LEFT})
        assert (done["status"], done["next"]) == (200, position + 1)
    assert browser.post(0, {"version": 2, "choices": RIGHT})["status"] == 200
    assert browser.get("tasks/0")["choices"] == RIGHT
    assert browser.get(f"tasks/{about['tasks']}")["status"] == 409


def test_a_double_submit_is_one_and_a_second_window_is_told(browser: Browser) -> None:
    browser.get("study")
    answer = {"version": 1, "choices": LEFT}
    assert [browser.post(0, answer)["status"] for _ in range(2)] == [200, 200]
    assert browser.post(0, {"version": 1, "choices": RIGHT})["status"] == 409
    assert browser.get("tasks/0")["choices"] == LEFT
    assert browser.get("study")["next"] == 1


def test_what_comes_later_is_not_shown(browser: Browser) -> None:
    browser.get("study")
    for path in ("tasks/1", "media/1/left"):
        assert browser.get(path)["status"] == 409


def test_nothing_tells_the_models(browser: Browser, study: Study) -> None:
    """Neither words nor headers, of any task, check and repetition."""
    seen = []
    for position in range(browser.get("study")["tasks"]):
        for path in (f"tasks/{position}", f"media/{position}/left", "study"):
            status, headers, body = browser.request(f"/r/{TOKEN}/{path}")
            assert status == 200
            seen.append(str(headers) + body.decode("latin-1"))
        browser.post(position, {"version": 1, "choices": LEFT})
    secrets = [*study.models, "check", "repeat", "intact", "degraded", "flipped", "seed"]
    secrets += [name for pair in study.pairs for name in pair.files]
    assert not [word for word in secrets for text in seen if word in text.replace("checked", "")]


def test_sides_are_those_of_the_task(
    tmp_path: Path, folder: Path, study: Study, browser: Browser
) -> None:
    browser.get("study")
    store = AnswerStore(tmp_path, study)
    flips = set()
    for shown in store.tasks(1):
        pair = study.find(shown.task.pair)
        files = [(folder / MEDIA / name).read_bytes() for name in pair.files]
        bodies = [
            browser.request(f"/r/{TOKEN}/media/{shown.position}/{side}")[2]
            for side in ("left", "right")
        ]
        assert bodies == (files[::-1] if shown.task.flipped else files)
        flips.add(shown.task.flipped)
        browser.post(shown.position, {"version": 1, "choices": None})
    assert flips == {True, False}


def test_ranges(browser: Browser) -> None:
    browser.get("study")
    path = f"/r/{TOKEN}/media/0/left"
    _, headers, whole = browser.request(path)
    size = len(whole)
    assert headers["Content-Length"] == str(size) and headers["Content-Type"] == "video/mp4"
    for asked, (first, last) in {
        "bytes=0-": (0, size),
        "bytes=5-9": (5, 10),
        "bytes=-7": (size - 7, size),
        f"bytes=3-{size + 50}": (3, size),
        "bytes=9-5": (0, size),
        "bytes=0-1,4-5": (0, size),
        "lines=1-2": (0, size),
        "bytes=-": (0, size),
    }.items():
        status, headers, body = browser.request(path, HTTP_RANGE=asked)
        assert body == whole[first:last], asked
        partial = (first, last) != (0, size)
        assert status == (206 if partial else 200)
        assert headers.get("Content-Range") == (
            f"bytes {first}-{last - 1}/{size}" if partial else None
        )
    status, headers, _ = browser.request(path, HTTP_RANGE=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")


def test_no_request_leaves_a_sample_open(browser: Browser) -> None:
    browser.get("study")
    path = f"/r/{TOKEN}/media/0/left"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, headers, body = browser.request(path, "HEAD")
        assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 0
        browser.request(path)
        # A client that leaves before the first block: the server only closes.
        blocks = browser.app({"PATH_INFO": path, "REQUEST_METHOD": "GET"}, lambda *_: print)
        blocks.close()  # type: ignore[attr-defined]
        del blocks
        gc.collect()
    assert not [str(warning.message) for warning in caught]


@given(st.text(st.sampled_from("./%\\aA0lerftmdi-_\x00~"), max_size=30))
def test_no_path_of_the_disk_is_reachable(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, path: str
) -> None:
    study_app = _shared_app(tmp_path_factory, folder)
    for full in (path, f"/r/{TOKEN}/{path}", f"/r/{TOKEN}/media/0/{path}", f"/r/{path}/study"):
        status, _, body = Browser(study_app).request(full)
        assert status in (404, 308, 409) or path == "", (status, body)


_SHARED: list[StudyApp] = []


def _shared_app(factory: pytest.TempPathFactory, folder: Path) -> StudyApp:
    if not _SHARED:
        from apt.study.document import read_study

        study = read_study(folder)
        store = AnswerStore(factory.mktemp("shared"), study)
        _SHARED.append(StudyApp(study, folder, store, {TOKEN: 1}))
    return _SHARED[0]


def test_files_beside_the_study_and_of_the_system_are_not_served(
    browser: Browser, study: Study
) -> None:
    browser.get("study")
    name = study.pairs[0].files[0]
    for path in (
        "/", f"/{STUDY_FILE}", f"/r/{TOKEN}/{STUDY_FILE}", f"/r/{TOKEN}/../../{STUDY_FILE}",
        f"/r/{TOKEN}/{ANSWERS_FILE}", f"/r/{TOKEN}/media/{name}", f"/r/{TOKEN}/media/0/{name}",
        f"/r/{TOKEN}/media/0/left/../../../{STUDY_FILE}", f"/r/{TOKEN}//etc/passwd",
        f"/r/{TOKEN}/../app.py", f"/r/{'C' * 22}/study", f"/r/{TOKEN[:-1]}/study", "/r//study",
        f"/r/{TOKEN}/media/٠/left", f"/r/{TOKEN}/media/-1/left",
    ):  # fmt: skip
        assert browser.request(path)[0] == 404, path


def test_the_page_asks_nobody_else_and_runs_nothing_else(browser: Browser) -> None:
    for name, kind in (("", "text/html"), ("style.css", "text/css"), ("rate.js", "text/java")):
        status, headers, body = browser.request(f"/r/{TOKEN}/{name}")
        assert status == 200 and headers["Content-Type"].startswith(kind)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        text = body.decode()
        assert "http:" not in text and "https:" not in text and "style=" not in text
        assert "onclick" not in text and "innerHTML" not in text and "<style" not in text
    status, headers, _ = browser.request(f"/r/{TOKEN}")
    assert (status, headers["Location"]) == (308, f"/r/{TOKEN}/")


def test_bad_answers_are_told_and_kept_out(browser: Browser) -> None:
    browser.get("study")
    path = f"/r/{TOKEN}/tasks/0"
    good = json.dumps({"version": 1, "choices": LEFT}).encode()
    for body in (
        b"", b"[]", b"{", b'"x"', b'{"version": 1}', b"\xff", b"[" * 3000,
        b'{"version": "1", "choices": null}', b'{"version": true, "choices": null}',
        b'{"version": 0, "choices": null}', b'{"version": 1, "choices": {}}',
        b'{"version": 1, "choices": null, "rater": 2}', good + b" " * MAX_BODY,
        json.dumps({"version": 1, "choices": {**LEFT, "text_alignment": ["left"]}}).encode(),
    ):  # fmt: skip
        status, _, reply = browser.request(path, "POST", body)
        assert status == 400 and json.loads(reply)["error"], body[:40]
    # What another site's form could send.
    assert browser.request(path, "POST", good, CONTENT_TYPE="text/plain")[0] == 400
    assert browser.post(0, {"version": 2, "choices": LEFT})["status"] == 409
    for method in ("PUT", "DELETE", "PATCH"):
        assert browser.request(path, method, good)[0] == 405
    assert browser.get("study")["next"] == 0
    status, headers, body = browser.request(path, "HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 0


def test_a_full_disk_is_told_to_the_rater_and_in_one_line_to_the_organiser(
    tmp_path: Path, folder: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    store = AnswerStore(tmp_path, study)
    browser = Browser(StudyApp(study, folder, store, {TOKEN: 1}))
    browser.get("study")
    store._connection.execute("PRAGMA query_only = 1")
    reply = browser.post(0, {"version": 1, "choices": LEFT})
    assert reply["status"] == 507 and "could not be saved" in reply["error"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the answers in ") and str(tmp_path) not in reply["error"]
    store._connection.execute("PRAGMA query_only = 0")
    assert browser.post(0, {"version": 1, "choices": LEFT})["next"] == 1


def test_a_sample_that_vanished_is_told(
    tmp_path: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    browser = Browser(StudyApp(study, tmp_path / "gone", AnswerStore(tmp_path, study), {TOKEN: 1}))
    browser.get("study")
    assert browser.get("media/0/left")["status"] == 500
    assert "a sample cannot be read" in capsys.readouterr().err
