from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.data.captions import CaptionRule, LongCaptions, Refused
from apt.data.check import check_folder
from apt.data.digits import FPS, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.write import write_video_folder
from apt.errors import DataError, InputError, PromptLengthError

LIMIT = 12


def check(prompts: Sequence[str]) -> None:
    """An encoder that takes a limited number of characters, and no digits."""
    for prompt in prompts:
        if any(ch.isdigit() for ch in prompt):
            raise InputError("digits are not read")
        if len(prompt) > LIMIT:
            raise PromptLengthError(f"{len(prompt)} characters, at most {LIMIT}")


@given(st.lists(st.text(alphabet="ab \n字", max_size=40), max_size=6))
def test_what_is_cut_fits_and_is_the_beginning(captions: list[str]) -> None:
    cut = CaptionRule(check, "cut").apply(captions, captions)
    skipped = CaptionRule(check, "skip").apply(captions, captions)
    for caption, short, kept in zip(captions, cut, skipped, strict=True):
        if len(caption) <= LIMIT:
            assert short == kept == caption
            continue
        assert isinstance(kept, Refused) and kept.kind == "long caption"
        if isinstance(short, Refused):
            assert not caption[:LIMIT].strip()
        else:
            assert short and caption.startswith(short) and len(short) <= LIMIT


@pytest.mark.parametrize(
    ("caption", "short"),
    [
        ("a cat walks home", "a cat walks"),
        ("a cat walksalong", "a cat"),
        ("abcdefghijklmnop", "abcdefghijkl"),
        ("一只猫走在沙滩上看着远处的大海", "一只猫走在沙滩上看着远处"),
    ],
)
def test_words_stay_whole_where_there_are_any(caption: str, short: str) -> None:
    assert CaptionRule(check, "cut").apply([caption], ["x"]) == [short]


def test_what_an_encoder_cannot_read_is_not_cut() -> None:
    for mode in ("skip", "cut"):
        (found,) = CaptionRule(check, mode).apply(["cat 22"], ["x"])
        assert isinstance(found, Refused) and found.kind == "bad caption"
    with pytest.raises(DataError, match=r"some\.mp4: long caption \(40 characters"):
        CaptionRule(check, "error").apply(["ok", "a" * 40], ["fine.mp4", "some.mp4"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, the third with a long caption."""
    directory = tmp_path_factory.mktemp("captions")
    write_video_folder(MovingDigits(0), directory, 4, FPS)
    names = sorted(path.name for path in directory.glob("*.mp4"))
    captions = ["one", "two", "three and a half", "four"]
    rows = [f"{name},{caption}\n" for name, caption in zip(names, captions, strict=True)]
    (directory / "metadata.csv").write_text("file_name,caption\n" + "".join(rows))
    return directory


def folder(directory: Path, long: LongCaptions, *, strict: bool = False) -> VideoFolder:
    rule = CaptionRule(check, long)
    return VideoFolder(directory, buckets=[(9, 32, 32)], strict=strict, captions=rule)


def test_a_folder_leaves_out_or_cuts_what_is_too_long(directory: Path) -> None:
    skipped, cut = folder(directory, "skip"), folder(directory, "cut")
    name = sorted(path.name for path in directory.glob("*.mp4"))[2]
    assert [skipped.caption(i) for i in range(len(skipped))] == ["one", "two", "four"]
    assert name in skipped.report.text() and "long caption: 1" in skipped.report.text()
    assert [cut.caption(i) for i in range(len(cut))] == ["one", "two", "three and a", "four"]
    assert cut.report.cut == [name] and "1 caption cut" in cut.report.text()
    assert skipped.fingerprint != cut.fingerprint
    assert cut[2].caption == "three and a"
    for options in ({"long": "error"}, {"long": "skip", "strict": True}):
        with pytest.raises(DataError, match=f"{name}: long caption"):
            folder(directory, **options)  # type: ignore[arg-type]


def test_a_check_names_the_files(directory: Path) -> None:
    found = check_folder(directory, decode=False, captions=CaptionRule(check))
    assert [(p.kind, p.file) for p in found.problems] == [
        ("long caption", sorted(path.name for path in directory.glob("*.mp4"))[2])
    ]
    assert check_folder(directory, decode=False).ok
