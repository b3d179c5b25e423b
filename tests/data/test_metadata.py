from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.data.metadata import _csv_records, _csv_rows, read_metadata

HEAD = "file_name,caption\n"


def rows(tmp_path: Path, text: str, name: str = "metadata.csv") -> dict[str, str | None]:
    """What is wrong, or the caption, by line."""
    (tmp_path / name).write_bytes(text.encode())
    found = read_metadata(tmp_path / name)
    return {row.where.partition(":")[2]: row.problem or row.caption for row in found}


def test_commas_that_nobody_quoted_are_named(tmp_path: Path) -> None:
    found = rows(tmp_path, HEAD + "a.png,a cat, on a mat, asleep\nb.png,a dog\nc.png,bird,,\n")
    assert found.pop("2", "").startswith("has 4 fields, the first line has 2; put a caption with")
    assert found == {"3": "a dog", "4": "bird"}, "a spreadsheet's empty cells are no captions"
    (row, *_) = read_metadata(tmp_path / "metadata.csv")
    assert row.file_name == "a.png"
    turned = rows(tmp_path, "caption,file_name\na cat, on a mat,a.png\na dog,b.png\n")
    assert turned.pop("2", "").startswith("has 3 fields")
    assert turned == {"3": "a dog"}
    assert read_metadata(tmp_path / "metadata.csv")[0].file_name is None


@pytest.mark.parametrize(
    "bad",
    [
        'a.png,"never closed',
        'a.png,"closed by the next" one\'s',
        'a.png,"a "small" cat"',
        'a.png,"a cat" on a mat',
    ],
)
@pytest.mark.parametrize(
    "after", ["b.png,second\n", 'b.png,"second"\n', 'b.png,"two\nlines"\nc.png,third\n', ""]
)
def test_a_quote_that_nobody_closed_swallows_nothing(tmp_path: Path, bad: str, after: str) -> None:
    whole = rows(tmp_path, HEAD + "z.png,first\n" + after)
    found = rows(tmp_path, HEAD + bad + "\n" + after)
    said = found.pop("2")
    assert said is not None and said.startswith("a quote is not closed or not doubled")
    assert whole.pop("2") == "first"
    assert found == whole, "every other row is read as if the bad one were not there"
    assert read_metadata(tmp_path / "metadata.csv")[0].file_name == "a.png"


def test_inches_and_line_ends_are_captions(tmp_path: Path) -> None:
    text = HEAD.replace("\n", "\r\n") + 'a.png,a 5" pipe\r\nb.png,"one\r\ntwo, ""three"""\r\n'
    assert rows(tmp_path, text) == {"2": 'a 5" pipe', "3": 'one\ntwo, "three"'}
    assert rows(tmp_path, HEAD + "a.png,one\u2028two\n") == {"2": "one\u2028two"}


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff\r"))
        .map(str.strip)
        .filter(bool),
        min_size=1,
        max_size=5,
    )
)
def test_what_a_csv_writer_writes_is_read(captions: list[str]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("file_name", "caption"), *((f"{i}", c) for i, c in enumerate(captions))])
    lines = table.getvalue().split("\n")[:-1]
    assert [row.caption for row in _csv_rows(Path("metadata.csv"), lines)] == captions


def test_many_open_quotes_take_no_more_than_their_share(tmp_path: Path) -> None:
    """What is searched for the end of a quote is bounded, or this would not end."""
    text = HEAD + 'a.png,"open\n' * 10 + "b.png,b\n" * 5_000
    found = rows(tmp_path, text)
    assert len(found) == 5_010
    assert list(found.values()).count("b") == 5_000


def test_jsonl_with_half_characters_and_deep_nests(tmp_path: Path) -> None:
    lines = ['{"file_name": "a.png", "caption": "\\ud83d"}', "[" * 100_000, "", '{"caption": "x"}']
    found = rows(tmp_path, "\n".join(lines), "metadata.jsonl")
    assert list(found) == ["1", "2", "4"]
    assert "half of a character" in (found["1"] or "")
    assert "JSON" in (found["2"] or "")


def test_many_rows_are_not_walked_again_for_each() -> None:
    looked_at = []

    class Lines(list):
        def __getitem__(self, place: int) -> str:
            looked_at.append(place)
            return super().__getitem__(place)

        def __iter__(self) -> Iterator[str]:
            return (self[place] for place in range(len(self)))

    assert len(list(_csv_records(Lines(f"{number}.png,a cat" for number in range(100))))) == 100
    assert len(looked_at) < 400
