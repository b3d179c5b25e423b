"""Which of many outputs are done, and where they can be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apt.errors import InputError
from apt.outputs import Output, OutputRecord, check_folder, check_place

SETTINGS = {"steps": 1, "size": (9, 32)}


def output(folder: Path, number: int, prompt: str = 'a seven\u2028 "left"') -> Output:
    return Output(path=folder / f"x-{number}.png", prompt=prompt, seed=number)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of two files."""
    path = tmp_path / "x.png.jsonl"
    written = OutputRecord(path, SETTINGS, resume=False)
    for number in (0, 1):
        item = output(tmp_path, number)
        item.path.write_bytes(b"picture %d" % number)
        written.add(item)
    return path


def done(record: Path, settings: object = SETTINGS) -> list[bool]:
    again = OutputRecord(record, settings, resume=True)  # type: ignore[arg-type]
    return [again.has(output(record.parent, number)) for number in range(3)]


def test_what_was_made_is_found_again(record: Path) -> None:
    assert done(record) == [True, True, False]
    assert len(record.read_text(encoding="utf-8").split("\n")) == 4


@pytest.mark.parametrize("spoil", ["cut", "other", "gone", "longer"])
def test_files_that_are_no_longer_what_they_were(record: Path, spoil: str) -> None:
    path = output(record.parent, 1).path
    if spoil == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": b"pict", "other": b"picture 2", "longer": b"picture 1."}[spoil])
    assert done(record) == [True, False, False]


def test_other_prompts_and_seeds_are_not_done(record: Path) -> None:
    again = OutputRecord(record, SETTINGS, resume=True)
    assert not again.has(output(record.parent, 0, prompt="another"))
    assert not again.has(
        Output(path=record.parent / "x-0.png", prompt=output(record.parent, 0).prompt, seed=7)
    )


def test_a_line_that_was_cut_off_did_not_happen(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    record.write_text(text[:-20], encoding="utf-8")
    assert done(record) == [True, False, False]
    again = OutputRecord(record, SETTINGS, resume=True)
    again.add(output(record.parent, 1))
    assert done(record) == [True, True, False]
    assert record.read_text(encoding="utf-8") == text


def test_a_line_that_was_cut_off_inside_a_letter(record: Path) -> None:
    before = record.read_bytes()
    record.write_bytes(before + '{"file": "x-2.png", "prompt": "猫'.encode()[:-1])
    assert done(record) == [True, True, False]
    assert record.read_bytes() == before


def test_a_record_of_nothing_but_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"settings": {"st')
    again = OutputRecord(path, SETTINGS, resume=True)
    item = output(tmp_path, 0)
    item.path.touch()
    again.add(item)
    assert done(path) == [True, False, False]


def test_a_new_list_begins_a_new_record_with_its_first_file(record: Path) -> None:
    new = OutputRecord(record, {"steps": 2}, resume=False)
    assert done(record) == [True, True, False], "nothing is made yet"
    new.add(output(record.parent, 0))
    assert done(record, {"steps": 2}) == [True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "mine"}\n', "is not a record of outputs"),
        ("not json\n", "is not a record of outputs"),
        (json.dumps({"settings": SETTINGS}) + "\nnot json\n", "is damaged at"),
        (json.dumps({"settings": SETTINGS}) + "\n[1]\n", "is damaged at"),
        (json.dumps({"settings": 5}) + "\n", "is not a record of outputs"),
        (json.dumps({"settings": {"steps": 4, "size": [9, 32]}}) + "\n", "steps was 4 and is now"),
    ],
)
def test_records_of_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        OutputRecord(path, SETTINGS, resume=True)
    assert path.read_text() == text


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"caption": "mine"}\n')
    with pytest.raises(InputError, match="is not a record of outputs"):
        OutputRecord(path, SETTINGS, resume=False)


def test_places(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "deeper" / "x.mp4")
    assert not list(tmp_path.iterdir()), "nothing is made yet"
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "x.mp4", "is a file; name a folder"),
        (tmp_path / "file" / "deeper" / "x.mp4", "is a file; name a folder"),
        (tmp_path / ("x" * 250 + ".mp4"), "too long"),
    ):
        with pytest.raises(InputError, match=message):
            check_place(path)
    check_folder(tmp_path / "new")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a file system that refuses")
def test_a_disk_that_refuses() -> None:
    with pytest.raises(InputError, match="cannot write"):
        check_place(Path("/proc/x.mp4"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_place(tmp_path / "x.mp4")
