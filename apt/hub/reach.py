"""Whether the Hub answers: asked once, with an end to the waiting, so that a cache can serve."""

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
"""Seconds that a connection may be silent while something is fetched."""
PUSH_PATIENCE = 120.0
"""As `PATIENCE`, while something is pushed: the Hub works on it before it answers."""
_ASK_AGAIN = 300.0
"""Seconds until a Hub that did not answer is asked again."""

_log = logging.getLogger(__name__)


@dataclass
class _Known:
    """What this process has found out."""

    answers: bool = False
    silent_until: float = 0.0
    reason: str = ""
    told: set[str] = field(default_factory=set)


_known = _Known()


@contextmanager
def bounded_waits(seconds: float) -> Iterator[None]:
    """Inside, requests of huggingface_hub give up after this many seconds of silence.

    Many of them say that they wait for ever, which a limit of the client would not change. Those
    that have a limit keep it.
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
    """Whether the Hub can be reached, whatever it says about this repository.

    The first call asks it, for at most `PATIENCE` seconds or what HF_HUB_ETAG_TIMEOUT says; later
    ones remember. Says no at once if HF_HUB_OFFLINE is set.
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
        _known.reason = "is a login page, perhaps,"
    else:
        _known.answers = True
    if not _known.answers:
        _known.silent_until = time.monotonic() + _ASK_AGAIN
    return _known.answers


def tell_of_cache(repo_id: str) -> None:
    """Say, once for each repository, that what is on the disk is taken; of several ranks one."""
    from huggingface_hub import constants

    if constants.is_offline_mode() or repo_id in _known.told or launch_rank():
        return
    _known.told.add(repo_id)
    _log.warning(
        "the Hub %s at %s: %r is taken as it is on this disk",
        _known.reason,
        constants.ENDPOINT,
        repo_id,
    )
