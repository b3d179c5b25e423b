"""The WSGI application for a rater's browser: serves the page, tasks and samples; takes answers.

    GET  /r/TOKEN/               the page
    GET  /r/TOKEN/study          title, criteria, and the rater's progress
    GET  /r/TOKEN/tasks/N        prompt and earlier answer of a task; does not reveal the models
    GET  /r/TOKEN/media/N/SIDE   a sample; supports byte ranges, which video players use
    POST /r/TOKEN/tasks/N        {"version": ..., "choices": {...} or null}

The token is the rater's only credential. No part of a URL becomes a path on the disk: samples are
looked up by number and side, and the page's files by name in a fixed list.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.errors import InputError
from apt.study.criteria import CRITERIA
from apt.study.document import MEDIA, Study
from apt.study.media import MEDIA_TYPES, STILL
from apt.study.store import AnswerStore, ConflictError, Shown, StorageError, next_position
from apt.untrusted import parse_json

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "rate.js": "text/javascript; charset=utf-8",
}
_SIDES = ("left", "right")

MAX_BODY = 4096
"""The most bytes of a posted answer; a valid one has about 100."""
_BLOCK = 2**18

_HEADERS = (
    # The page may load from and talk to this server only, and no other page may frame it.
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    # The URL contains the token.
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)


@dataclass(frozen=True)
class Response:
    """An HTTP response."""

    status: HTTPStatus
    body: Iterable[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class StudyApp:
    """The WSGI application.

    Args:
        study: the study to rate.
        folder: folder of the study, with its media.
        store: where answers are saved.
        raters: number of each rater, by token.
        limit: the most pairs for one rater; None for no limit.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        store: AnswerStore,
        raters: Mapping[str, int],
        *,
        limit: int | None = None,
    ) -> None:
        self._study = study
        self._media = folder / MEDIA
        self._store = store
        self._raters = dict(raters)
        self._limit = limit
        self._page = {name: (PAGE / name).read_bytes() for name in _PAGE_FILES}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        try:
            response = self._route(environ)
        except InputError as error:
            response = _problem(HTTPStatus.BAD_REQUEST, str(error))
        except ConflictError as error:
            response = _problem(HTTPStatus.CONFLICT, str(error))
        except StorageError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            response = _problem(
                HTTPStatus.INSUFFICIENT_STORAGE,
                "The answer could not be saved. Please tell the organiser that the server's disk "
                "is full or broken.",
            )
        headers = [*_HEADERS, *({"Cache-Control": "no-store"} | dict(response.headers)).items()]
        start_response(f"{response.status.value} {response.status.phrase}", headers)
        if environ["REQUEST_METHOD"] != "HEAD":
            return response.body
        if isinstance(response.body, _Blocks):
            response.body.close()
        return []

    def _route(self, environ: WSGIEnvironment) -> Response:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        found = re.fullmatch(r"/r/([\w-]{22})(/.*)?", path, re.ASCII)
        rater = self._raters.get(found[1]) if found else None
        if found is None or rater is None:
            return _problem(
                HTTPStatus.NOT_FOUND, "There is nothing here. Open the link that you were given."
            )
        rest = found[2]
        if rest is None:
            location = {"Location": f"/r/{found[1]}/"}
            return _text(HTTPStatus.PERMANENT_REDIRECT, b"", "text/plain", location)
        if method not in ("GET", "HEAD", "POST"):
            allowed = {"Allow": "GET, HEAD, POST"}
            return _problem(HTTPStatus.METHOD_NOT_ALLOWED, "This method is not allowed.", allowed)
        name = rest[1:] or "index.html"
        if name in self._page and method != "POST":
            return _text(HTTPStatus.OK, self._page[name], _PAGE_FILES[name])
        if name == "study" and method != "POST":
            return _json(self._about(rater))
        if task := re.fullmatch(r"tasks/(\d{1,6})", name, re.ASCII):
            if method == "POST":
                return self._answer(rater, int(task[1]), environ)
            return _json(self._describe(self._store.task(rater, int(task[1]))))
        media = re.fullmatch(r"media/(\d{1,6})/(left|right)", name, re.ASCII)
        if media and method != "POST":
            return self._sample(self._store.task(rater, int(media[1])), media[2], environ)
        return _problem(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _about(self, rater: int) -> dict[str, Any]:
        tasks = self._store.begin(rater, self._limit)
        return {
            "title": self._study.title,
            "rater": rater,
            "criteria": [dataclasses.asdict(criterion) for criterion in CRITERIA],
            "tasks": len(tasks),
            "next": next_position(tasks),
        }

    def _describe(self, shown: Shown) -> dict[str, Any]:
        pair = self._study.find(shown.task.pair)
        kinds = {"image" if name.endswith(STILL) else "video" for name in pair.files}
        return {
            "position": shown.position,
            "prompt": pair.prompt,
            "kind": kinds.pop(),
            "version": shown.version,
            "choices": shown.choices,
        }

    def _answer(self, rater: int, position: int, environ: WSGIEnvironment) -> Response:
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip() != "application/json":
            raise InputError("an answer must be application/json")
        body = environ["wsgi.input"].read(MAX_BODY + 1)
        try:
            document = parse_json(body, limit=MAX_BODY)
            version, choices = document["version"], document["choices"]
            if len(document) != 2 or type(version) is not int or not 0 < version < 2**31:
                raise ValueError("expected a version of at least 1, choices, and nothing else")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"this is not a valid answer: {error}") from error
        self._store.answer(rater, position, version, choices)
        return _json(self._about(rater))

    def _sample(self, shown: Shown, side: str, environ: WSGIEnvironment) -> Response:
        pair = self._study.find(shown.task.pair)
        file = self._media / pair.files[(_SIDES.index(side) + shown.task.flipped) % 2]
        try:
            size = file.stat().st_size
            first, last = _range(environ.get("HTTP_RANGE", ""), size)
            blocks = _Blocks(file, first, last)
        except OSError as error:
            said = error.strerror or error
            print(f"error: a sample cannot be read: {file}: {said}", file=sys.stderr, flush=True)
            return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This sample cannot be read.")
        except ValueError:
            return _problem(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                "This sample has no such range.",
                {"Content-Range": f"bytes */{size}"},
            )
        headers = {
            "Content-Type": MEDIA_TYPES[file.suffix],
            "Content-Length": str(last - first),
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=3600",
        }
        if last - first == size:
            return Response(HTTPStatus.OK, blocks, headers)
        headers["Content-Range"] = f"bytes {first}-{last - 1}/{size}"
        return Response(HTTPStatus.PARTIAL_CONTENT, blocks, headers)


