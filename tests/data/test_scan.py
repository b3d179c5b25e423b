from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from apt.data.scan import Scan, scan_folder
from apt.errors import DataError


def media(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def captions(scan: Scan) -> dict[str, str]:
    return {entry.name: entry.caption for entry in scan.entries}


def problems(scan: Scan) -> dict[str, str]:
    return {problem.file: problem.kind for problem in scan.problems}


def test_text_files_beside_videos_and_images(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "sub/b.PNG", "c.mp4", "d.mp4", ".hidden.mp4", ".git/e.mp4", "notes.md")
    (tmp_path / "a.txt").write_text(" a cat \n")
    (tmp_path / "sub/b.txt").write_bytes(b"\xef\xbb\xbfein gr\xc3\xbcner Baum")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / "orphan.txt").write_text("of no file")
    scan = scan_folder(tmp_path)
    assert captions(scan) == {"a.mp4": "a cat", "sub/b.PNG": "ein grüner Baum"}
    assert problems(scan) == {"c.mp4": "missing caption", "d.mp4": "missing caption"}
    assert list(scan.files) == ["a.mp4", "c.mp4", "d.mp4", "sub/b.PNG"]
    assert scan.metadata is None
    assert scan.left_aside == {".md": 1, ".txt": 1}


def test_csv_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4", "clips/c.mp4", "d.mp4", "e.mp4")
    table = 'file_name, caption ,extra\r\na.mp4,"a cat, asleep",1\r\nclips/c.mp4,"two\nlines"\r\n'
    table += "b.mp4,,\r\nnone.mp4,a dog\r\n,lost\r\n"
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (tmp_path / "d.txt").write_text("from the text file")
    scan = scan_folder(tmp_path)
    assert captions(scan) == {
        "a.mp4": "a cat, asleep",
        "clips/c.mp4": "two\nlines",
        "d.mp4": "from the text file",
    }
    assert problems(scan) == {
        "b.mp4": "missing caption",
        "none.mp4": "missing file",
        "metadata.csv:7": "bad metadata",
        "e.mp4": "missing caption",
    }
    assert scan.metadata == "metadata.csv"


def test_jsonl_and_its_bad_lines(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4")
    lines = [
        json.dumps({"file_name": "a.mp4", "caption": "ein Löwe 🦁"}),
        "",
        '{"file_name": "b.mp4", "text": "hugging face style"}',
        '{"file_name": "b.mp4", "caption": "a second caption"}',
        "{not json",
        "[1]",
        '{"file_name": "a.mp4", "caption": 3}',
        '{"caption": "nobody"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    scan = scan_folder(tmp_path)
    assert [(entry.name, entry.caption) for entry in scan.entries] == [
        ("a.mp4", "ein Löwe 🦁"),
        ("b.mp4", "hugging face style"),
        ("b.mp4", "a second caption"),
    ]
    assert problems(scan) == {f"metadata.jsonl:{line}": "bad metadata" for line in (5, 6, 7, 8)}


def test_accents_match_in_either_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "größe é.mp4") for form in ("NFC", "NFD"))
    assert composed != decomposed
    media(tmp_path, decomposed)
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\n{composed},x\n", encoding="utf-8")
    scan = scan_folder(tmp_path)
    assert captions(scan) == {composed: "x"}
    assert not scan.problems
    assert scan.entries[0].path.is_file()


