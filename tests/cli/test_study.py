"""`diffusion-apt study`: from models to pairs and a report, with mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tyro")

from apt.checkpoints.save import save_bundle
from apt.cli.study_make import split_comparison
from apt.errors import InputError
from apt.study.document import read_study
from tests.cli.shell import error_line, invoke
from tests.study.folders import small_study, write_samples
from tests.study.test_report import rate
from tests.tiny import tiny_bundle


def test_models_are_generated_with_and_compared(tmp_path: Path) -> None:
    save_bundle(tmp_path / "tiny", tiny_bundle())
    (tmp_path / "prompts.txt").write_text("a red one\na blue two\na red one\n")
    make = [
        "study", "make", tmp_path / "study", "--model", tmp_path / "tiny",
        "--model", f"two={tmp_path / 'tiny'},num_steps=2", "--prompts", tmp_path / "prompts.txt",
        "--seeds", "2", "--note", "by a script",
    ]  # fmt: skip
    result = invoke(*make)
    assert result.returncode == 0, result.stderr
    assert "4 pairs and 1 attention check in" in result.stdout
    study = read_study(tmp_path / "study")
    assert study.comparisons == [("tiny", "two")]
    assert [study.models[name]["num_steps"] for name in ("tiny", "two")] == [1, 2]
    assert invoke(*make).stdout == result.stdout
    third = ["--model", f"three={tmp_path / 'tiny'}", "--votes", "5"]
    assert "another study (different: models, votes)" in error_line(invoke(*make, *third))
    assert not (tmp_path / "study" / "samples" / "three").exists()
    rate(tmp_path / "study", study, 1)
    report = invoke("study", "report", tmp_path / "study", "--base", "two=tiny")
    assert report.returncode == 0 and "**by a script**" in report.stdout
    assert (tmp_path / "study" / "report" / "report.json").is_file()
    command = f"diffusion-apt study report {tmp_path / 'study'} --base two=tiny"
    assert command in report.stdout


def test_folders_of_samples_are_compared(tmp_path: Path) -> None:
    for look, name in enumerate(("a", "b", "c")):
        write_samples(tmp_path / name, look=look)
    options = [f"--samples=first={tmp_path / 'a'}", f"--samples={tmp_path / 'b'}"]
    options += [f"--samples={tmp_path / 'c'}", "--compare", "first:b", "--num-prompts", "2"]
    result = invoke("study", "make", tmp_path / "study", *options)
    assert "4 pairs" in result.stdout, result.stderr
    assert error_line(
        invoke("study", "make", tmp_path / "paper", *options[:2], "--paper-set", "images")
    ).startswith("300 prompts were asked for, but the samples have 3")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    small_study(tmp_path / "study")
    samples = [f"--samples=x={tmp_path / 'of_ours'}", f"--samples=x={tmp_path / 'of_theirs'}"]
    for options, message in (
        (samples, "models need different names"),
        (samples[:1], "needs at least two models"),
        (["--samples", tmp_path / "nowhere"], "cannot read samples"),
        (["--model", "digits"], "needs --prompts FILE"),
        ([*samples[:1], "--compare", "x"], "--compare needs two names"),
        ([*samples[:1], "--seeds", "0"], "at least 1 sample"),
        ([*samples[:1], "--votes", "0"], "needs at least two models"),
    ):
        assert message in error_line(invoke("study", "make", tmp_path / "new", *options))
    assert not (tmp_path / "new").exists()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red one\n")
    known = ["--model", "a=digits", "--prompts", prompts]
    for options, message in (
        (["--model", "b=digitz"], "there is no model 'digitz'"),
        (["--model", "b=digits", "--compare", "a:c"], "no model 'c' to compare"),
        (["--model", "b=digits", "--paper-set", "videos"], "96 prompts were asked for"),
    ):
        made = invoke("study", "make", tmp_path / "new", *known, *options)
        assert message in error_line(made)
    assert not (tmp_path / "new").exists()
    for command, message in (
        (["serve", tmp_path / "nowhere"], "holds no study"),
        (["serve", tmp_path / "study", "--port", "99999"], "port must be from 0 to 65535"),
        (["report", tmp_path / "study"], "no answers yet"),
        (["report", tmp_path / "study", "--base", "a"], "--base needs NAME=BASE"),
    ):
        assert message in error_line(invoke("study", *command))


def test_comparisons_are_two_names() -> None:
    assert split_comparison("a:b") == ("a", "b")
    for wrong in ("a", "a:", ":b", "a:b:c"):
        with pytest.raises(InputError, match="--compare needs two names"):
            split_comparison(wrong)
