"""A method from outside the package goes through the stock commands."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from apt.checkpoints.info import read_info
from tests.cli.shell import error_line, invoke, run_cli

MODULE = Path(__file__).with_name("regression.py")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(MODULE, folder / "my_method.py")
    result = run_cli(
        "--import", "my_method", "train", "digits_regression",
        "--stage.steps", "3", "--run-dir", "run", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_it_is_trained_and_exported(run_dir: Path) -> None:
    updates = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in updates] == [1, 2]
    info = read_info(run_dir / "export")
    assert (info.stage, info.sampling.sampler) == ("regression", "consistency")
    assert info.summary == "a one-step model regressed on its teacher"
    assert info.training["config"]["stage"] == {"pupil": "digits-diffusion", "steps": 3}
    assert info.training["models"] == ["stage.pupil"]


def test_it_is_sampled_without_the_module(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert "my_method" not in sys.modules
    result = invoke(
        "generate", "--model", run_dir / "export", "--prompt", "a red seven moving left",
        "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert out.is_file()


def test_it_is_listed(tmp_path: Path) -> None:
    result = run_cli("list", "recipes", f"--import={MODULE}", cwd=tmp_path)
    assert "digits_regression" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--import"], "needs a module"),
        (["--import", "not_there"], "no such module"),
        (["--import", "not_there.py"], "no such file"),
    ],
)
def test_a_module_that_is_not_there(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_line(invoke("list", *args))


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("json.py", "", r"another module is named 'json'; rename the file"),
        ("twice.py", "own", r"recipe 'own' is registered twice, as twice\.mine and as apt\.train"),
    ],
)
def test_names_that_are_taken(name: str, code: str, message: str, tmp_path: Path) -> None:
    register = (
        "from apt.train.recipe_names import RECIPES\n\n"
        f"@RECIPES.register({code!r})\ndef mine():\n    pass\n"
    )
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / name).write_text(register if code else "")
    result = run_cli("list", "recipes", "--import", f"parts/{name}", cwd=tmp_path)
    assert re.search(message, error_line(result))


def test_a_file_may_be_named_twice(tmp_path: Path) -> None:
    both = ("--import", str(MODULE), "--import", str(MODULE))
    assert run_cli("list", "recipes", *both, cwd=tmp_path).returncode == 0
