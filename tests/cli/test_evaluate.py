"""`diffusion-apt evaluate digits`: what it does without trained models."""

from __future__ import annotations

from pathlib import Path

from apt.evaluate.peers import PEERS
from apt.evaluate.protocols import PROTOCOLS
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


def test_protocols_and_peers_are_listed() -> None:
    text = invoke("evaluate").stdout
    for name in (*PROTOCOLS.names(), *PEERS, "digits"):
        assert f"  {name} " in text
    assert "CC BY-NC 4.0" in text


def test_options_of_a_protocol(tmp_path: Path) -> None:
    options = ["--model", "digits", "--out", tmp_path / "out"]
    assert "unknown protocol 'prompt'" in error_line(invoke("evaluate", "prompt", *options))
    missing = ["--prompts", tmp_path / "none.txt"]
    assert "cannot read prompts" in error_line(invoke("evaluate", "prompts", *options, *missing))
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    there = ["--prompts", tmp_path / "prompts.txt"]
    line = error_line(
        invoke("evaluate", "prompts", "--model", "digitz", "--out", tmp_path / "out", *there)
    )
    assert "there is no model 'digitz'" in line and "'digits'" in line
    page, html = invoke(
        "evaluate", "prompts", "--model", "digits,frames=5", *options[2:], *there
    ).stdout.splitlines()
    assert Path(page).is_file() and "a red seven" in Path(html).read_text()
