"""huggingface_hub as we use it: without its warnings, with retries, and with our own errors."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from apt.errors import CheckpointError, HubUnreachableError, InputError, first_line

T = TypeVar("T")

ATTEMPTS = 4
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each further wait is twice as long."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_log = logging.getLogger(__name__)


def with_retries(action: Callable[[], T]) -> T:
    """Call `action`, and retry with back-off if the connection or the server failed temporarily.

    huggingface_hub resumes by itself when a connection breaks in the middle of a file. On other
    failures it gives up and deletes the part that it has.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            _log.info("attempt %d failed (%s); again in %g s", attempt, reason, wait)
        time.sleep(wait)
        wait *= 2
    return action()


@contextmanager
def quiet_client() -> Iterator[None]:
    """Suppress huggingface_hub's warnings; our own errors say what matters.

    Raises InputError if huggingface_hub fails to start because it cannot read its settings.
    """
    try:
        from huggingface_hub.utils import logging as hub_logging
    except ValueError as error:
        raise InputError(
            f"huggingface_hub does not start ({error}); check HF_ENDPOINT and the other variables "
            "whose names begin with HF_"
        ) from error

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        hub_logging.set_verbosity(before)


def progress_class() -> type[Any]:
    """Return huggingface_hub's progress bar, shown only in a terminal."""
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = kwargs.get("disable") or not sys.stderr.isatty()
            super().__init__(*args, **kwargs)

    return TerminalBar


@contextmanager
def explained(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a CheckpointError or HubUnreachableError.

    Args:
        action: "download" or "push to", for the messages.
        repo_id, revision: the model on the Hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        XetDownloadError,
    )

    name = repr(repo_id if revision is None else f"{repo_id}@{revision}")
    cannot = f"cannot {action} {name}"
    try:
        yield
    except InputError:
        raise
    # A subclass of RepositoryNotFoundError, so it comes first.
    except GatedRepoError as error:
        raise CheckpointError(
            f"{cannot}: access is gated; accept the licence at {page(repo_id)}, and "
            f"{_token_advice()}"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{cannot}: the Hub has no such model, or it is private ({page(repo_id)}): check the "
            f"spelling, or {_token_advice()}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"the Hub model {repo_id!r} has no revision {revision!r}; see {page(repo_id)}/commits"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubUnreachableError(f"{cannot}: {_unreachable(error)}") from error
    except RemoteEntryNotFoundError as error:
        file = str(error.response.url).partition("/resolve/")[2].partition("/")[2]
        raise CheckpointError(
            f"{cannot}: its file {file!r} is listed but missing; try again, or try another revision"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name} is neither a folder nor a Hub id: {error}") from error
    except OfflineModeIsEnabled as error:
        raise HubUnreachableError(
            f"{cannot}: HF_HUB_OFFLINE is set; unset it to connect"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise CheckpointError(
                f"{cannot}: the Hub refuses ({status}); {_token_advice()}"
            ) from error
        kind = HubUnreachableError if may_pass(status) else CheckpointError
        raise kind(
            f"{cannot}: the Hub answers {status} ({first_line(error)}); try again later"
        ) from error
    except HTTPError as error:
        raise HubUnreachableError(
            f"{cannot}: the connection failed {ATTEMPTS} times ({first_line(error)}); try again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{cannot}: {_disk_trouble(error)}") from error
    except json.JSONDecodeError as error:
        raise HubUnreachableError(
            f"{cannot}: {constants.ENDPOINT} does not answer like the Hub; it may be a proxy or "
            "the login page of a network: check HF_ENDPOINT and the proxy settings"
        ) from error
    # ValueError: file names that lead out of the repository's folder. The others come from Xet, and
    # from httpx for an invalid address.
    except (ValueError, RuntimeError, XetDownloadError, _invalid_url(HTTPError)) as error:
        raise CheckpointError(f"{cannot}: {first_line(error)}") from error


def _invalid_url(http_error: type[Exception]) -> type[Exception]:
    """Return InvalidURL of httpx or of huggingface_hub's copy of it; it is no HTTPError there."""
    return importlib.import_module(http_error.__module__.partition(".")[0]).InvalidURL


def _disk_trouble(error: OSError) -> str:
    if error.errno in _NO_ROOM:
        return (
            f"the disk is full ({error.strerror}); free some space, or set HF_HOME or --local-dir "
            "to a larger disk"
        )
    if error.errno in _NO_WRITING and error.filename:
        return (
            f"cannot write {str(error.filename)!r} ({error.strerror}); set HF_HOME or --local-dir "
            "to a folder that you can write to"
        )
    return f"{first_line(error)}; try again"


def require_token() -> None:
    """Raise CheckpointError if there is no token to write with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise CheckpointError(
            f"writing to the Hub needs a token with write access; {_token_advice()}"
        )


def may_pass(status: int) -> bool:
    """Return whether an HTTP status is about the state of the server, so a retry may succeed."""
    return status in (408, 429) or status >= 500


def _may_pass(error: BaseException) -> bool:
    """Return whether trying again can help."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        XetDownloadError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, LocalEntryNotFoundError):
        # The file is not on the disk; the cause is what failed on the way to the Hub.
        return error.__cause__ is not None and _may_pass(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return may_pass(error.response.status_code)
    if isinstance(error, (HTTPError, XetDownloadError)):
        return True
    # A file that is shorter than announced.
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _unreachable(error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    if constants.is_offline_mode():
        why = "HF_HUB_OFFLINE is set"
    elif isinstance(cause, HfHubHTTPError):
        why = f"the Hub answers {cause.response.status_code}"
    else:
        why = f"the Hub cannot be reached at {constants.ENDPOINT}"
    return f"it is neither a folder nor complete in the local cache, and {why}"


def page(repo_id: str) -> str:
    """Return the address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def _token_advice() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return "log in with `hf auth login`, or set HF_TOKEN"
    return "use a token (`hf auth login`, HF_TOKEN) that has access: the current one has none"
