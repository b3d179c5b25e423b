"""A model, a text encoder, a codec, a head, an objective and data of the user's own go through the
stock commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt.checkpoints.info import read_info, without_folders
from apt.train.logs import read_log
from tests.cli.shell import ROOT, error_line, invoke
from tests.hub.processes import run_cli as from_hub
from tests.hub.server import TOKEN, HubServer

MODULE = "tests.train.own_parts"

# Several commands in one process: most of the time of each would be torch's imports.
SCRIPT = """
import json, sys
from apt.cli.app import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    print("exit code", code, flush=True)
"""


def commands(folder: Path, *given: list[str]) -> str:
    """Run commands with the user's module; returns stdout and stderr."""
    text = json.dumps([[*command, "--import", MODULE] for command in given])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, text],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    run_dir = ["--run-dir", "all", "--data.options", "notes", str(folder / "mine")]
    said = commands(
        folder,
        ["train", "mine", *run_dir],
        # The last stage first: a stage is not continued on another teacher than it began with.
        *(
            ["train", "--resume", f"all/{stage}", "--num-updates", "3"]
            for stage in ("apt", "distill", "pretrain")
        ),
        ["export", "all/apt", "model"],
        ["generate", "--model", "model", "--prompt", "a bar moving up", "--out", "x.png"],
        ["list", "datasets"],
    )
    assert said.count("exit code 0\n") == 7, said
    assert re.search(r"own_bars +Moving bars\.", said), said  # in a column as wide as the names
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "distill", "apt"])
def test_every_stage_is_trained_and_continued(folder: Path, stage: str) -> None:
    assert [entry["step"] for entry in read_log(folder / "all" / stage)] == [1, 2, 3]
    assert (folder / "all" / stage / "samples" / "00000002.png").is_file()


def test_the_parts_are_named_in_the_model(folder: Path) -> None:
    info = read_info(folder / "model")
    assert (info.model.architecture, info.model.config["depth"]) == ("own_mixer", 3)
    assert info.text_encoder.architecture == "own_words"
    assert info.codec.architecture == "own_fold"
    assert info.codec.config == {"scale": 0.5}
    assert (folder / "x.png").is_file()


def test_what_the_source_says_is_a_folder_stays_here(folder: Path) -> None:
    own = read_info(folder / "all" / "apt" / "export")
    assert own.training["config"]["data"]["options"]["notes"] == str(folder / "mine")
    assert "data.options.notes" in own.training["folders"]
    for info in (without_folders(own), read_info(folder / "model")):
        assert info.training["config"]["data"]["options"] == {"count": 6, "notes": ""}


def test_without_the_module_it_is_asked_for(folder: Path) -> None:
    model, out = folder / "model", folder / "y.png"
    line = error_line(invoke("generate", "--model", model, "--prompt", "a", "--out", out))
    assert "'own_mixer', which is not registered here" in line
    assert "--import MODULE" in line


def test_it_is_pushed_and_sampled_from_the_hub(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    out = tmp_path / "x.png"
    with HubServer() as hub:
        pushed = from_hub(hub, tmp_path / "a", "push", folder / "model", "me/own", token=TOKEN)
        assert pushed.returncode == 0, pushed.stderr
        files = hub.repos["me/own"].files
        assert not any(str(folder).encode() in content for content in files.values())
        sample = ["generate", "--model", "me/own", "--prompt", "a bar", "--out", str(out)]
        assert "not registered here" in error_line(from_hub(hub, tmp_path / "b", *sample))
        made = from_hub(hub, tmp_path / "c", *sample, "--import", MODULE)
    assert made.returncode == 0, made.stderr
    assert out.is_file()


BAD = {
    "unknown data source 'own_bar'; did you mean 'own_bars'?": ["--data.source", "own_bar"],
    "takes no option 'cuont'; did you mean 'count'?": ["--data.options", "cuont", "3"],
    "option 'count' must be int, got 'many'": ["--data.options", "count", "many"],
    "--data.path clips names a folder": ["--data.path", "clips"],
    "passed in Python; call": ["--data.source", "object"],
    "Bars, item 0 is 5x8x8, but the run asks for 5x8x16": ["--data.width", "16"],
    "Bars is empty": ["--data.options", "count", "0"],
}


def test_sources_and_options_are_checked(folder: Path) -> None:
    said = commands(
        folder, *(["train", "mine", "--run-dir", "other", *options] for options in BAD.values())
    )
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    for message, line in zip(BAD, errors, strict=True):
        assert message in line
    assert said.count("exit code 2\n") == len(BAD)
