"""Answers in SQLite. An acknowledged answer is on the disk exactly once, even after a crash."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import cast

from apt.errors import AptError, DataError, InputError
from apt.study.criteria import CHOICES, CRITERIA, Choice
from apt.study.document import Study
from apt.study.plan import Kind, Task, plan_tasks

ANSWERS_FILE = "answers.sqlite"

Choices = Mapping[str, Choice]
"""A choice for every criterion, by name."""

_IDLE = timedelta(hours=24)
"""After this time without a request a rater counts as gone, and others get the missing votes."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (digest TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS raters (
    rater INTEGER PRIMARY KEY,
    seen TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS tasks (
    rater INTEGER NOT NULL REFERENCES raters,
    position INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('pair', 'check', 'repeat')),
    pair TEXT NOT NULL,
    flipped INTEGER NOT NULL CHECK (flipped IN (0, 1)),
    PRIMARY KEY (rater, position)
);
CREATE TABLE IF NOT EXISTS answers (
    rater INTEGER NOT NULL,
    position INTEGER NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    choices TEXT,
    answered TEXT NOT NULL,
    PRIMARY KEY (rater, position, version),
    FOREIGN KEY (rater, position) REFERENCES tasks
);
"""

_CURRENT = """
SELECT tasks.rater, tasks.position, kind, pair, flipped, version, choices
FROM tasks LEFT JOIN answers ON answers.rater = tasks.rater AND answers.position = tasks.position
    AND version = (SELECT MAX(version) FROM answers AS newer
                   WHERE newer.rater = tasks.rater AND newer.position = tasks.position)
