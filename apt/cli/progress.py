"""Progress on stderr, updated by the progress callbacks of library functions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from apt.distributed.launch import launch_rank


@contextmanager
def progress_bar(
    description: str, total: int | None = None, *, interval: float = 30.0
) -> Iterator[Callable[..., None]]:
    """Yield a function `update(done)` or `update(done, total)`; the bar disappears at the end.

    If stderr is not a terminal, rank 0 prints a line every `interval` seconds instead, even when
    there is no progress.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        with _lines(description, total, interval) as update:
            yield update
        return
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def show(done: int, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@dataclass
class _State:
    done: int = 0
    total: int | None = None


@contextmanager
def _lines(description: str, total: int | None, interval: float) -> Iterator[Callable[..., None]]:
    state = _State(total=total)
    ended = threading.Event()

    def update(done: int, total: int | None = None) -> None:
        state.done = done
        state.total = state.total if total is None else total

    def tell() -> None:
        while not ended.wait(interval):
            of = "" if state.total is None else f"/{state.total}"
            print(f"{description}: {state.done}{of}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    if launch_rank() == 0:
        thread.start()
    try:
        yield update
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
