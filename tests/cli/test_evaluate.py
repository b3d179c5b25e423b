"""`diffusion-apt evaluate digits`: what it does without trained models."""

from __future__ import annotations

from pathlib import Path

from tests.cli.shell import error_line, invoke


def test_missing_runs(tmp_path: Path) -> None:
    message = error_line(
        invoke("evaluate", "digits", "--runs", tmp_path, "--out", tmp_path / "out")
    )
    assert "expected the model folder of a finished run" in message
    assert not (tmp_path / "out").exists()


def test_bad_options(tmp_path: Path) -> None:
    options = ["--runs", tmp_path, "--seeds", "1", "1"]
    assert "seeds must be different" in error_line(invoke("evaluate", "digits", *options))
    assert "unknown methods ['magic']" in error_line(
        invoke("evaluate", "digits", "--runs", tmp_path, "--methods", "magic")
    )