"""


class ConflictError(AptError):
    """An answer to a task that is not due, or that was answered differently in another window."""


class StorageError(AptError, OSError):
    """Answers cannot be read or written, because of a full disk or a locked or damaged file."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A task of a rater, and its current answer.

    Attributes:
        rater: number from 1.
        position: position among the rater's tasks, from 0.
        task: what is shown.
        version: how often it was answered; 0 if never.
        choices: the current answer; None if it was not answered, or skipped.
    """

    rater: int
    position: int
    task: Task
    version: int
    choices: Choices | None


class AnswerStore:
    """The answers to one study, for any number of threads and of processes on one machine.

    The key of an answer is rater, position and version. The same answer sent twice is stored once.
    Two different answers with the same version, from two windows, are a conflict, and the first one
    stands. Replaced answers are kept but do not count.

    Args:
        folder: folder of the study.
        study: the study that the answers belong to.
        read_only: create and change no file.

    Raises:
        StorageError: if the file cannot be opened.
        DataError: if it holds the answers to another study; with `read_only`, also if it is
            missing.
    """

    def __init__(self, folder: Path, study: Study, *, read_only: bool = False) -> None:
        self._study = study
        self._path = folder / ANSWERS_FILE
        self._lock = threading.Lock()
        if read_only and not self._path.exists():
            raise DataError(
                f"{str(folder)!r} has no answers yet; `diffusion-apt study serve` collects them"
            )
        mode = "ro" if read_only else "rwc"
        with self._explained():
            self._connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=10,
                isolation_level=None,
                check_same_thread=False,
            )
            if not read_only:
                self._prepare()
            digests = [row[0] for row in self._connection.execute("SELECT digest FROM study")]
        if digests != [study.digest()]:
            raise DataError(
                f"{str(self._path)!r} holds the answers to another study than the one in "
                f"{str(folder)!r}; restore the old study.json, or move the answers away"
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def begin(self, rater: int, limit: int | None = None) -> list[Shown]:
        """Return all tasks of a rater who opens the page; choose them if there are none yet.

        So a rater for whom no pair was left gets pairs that have become free since. Raises
        StorageError.
        """
        with self._transaction() as connection:
            found = self._of(connection, rater)
            connection.execute(
                "INSERT INTO raters VALUES (?, ?) "
                "ON CONFLICT (rater) DO UPDATE SET seen = excluded.seen",
                (rater, _now().isoformat()),
            )
            if not found:
                planned = self._planned(connection)
                for position, task in enumerate(plan_tasks(self._study, rater, planned, limit)):
                    connection.execute(
                        "INSERT INTO tasks VALUES (?, ?, ?, ?, ?)",
                        (rater, position, task.kind, task.pair, int(task.flipped)),
                    )
                found = self._of(connection, rater)
        return found

    def tasks(self, rater: int) -> list[Shown]:
        """Return all tasks of a rater; none if the page was never opened. Raises StorageError."""
        with self._lock, self._explained():
            return self._of(self._connection, rater)

    def task(self, rater: int, position: int) -> Shown:
        """Return a task that was answered or is next.

        Raises ConflictError for any other task, and StorageError.
        """
        return _due(self.tasks(rater), position)

    def answer(self, rater: int, position: int, version: int, choices: Choices | None) -> None:
        """Save an answer; when this returns, it is on the disk.

        Args:
            rater: number from 1.
            position: position of the task, from 0; all tasks before it must be answered.
            version: 1 for the first answer, one more for each that replaces it.
            choices: a choice for each criterion; None skips a pair that cannot be shown.

        Raises:
            InputError: for invalid choices.
            ConflictError: for a task that does not exist or is not due, or a version that another
                answer has.
            StorageError: if the answer could not be saved.
        """
        check_choices(choices)
        text = None if choices is None else json.dumps(dict(choices), sort_keys=True)
        with self._transaction() as connection:
            _due(self._of(connection, rater), position)
            kept = connection.execute(
                "SELECT version, choices FROM answers WHERE rater = ? AND position = ? "
                "ORDER BY version",
                (rater, position),
            ).fetchall()
            if version == len(kept) + 1:
                connection.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
                    (rater, position, version, text, _now().isoformat()),
                )
            elif (version, text) not in kept:
                raise ConflictError("This pair was rated in another window; that answer stands.")

    def everything(self) -> list[Shown]:
        """Return every task of every rater, in order. Raises StorageError."""
        with self._lock, self._explained():
            rows = self._connection.execute(f"{_CURRENT} ORDER BY tasks.rater, tasks.position")
            return [_shown(row) for row in rows]

    def _prepare(self) -> None:
        # WAL: readers do not wait, and a killed process leaves only whole transactions.
        # FULL: acknowledged answers survive a power failure, too.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.executescript(_SCHEMA)
        with self._transaction() as connection:
            if not connection.execute("SELECT 1 FROM study").fetchone():
                connection.execute("INSERT INTO study VALUES (?)", (self._study.digest(),))

    @staticmethod
    def _of(connection: sqlite3.Connection, rater: int) -> list[Shown]:
        rows = connection.execute(
            f"{_CURRENT} WHERE tasks.rater = ? ORDER BY tasks.position", (rater,)
        )
        return [_shown(row) for row in rows]

    @staticmethod
    def _planned(connection: sqlite3.Connection) -> dict[str, int]:
        """Return votes per pair: those given, and those still to come from raters at work."""
        rows = connection.execute(
            f"""SELECT pair, COUNT(*) FROM ({_CURRENT}) AS task JOIN raters USING (rater)
            WHERE kind = 'pair' AND (choices IS NOT NULL OR (version IS NULL AND seen > ?))
            GROUP BY pair""",
            ((_now() - _IDLE).isoformat(),),
        )
        return dict(rows.fetchall())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            # Immediate: nobody else can write between our reads and our writes.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"the answers in {str(self._path)!r} cannot be read or written ({error}); check "
                "the disk's space and permissions, and try again: earlier answers are kept"
            ) from error


def check_choices(choices: object) -> None:
    """Raise InputError unless this is a choice for each criterion, or None."""
    names = [criterion.name for criterion in CRITERIA]
    if choices is None:
        return
    if not isinstance(choices, Mapping) or set(choices) != set(names):
        raise InputError(
            f"an answer must have a choice for each of {', '.join(names)}, and nothing else"
        )
    for value in choices.values():
        if value not in CHOICES:
            raise InputError(f"a choice must be one of {', '.join(CHOICES)}, got {value!r:.40}")


def _shown(row: tuple[int, int, str, str, int, int | None, str | None]) -> Shown:
    rater, position, kind, pair, flipped, version, choices = row
    return Shown(
        rater=rater,
        position=position,
        task=Task(kind=cast(Kind, kind), pair=pair, flipped=bool(flipped)),
        version=version or 0,
        choices=None if choices is None else json.loads(choices),
    )


def next_position(tasks: Sequence[Shown]) -> int:
    """Return the position of the first unanswered task, or the number of tasks if there is none."""
    return next((shown.position for shown in tasks if shown.version == 0), len(tasks))


def _due(tasks: Sequence[Shown], position: int) -> Shown:
    """Return a rater's task if it may be shown and answered now. Raises ConflictError if not."""
    if not 0 <= position < len(tasks) or position > next_position(tasks):
        raise ConflictError("This pair cannot be rated now.")
    return tasks[position]


def _now() -> datetime:
    return datetime.now(timezone.utc)
