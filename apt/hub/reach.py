"""Check once whether the Hub answers, with a timeout, so that a cached copy can be used instead."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from apt.distributed.launch import launch_rank
from apt.hub.client import may_pass

PATIENCE = 10.0
"""Seconds that a connection may be silent during a download."""
PUSH_PATIENCE = 120.0
"""Seconds that a connection may be silent during a push: the Hub processes it before answering."""
_ASK_AGAIN = 300.0
"""Seconds until a Hub that did not answer is asked again."""

_log = logging.getLogger(__name__)


@dataclass
class _Known:
    """What this process knows about the Hub."""

    answers: bool = False
    silent_until: float = 0.0
    reason: str = ""
    told: set[str] = field(default_factory=set)


_known = _Known()


@contextmanager
def bounded_waits(seconds: float) -> Iterator[None]:
    """Make huggingface_hub's requests give up after this many seconds of silence.

    Many requests explicitly ask for no timeout, which overrides a timeout of the client. Requests
    with a timeout of their own keep it.
    """
    from huggingface_hub.utils import get_session

    def limit(request: Any) -> None:
        waits = request.extensions.get("timeout", {})
        unlimited = {phase: seconds for phase, wait in waits.items() if wait is None}
        request.extensions["timeout"] = {**waits, **unlimited}

    hooks = get_session().event_hooks["request"]
    hooks.append(limit)
    try:
        yield
    finally:
        hooks.remove(limit)


def hub_answers(repo_id: str) -> bool:
    """Return whether the Hub can be reached, whatever it answers about this repository.

    The first call asks the Hub and waits at most HF_HUB_ETAG_TIMEOUT seconds (10 by default); later
    calls use its result. Returns False at once if HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.is_offline_mode() or time.monotonic() < _known.silent_until:
        return False
    if _known.answers:
        return True
    try:
        HfApi().repo_info(repo_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        status = error.response.status_code
        _known.answers = not may_pass(status)
        _known.reason = f"answers {status}"
    except HTTPError as error:
        _known.reason = f"cannot be reached ({str(error) or type(error).__name__})"
    except json.JSONDecodeError:
        _known.reason = "may be a login page"
    else:
        _known.answers = True
    if not _known.answers:
        _known.silent_until = time.monotonic() + _ASK_AGAIN
    return _known.answers


def tell_of_cache(repo_id: str) -> None:
    """Warn, once per repository and on one rank only, that the copy on the disk is used."""
    from huggingface_hub import constants

    if constants.is_offline_mode() or repo_id in _known.told or launch_rank():
        return
    _known.told.add(repo_id)
    _log.warning(
        "the Hub at %s %s; using the copy of %r on this disk",
        constants.ENDPOINT,
        _known.reason,
        repo_id,
    )
