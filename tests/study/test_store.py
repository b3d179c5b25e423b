"""Answers are kept once, even if they are sent twice or a process is killed."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from apt.errors import DataError, InputError
from apt.study.document import Study
from apt.study.store import ANSWERS_FILE, AnswerStore, Choices, ConflictError, StorageError
from tests.study.test_plan import study as make

LEFT: Choices = {
    "visual_fidelity": "left",
    "structural_integrity": "same",
    "text_alignment": "right",
}
RIGHT: Choices = {name: "right" for name in LEFT}


@pytest.fixture
def study() -> Study:
    return make(12)


def test_an_answer_is_there_when_the_file_is_opened_again(tmp_path: Path, study: Study) -> None:
    store = AnswerStore(tmp_path, study)
    tasks = store.begin(1)
    assert [shown.version for shown in tasks] == [0] * len(tasks)
    store.answer(1, 0, 1, LEFT)
    store.answer(1, 1, 1, None)
    # Not closed: as after a kill.
    again = AnswerStore(tmp_path, study, read_only=True)
    found = again.everything()
    assert [shown.task for shown in found] == [shown.task for shown in tasks]
    assert [(shown.version, shown.choices) for shown in found[:3]] == [
        (1, LEFT),
        (1, None),
        (0, None),
    ]


def test_sent_twice_it_is_one_answer_and_another_one_a_conflict(
    tmp_path: Path, study: Study
) -> None:
    store = AnswerStore(tmp_path, study)
    store.begin(1)
    for _ in range(2):
        store.answer(1, 0, 1, LEFT)
    with pytest.raises(ConflictError, match="another window"):
        store.answer(1, 0, 1, RIGHT)
    assert store.tasks(1)[0].choices == LEFT
    # Undone, and answered again; a late repeat of the first version changes nothing.
    store.answer(1, 0, 2, RIGHT)
    store.answer(1, 0, 1, LEFT)
    assert (store.tasks(1)[0].version, store.tasks(1)[0].choices) == (2, RIGHT)
    rows = sqlite3.connect(tmp_path / ANSWERS_FILE).execute("SELECT COUNT(*) FROM answers")
    assert rows.fetchone() == (2,)


def test_only_what_is_asked_can_be_answered(tmp_path: Path, study: Study) -> None:
    store = AnswerStore(tmp_path, study)
    with pytest.raises(ConflictError, match="cannot be rated now"):
        store.answer(1, 0, 1, LEFT)
    store.begin(1)
    for position in (1, -1, 10_000):
        with pytest.raises(ConflictError, match="cannot be rated now"):
            store.answer(1, position, 1, LEFT)
    for wrong in ({}, {**LEFT, "x": "left"}, {**LEFT, "text_alignment": "up"}, "left"):
        with pytest.raises(InputError):
            store.answer(1, 0, 1, wrong)  # type: ignore[arg-type]
    assert all(shown.version == 0 for shown in store.tasks(1))


def test_windows_and_raters_at_once(tmp_path: Path, study: Study) -> None:
    """Two windows each of three raters, in two stores as of two servers, answer everything."""
    stores = [AnswerStore(tmp_path, study) for _ in range(2)]
    problems: list[BaseException] = []

    def rate(store: AnswerStore, rater: int, choices: Choices) -> None:
        try:
            for shown in store.begin(rater):
                try:
                    store.answer(rater, shown.position, 1, choices)
                except ConflictError as error:
                    assert "another window" in str(error)
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=rate, args=(stores[window], rater, choices))
        for rater in (1, 2, 3)
        for window, choices in enumerate((LEFT, RIGHT))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    everything = stores[0].everything()
    assert all(shown.version == 1 and shown.choices in (LEFT, RIGHT) for shown in everything)
    pairs = sorted(shown.task.pair for shown in everything if shown.task.kind == "pair")
    assert pairs == sorted(3 * [pair.name for pair in study.pairs])
    # All votes are there: who comes now has nothing to do.
    assert stores[1].begin(4) == []


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, study: Study) -> None:
    """SQLite's own limit on a file's pages stands in for a full disk."""
    store = AnswerStore(tmp_path, study)
    store.begin(1)
    store.answer(1, 0, 1, LEFT)
    connection = store._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    answered = 1
    with pytest.raises(StorageError, match="database or disk is full"):
        for rater in range(1, 50):
            for shown in store.begin(rater):
                if shown.version == 0:
                    store.answer(rater, shown.position, 1, LEFT)
                    answered += 1
    connection.execute(f"PRAGMA max_page_count = {2 * pages}")
    kept = [shown for shown in store.everything() if shown.version]
    assert len(kept) == answered
    # It continues as soon as there is room.
    rater = max(shown.rater for shown in kept)
    rest = [shown for shown in store.begin(rater) if shown.version == 0]
    for shown in rest:
        store.answer(rater, shown.position, 1, LEFT)
    assert len([shown for shown in store.everything() if shown.version]) == answered + len(rest)


def test_votes_of_raters_who_left_go_to_others(tmp_path: Path, study: Study) -> None:
    store = AnswerStore(tmp_path, study)
    for rater in (1, 2, 3):
        assert store.begin(rater)
    assert store.begin(4) == []
    store._connection.execute("UPDATE raters SET seen = '2020-01-01' WHERE rater = 2")
    pairs = [shown for shown in store.begin(4) if shown.task.kind == "pair"]
    assert len(pairs) == len(study.pairs)


def test_foreign_and_damaged_files_are_one_line(tmp_path: Path, study: Study) -> None:
    with pytest.raises(DataError, match="no answers yet"):
        AnswerStore(tmp_path, study, read_only=True)
    AnswerStore(tmp_path, study).close()
    with pytest.raises(DataError, match="answers to another study"):
        AnswerStore(tmp_path, make(12, seed=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ANSWERS_FILE).write_bytes(b"no database " * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        AnswerStore(tmp_path / "b", study)
    with pytest.raises(StorageError, match="unable to open"):
        AnswerStore(tmp_path / "absent", study)
