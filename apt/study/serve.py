"""The study's server, which by default can be reached from this machine only."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apt.errors import DataError, InputError, MissingPackageError, counted
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
    """Where the server listens, and for how many raters."""

    raters: int | None = None
    """Number of raters, each with a link; None takes the number of votes per pair. A larger number
    later adds links and keeps the old ones."""
    pairs_per_rater: int | None = None
    """The most pairs that one rater is given; None gives all that need votes."""
    host: str = "127.0.0.1"
    """Address to listen on. The default can be reached from this machine only, 0.0.0.0 from every
    network that the machine is in."""
    port: int = DEFAULT_PORT
    """Port to listen on; 0 takes a free one."""
    address: str | None = None
    """Start of the links, such as https://study.example.org behind a proxy; None uses the host and
    port."""

    def __post_init__(self) -> None:
        if self.raters is not None and not 1 <= self.raters <= _MOST_RATERS:
            raise InputError(f"raters must be from 1 to {_MOST_RATERS}, got {self.raters}")
        if self.pairs_per_rater is not None and self.pairs_per_rater < 1:
            raise InputError(f"pairs_per_rater must be at least 1, got {self.pairs_per_rater}")
        if not 0 <= self.port < 2**16:
            raise InputError(f"port must be from 0 to 65535, got {self.port}")


def serve_study(
    folder: Path,
    config: ServeConfig = ServeConfig(),
    *,
    ready: Callable[[Sequence[str]], None] = lambda links: None,
) -> None:
    """Serve until interrupted. Every answer is saved at once, so the server can be stopped anyhow.

    Args:
        folder: folder of the study.
        config: where to listen, and for how many raters.
        ready: called with the raters' links once they work.

    Raises:
        DataError: if there is no study, samples are missing, or the answers belong to another
            study.
        MissingPackageError: if waitress is not installed.
        InputError: if the server cannot listen, for instance because the port is in use.
        StorageError: if answers cannot be written.
    """
    with study_server(folder, config) as (server, links):
        ready(links)
        server.run()


@contextmanager
def study_server(
    folder: Path, config: ServeConfig
) -> Iterator[tuple[TcpWSGIServer | MultiSocketServer, list[str]]]:
    """Yield a server that listens but does not run yet, and the links; close it at the end.

    Raises what `serve_study` raises.
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
    # waitress warns when requests wait for a thread, which is normal here.
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
    """Raise DataError if a sample of the study is missing."""
    names = {name for pair in (*study.pairs, *study.checks) for name in pair.files}
    missing = sorted(name for name in names if not (folder / MEDIA / name).is_file())
    if missing:
        raise DataError(
            f"missing in {str(folder / MEDIA)!r}: {counted(len(missing), 'sample')} of the study, "
            f"such as {missing[0]!r}; run `study make` again with the same options to add them"
        )


def _host(host: str) -> str:
    """Return a host as written in a URL; localhost for an address that means all networks."""
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
            f"port {config.port} of {config.host} is in use, perhaps by this study; stop what uses "
            "it, or choose another port with --port"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return (
        f"cannot listen on {config.host}, port {config.port}: {reason}; choose another --host or "
        "--port"
    )
