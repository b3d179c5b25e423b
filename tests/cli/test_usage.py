"""Options and values that a command does not take are one-line errors, whatever tyro prints."""

from __future__ import annotations

import contextlib
import io
import os

import pytest

from apt.cli.app import COMMANDS, main
from tests.cli.shell import error_line, invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_option_in_one_line(command: str) -> None:
    needed = {
        "train": ["digits_apt"], "plan": ["digits_apt"], "evaluate": ["digits", "--model", "m",
        "--out", "o"], "data digits": ["d"], "data vizdoom": ["d"], "data check": ["d"],
        "data encode": ["a", "b", "--model", "m"], "compare": ["a", "b"],
        "traverse": ["--prompt", "p"],
        "study make": ["d"], "study serve": ["d"], "study report": ["d"], "export": ["a", "b"],
        "pull": ["m"], "push": ["f", "o/n"], "tags": ["f"],
    }  # fmt: skip
    asked = [*command.split(), *needed.get(command, [])]
    line = error_line(invoke(*asked, "--no-such-thing", "7"))
    assert line.startswith("no such option: --no-such-thing 7;"), line
    assert line.endswith("--help` shows all")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--promt", "x"], "no such option: --promt x; did you mean --prompt? `diff"),
        (["generate", "--prompt", "x", "y", "--sed", "z z"], "--sed z z; did you mean --seeds?"),
        (["generate", "--num-steps", "one"], "--num-steps: expected a whole number, got 'one';"),
        (["generate", "--cfg-scale", "x"], "--cfg-scale: expected a number, got 'x';"),
        (["generate", "--sampler", "x"], "--sampler: expected one of 'auto', 'consistency', "),
        (["generate", "--num-steps", "x" * 200], f"got '{'x' * 200}';"),
        (["push"], "FOLDER, OWNER/NAME is missing; `diffusion-apt push --help` explains"),
        (["evaluate", "digits", "--model", "digits"], "--out is missing;"),
        (["train"], "RECIPE is missing;"),
        (["generate", "--prompt", "x", "--seed"], "--seed needs at least one number"),
        (["tags"], "there is no file to read"),
        (["bench", "dit", "--compression", "1"], "--compression: expected INT INT INT, got '1'"),
    ],
)
def test_wrong_usage_is_explained_in_one_line(args: list[str], message: str) -> None:
    assert message in error_line(invoke(*args))


def test_boxes_are_read_in_either_drawing() -> None:
    """Where the output has an encoding, which that of `invoke` has not."""
    args = ["generate", "--promt", "x"]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(args) == 2
    err.seek(0)
    assert err.read() == invoke(*args).stderr


def test_the_width_of_the_terminal_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    error_line(invoke("generate", "--promt", "x"))
    assert os.environ["COLUMNS"] == "60"
    monkeypatch.delenv("COLUMNS")
    error_line(invoke("generate", "--promt", "x"))
    assert "COLUMNS" not in os.environ
