"""Studies from folders of samples."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apt.errors import DataError, InputError
from apt.samples import read_samples
from apt.study.document import INTACT, MEDIA, STUDY_FILE, read_study
from apt.study.make import MakeConfig, make_study
from tests.study.folders import KEYS, PROMPTS, small_study, write_samples


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses files above a size, as a full disk does at some point."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_prompt_and_seed_meets_itself(tmp_path: Path) -> None:
    study = small_study(tmp_path / "study", ("a", "b", "c"))
    assert study.comparisons == [("a", "b"), ("a", "c"), ("b", "c")]
    assert len(study.pairs) == 3 * len(KEYS)
    for pair in study.pairs:
        sources = [read_samples(tmp_path / f"of_{name}") for name in (pair.first, pair.second)]
        assert all((pair.prompt, pair.seed) in source.samples for source in sources)
    assert read_study(tmp_path / "study") == study


def test_names_of_files_give_nothing_away(tmp_path: Path) -> None:
    study = small_study(tmp_path / "study")
    files = sorted(path.name for path in (tmp_path / "study" / MEDIA).iterdir())
    assert files == sorted({name for pair in (*study.pairs, *study.checks) for name in pair.files})
    assert all(len(name) == len("0" * 32 + ".mp4") for name in files)
    # In the order of names, models and prompts are mixed.
    owner = {name: i for pair in study.pairs for i, name in enumerate(pair.files)}
    order = [owner[name] for name in files if name in owner]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_the_numbers_of_the_paper(tmp_path: Path) -> None:
    keys = [(f"prompt {n}", seed) for n in range(12) for seed in range(2)]
    config = MakeConfig(num_prompts=7, seeds_per_prompt=1, check_every=3)
    study = small_study(tmp_path / "study", keys=keys, config=config)
    prompts = [pair.prompt for pair in study.pairs]
    assert len(set(prompts)) == len(prompts) == 7
    assert prompts != [f"prompt {n}" for n in range(7)]
    assert {pair.seed for pair in study.pairs} == {0}
    assert len(study.checks) == 3 and all(check.first == INTACT for check in study.checks)


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    ours, theirs = write_samples(tmp_path / "a"), write_samples(tmp_path / "b", KEYS[1:], look=1)
    still = write_samples(tmp_path / "c", look=2, suffix=".png")
    out = tmp_path / "study"
    for folders, comparisons, config, message in (
        ({"a": ours}, [], MakeConfig(), "needs at least two models"),
        ({"a": ours, "b": theirs}, [], MakeConfig(), "'b' lacks 1 of the samples of 'a'"),
        ({"b": theirs, "a": ours}, [], MakeConfig(), "'b' lacks 1 of the samples of 'a'"),
        ({"a": ours, "c": still}, [], MakeConfig(), "of different types"),
        ({"a": ours, "b": ours}, [("a", "x")], MakeConfig(), "no model 'x' to compare"),
        ({"a": ours, "b": ours}, [("a", "a")], MakeConfig(), "with itself"),
        (
            {"a": ours, "b": ours},
            [("a", "b"), ("b", "a")],
            MakeConfig(),
            "comparison was given twice",
        ),
        ({"a": ours, "b": ours}, [], MakeConfig(num_prompts=300), "300 prompts were asked for"),
        ({"a": ours, "b": ours}, [], MakeConfig(seeds_per_prompt=3), "3 samples of each prompt"),
        ({"a": ours, "b": ours}, [], MakeConfig(votes=0), "at least 1 rater"),
        ({"a": ours, "b": ours}, [], MakeConfig(check_every=-1), "checks come once per"),
        ({"a": ours, "intact": ours}, [], MakeConfig(), "cannot be called 'intact'"),
    ):
        with pytest.raises(InputError, match=message):
            make_study(out, folders, comparisons, config)
    assert not out.exists()


def test_a_changed_or_absent_sample_is_one_line_and_the_rest_is_kept(tmp_path: Path) -> None:
    folders = {name: write_samples(tmp_path / name, look=i) for i, name in enumerate("ab")}
    last = folders["b"].samples[PROMPTS[-1], 3].path
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"5.mp4' differs from its manifest"):
        make_study(tmp_path / "study", folders)
    last.unlink()
    with pytest.raises(DataError, match="cannot read the sample"):
        make_study(tmp_path / "study", folders)
    assert not (tmp_path / "study" / STUDY_FILE).exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / MEDIA).iterdir()}
    assert kept
    last.write_bytes(whole)
    make_study(tmp_path / "study", folders)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_full_disk_is_one_line_and_the_call_can_be_repeated(tmp_path: Path) -> None:
    folders = {name: write_samples(tmp_path / name, look=i) for i, name in enumerate("ab")}
    with files_of_at_most(2000), pytest.raises(InputError, match="cannot write the study"):
        make_study(tmp_path / "study", folders)
    assert not list((tmp_path / "study" / MEDIA).iterdir())
    assert len(make_study(tmp_path / "study", folders).pairs) == len(KEYS)


def test_a_study_is_not_replaced(tmp_path: Path) -> None:
    folders = {name: write_samples(tmp_path / name, look=i) for i, name in enumerate("ab")}
    study = make_study(tmp_path / "study", folders)
    assert make_study(tmp_path / "study", folders) == study
    with pytest.raises(InputError, match="contains another study"):
        make_study(tmp_path / "study", folders, config=MakeConfig(seed=1))
    assert read_study(tmp_path / "study") == study


def test_a_damaged_document_is_one_line(tmp_path: Path) -> None:
    small_study(tmp_path / "study")
    path = tmp_path / "study" / STUDY_FILE
    text = path.read_text()
    for damaged, message in (
        (text[:-50], "damaged"),
        (text.replace('"format": 1', '"format": 2'), "another version"),
        (text.replace(".mp4", "/../../../x"), "out of its folder"),
        ("[]", "damaged"),
    ):
        path.write_text(damaged)
        with pytest.raises(DataError, match=message):
            read_study(tmp_path / "study")
    with pytest.raises(DataError, match="holds no study"):
        read_study(tmp_path)
