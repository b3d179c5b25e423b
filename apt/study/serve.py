"""The study's server: on this machine alone, unless told otherwise."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apt.errors import DataError, InputError, MissingPackageError
from apt.study.app import MAX_BODY, StudyApp
from apt.study.document import MEDIA, Study, read_study
from apt.study.store import AnswerStore
from apt.study.tokens import read_key, token

if TYPE_CHECKING:
    from waitress.server import MultiSocketServer, TcpWSGIServer

DEFAULT_PORT = 8321
_MOST_RATERS = 10_000
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where the server is, and for whom."""

    raters: int | None = None
    """Links to print, one for each rater; None is as many as a pair needs votes. More later, with
    the links that are out kept as they are."""
    pairs_per_rater: int | None = None
    """The most pairs that one rater is given; None gives all that need votes."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 from every
    network that it is in."""
    port: int = DEFAULT_PORT
    """Port to listen on; 0 takes one that is free."""
    address: str | None = None
    """What links begin with, such as https://study.example.org behind a proxy; None is the host
    and port."""

    def __post_init__(self) -> None:
        if self.raters is not None and not 1 <= self.raters <= _MOST_RATERS:
            raise InputError(f"raters must be 1 to {_MOST_RATERS}, got {self.raters}")
        if self.pairs_per_rater is not None and self.pairs_per_rater < 1:
            raise InputError(f"a rater gets at least 1 pair, got {self.pairs_per_rater}")
        if not 0 <= self.port < 2**16:
            raise InputError(f"a port is 0 to 65535, got {self.port}")


def serve_study(
    folder: Path,
    config: ServeConfig = ServeConfig(),
    *,
    ready: Callable[[Sequence[str]], None] = lambda links: None,
) -> None:
    """Serve until interrupted. Answers are on the disk as they come in, so any end will do.

    Args:
        folder: of the study.
        config: see there.
        ready: called with the raters' links, once they work.

    Raises:
        DataError: no study, samples that are missing, answers to another study, no waitress.
        InputError: an address that cannot be listened on, such as a port in use.
        StorageError: answers that cannot be written.
    """
    with study_server(folder, config) as (server, links):
        ready(links)
        server.run()


@contextmanager
def study_server(
    folder: Path, config: ServeConfig
) -> Iterator[tuple[TcpWSGIServer | MultiSocketServer, list[str]]]:
    """The server, which listens and does not run yet, and the links; closed at the end.

    Raises as `serve_study`.
    """
    try:
        from waitress import create_server
    except ImportError as error:
        raise MissingPackageError(
            "a study's server needs waitress; pip install 'diffusion-apt[study]'"
        ) from error
    study = read_study(folder)
    check_media(folder, study)
    key = read_key(folder)
    tokens = [token(key, rater) for rater in range(1, (config.raters or study.votes) + 1)]
    numbers = {name: rater for rater, name in enumerate(tokens, 1)}
    store = AnswerStore(folder, study)
    # It says when requests wait for a thread, which they may.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        app = StudyApp(study, folder, store, numbers, limit=config.pairs_per_rater)
        try:
            server = create_server(
                app,
                host=config.host,
                port=config.port,
                threads=_THREADS,
                ident=None,
                max_request_body_size=MAX_BODY,
                clear_untrusted_proxy_headers=True,
            )
        except (OSError, ValueError) as error:
            raise InputError(_refusal(config, error)) from error
        try:
            address = config.address or f"http://{_host(config.host)}:{_port(server)}"
            yield server, [f"{address.rstrip('/')}/r/{name}/" for name in tokens]
        finally:
            server.close()
    finally:
        store.close()


def check_media(folder: Path, study: Study) -> None:
    """Raise DataError if a sample of the study is not there."""
    names = {name for pair in (*study.pairs, *study.checks) for name in pair.files}
    missing = sorted(name for name in names if not (folder / MEDIA / name).is_file())
    if missing:
        raise DataError(
            f"{len(missing)} samples of the study are missing in {str(folder / MEDIA)!r}, such as "
            f"{missing[0]!r}; make it again with the same options, which adds them"
        )


def _host(host: str) -> str:
    """In an address; one that stands for all of this machine's is this machine for its owner."""
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _port(server: TcpWSGIServer | MultiSocketServer) -> int:
    if hasattr(server, "effective_port"):
        return int(server.effective_port)
    return int(server.effective_listen[0][1])


def _refusal(config: ServeConfig, error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return (
            f"port {config.port} of {config.host} is in use, perhaps by this study already; stop "
            "what uses it, or choose another with --port"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return f"cannot listen on {config.host}, port {config.port}: {reason}; choose another"