def test_order_does_not_depend_on_the_metadata(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,caption\nb.mp4,2\na.mp4,1\n")
    assert [entry.name for entry in scan_folder(tmp_path).entries] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"file_name;caption\na.mp4;x\n", "separated by commas"),
        (b"name,caption\na.mp4,x\n", "file_name and caption"),
        (b"", "none"),
        (b"file_name,caption\na.mp4,gr\xfcn\n", "UTF-8"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, content: bytes, says: str) -> None:
    media(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        scan_folder(tmp_path)


def test_two_metadata_files_are_one_too_many(tmp_path: Path) -> None:
    media(tmp_path, "metadata.csv", "metadata.jsonl")
    with pytest.raises(DataError, match="keep one"):
        scan_folder(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "file")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    far = media(tmp_path / "far", "b.png", "deep/c.png")
    root = media(tmp_path / "data", "a.png", "own/d.png")
    for name, target in (
        ("part1", far),
        ("part2", far),  # the same again
        ("aa", root / "own"),  # sorts before what it links to
        ("own/loop", root),
        ("up", tmp_path),
    ):
        (root / name).symlink_to(target)
    (far / "deep/back").symlink_to(far)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    scan = scan_folder(root)
    assert list(scan.files) == ["a.png", "own/d.png", "part1/b.png", "part1/deep/c.png"]
    found = {problem.file: (problem.kind, problem.detail) for problem in scan.problems}
    assert found.pop("up") == ("unreadable", "a link to a folder that holds this one: not followed")
    kind, detail = found.pop("gone")
    assert kind == "missing file" and "nowhere" in detail
    assert {kind for kind, _ in found.values()} == {"missing caption"}


def test_metadata_finds_files_behind_links(tmp_path: Path) -> None:
    far = media(tmp_path / "far", "b.png")
    root = tmp_path / "data"
    root.mkdir()
    (root / "part").symlink_to(far)
    (root / "metadata.csv").write_text("file_name,caption\npart/b.png,x\n")
    scan = scan_folder(root)
    assert captions(scan) == {"part/b.png": "x"} and not scan.problems


def test_media_under_other_names_are_named(tmp_path: Path) -> None:
    media(tmp_path, "a.jxl", "b.psd", "notes.md", "c.JSON", "voice.wav", "Makefile")
    (tmp_path / "clip001").write_bytes(b"\0\0\0\x20ftypisom" + bytes(8))
    (tmp_path / "d.backup").write_bytes(b"\x1aE\xdf\xa3" + bytes(8))
    (tmp_path / "voice.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(8))
    scan = scan_folder(tmp_path)
    assert problems(scan) == dict.fromkeys(
        ("a.jxl", "b.psd", "clip001", "d.backup"), "unknown suffix"
    )
    assert ".jxl is not looked for" in str(scan.problems[0])
    expected = {".md": 1, ".json": 1, ".wav": 1, ".m4a": 1, "without a suffix": 1}
    assert scan.left_aside == expected


def test_folders_where_files_should_be(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4", "c.mp4/inside.png")
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "b.txt").write_bytes(b"gr\xfcn")
    os.mkfifo(tmp_path / "pipe.mp4")
    media(tmp_path, "d.mp4")
    os.mkfifo(tmp_path / "d.txt")
    scan = scan_folder(tmp_path)
    details = {problem.file: problem.detail for problem in scan.problems}
    assert details == {
        "pipe.mp4": "is no regular file",
        "a.mp4": "a.txt is a folder",
        "b.mp4": "b.txt is not UTF-8",
        "c.mp4/inside.png": "inside.txt is not there",
        "d.mp4": "d.txt is no regular file",
        "d.txt": "is no regular file",
    }
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.mp4", "caption": "x"}')
    named = {problem.file: problem.detail for problem in scan_folder(tmp_path).problems}
    assert named["c.mp4"] == "named in metadata.jsonl:1, but a folder"
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").mkdir()
    with pytest.raises(DataError, match=r"metadata\.csv: cannot be read"):
        scan_folder(tmp_path)


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.touch()
    path.with_suffix(".txt").write_text("x")
    (entry,) = scan_folder(tmp_path).entries
    assert entry.name == r"caf\udce9.png" and entry.path == path
    path.with_suffix(".txt").unlink()
    (problem,) = scan_folder(tmp_path).problems
    assert str(problem).isascii() and r"caf\udce9.txt is not there" in problem.detail


def test_captions_of_every_system(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "c.txt").write_text("one\u2028two", encoding="utf-8")
    assert captions(scan_folder(tmp_path)) == {
        "a.mp4": "one\ntwo",
        "b.mp4": "é",
        "c.mp4": "one\u2028two",
    }
    (tmp_path / "a.txt").write_bytes("no mark".encode("utf-16-le"))
    (problem,) = scan_folder(tmp_path).problems
    assert "a.txt is UTF-16 without its mark" in problem.detail
