"""The command line as a shell sees it: output, exit codes, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apt.cli import app
from apt.cli.app import COMMANDS, Command
from apt.errors import DataError
from apt.version import __version__
from tests.cli.shell import error_line, run_cli


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_overview_names_every_command(args: tuple[str, ...]) -> None:
    result = run_cli(*args)
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_a_group_lists_its_commands() -> None:
    result = run_cli("data")
    assert result.returncode == 0
    assert "data digits" in result.stdout
    assert "generate" not in result.stdout


def test_version() -> None:
    assert run_cli("--version").stdout == f"diffusion-apt {__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat"], "unknown command 'generat'; did you mean 'generate'?"),
        (["data", "digit"], "unknown command 'data digit'; did you mean 'data digits'?"),
        (["sing"], "unknown command 'sing'; choose from: "),
        (["--wrong"], "unknown command '--wrong'; choose from: "),
    ],
)
def test_unknown_commands(args: list[str], message: str) -> None:
    result = run_cli(*args)
    assert error_line(result).startswith(message)
    assert result.stdout == ""


@pytest.mark.parametrize("args", [("--debug", "sing"), ("sing", "--debug")])
def test_debug_shows_the_traceback(args: tuple[str, ...]) -> None:
    result = run_cli(*args)
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown command 'sing'")


def test_messages_of_several_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise DataError("first\n  second")

    monkeypatch.setattr(Command, "run", fail)
    assert app.main(["generate"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Command, "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        app.main(["generate"])


def test_ctrl_c_exits_with_130() -> None:
    code = (
        "import os, signal, sys\n"
        "from apt.cli import app\n"
        # A test run in the background of a shell inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "app.Command.run = lambda *args, **options: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(app.main(['generate']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "apt", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == ""


def test_a_command_is_told_with_the_modules_that_it_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own parts.py"
    own.write_text("")
    assert app.main(["list", "--import", str(own), "losses"]) == 0
    assert app.called("diffusion-apt list", ["losses"]) == (
        f"diffusion-apt list losses --import '{own}'"
    )
    assert app.main(["--version"]) == 0
    assert app.called("diffusion-apt", ["--version"]) == "diffusion-apt --version"
    capsys.readouterr()