def _range(header: str, size: int) -> tuple[int, int]:
    """Return the requested bytes as [first, last). Raises ValueError for a range outside the file.

    Requests for several ranges or in other units get the whole file, as the standard allows.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip(), re.ASCII)
    if not found or not (found[1] or found[2]):
        return 0, size
    if not found[1]:
        first, last = max(0, size - int(found[2])), size
    else:
        first, last = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
        if found[2] and int(found[2]) < first:
            return 0, size
    if first >= last:
        raise ValueError(header)
    return first, last


class _Blocks:
    """The bytes [first, last) of a file, in blocks; the server calls `close` (PEP 3333).

    Raises OSError at once if the file cannot be opened.
    """

    def __init__(self, file: Path, first: int, last: int) -> None:
        self._stream = file.open("rb")
        self._first, self._left = first, last - first

    def __iter__(self) -> Iterator[bytes]:
        self._stream.seek(self._first)
        while self._left and (block := self._stream.read(min(self._left, _BLOCK))):
            self._left -= len(block)
            yield block

    def close(self) -> None:
        self._stream.close()


def _json(document: Any) -> Response:
    return _text(HTTPStatus.OK, json.dumps(document).encode(), "application/json")


def _problem(
    status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    body = json.dumps({"error": message}).encode()
    return _text(status, body, "application/json", headers)


def _text(
    status: HTTPStatus, body: bytes, kind: str, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        status,
        [body],
        {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})},
    )
