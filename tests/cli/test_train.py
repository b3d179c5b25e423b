"""`diffusion-apt train` and `export`, with a model that is small enough to train in a test."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from apt.checkpoints.info import read_info
from apt.train.config_file import plain
from apt.train.logs import SPEED_NAME, RunLog, read_log
from apt.train.recipes_digits import digits_apt, digits_codec
from apt.train.run_state import exit_status
from tests.cli.shell import Result, error_line, invoke
from tests.train.deaths import stopping

TINY = (
    "--num-updates", "2", "--batch-size", "2", "--sample-every", "0", "--device", "cpu",
    "--optimizer.decay-updates", "0",
    "--model.options", "hidden_size", "24", "depth", "2", "num_heads", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages in a row."""
    root = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--negative-prompt", "one", "--checkpoint-every", "1"]
    result = invoke("train", "digits_pixels", "--run-dir", root, *TINY, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"digits_pixels_{stage}: {root / stage / 'export'}"
        for stage in ("pretrain", "distill", "apt")
    ]
    return root


def test_stages_start_from_each_other_in_their_new_folder(trained: Path) -> None:
    info = read_info(trained / "apt" / "export")
    assert info.stage == "apt"
    assert info.model.config["hidden_size"] == 24
    assert info.training["config"]["negative_prompt"] == "one"
    started = info.training["started_from"]
    assert started["recipe"] == "digits_pixels_distill"
    assert started["started_from"]["recipe"] == "digits_pixels_pretrain"


def error_line_at_end(result: Result) -> str:
    """The error of a run that had something to say before."""
    assert result.returncode == 2, result.stderr
    return result.stderr.splitlines()[-1].removeprefix("error: ")


def test_a_finished_row_is_not_trained_again(trained: Path) -> None:
    options = ["--negative-prompt", "one"]
    assert "--resume" in error_line(
        invoke("train", "digits_pixels", "--run-dir", trained, *TINY, *options)
    )
    log = (trained / "apt" / "log.jsonl").read_bytes()
    for again in ("--resume", "--continue"):
        result = invoke("train", "digits_pixels", "--run-dir", trained, *TINY, *options, again)
        assert result.returncode == 0, result.stderr
        said = result.stderr.splitlines()
        assert len(said) == 3 and all("already finished after 2 updates" in line for line in said)
        assert result.stdout.splitlines()[2] == f"digits_pixels_apt: {trained / 'apt' / 'export'}"
    assert (trained / "apt" / "log.jsonl").read_bytes() == log
    # The requested settings must be those of the finished run, except for those that do not matter.
    on = ("train", "--resume", trained / "apt", "--data.num-workers", "2")
    assert "already finished" in invoke(*on).stderr
    assert "seed (was 0, is 1)" in error_line(invoke(*on, "--seed", "1"))


def test_the_result_generates(trained: Path, tmp_path: Path) -> None:
    result = invoke(
        "generate", "--model", trained / "apt" / "export",
        "--prompt", "a red seven moving left", "--out", tmp_path / "x.mp4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x.mp4").stat().st_size > 0


def test_export_of_the_finished_model(trained: Path, tmp_path: Path) -> None:
    run_dir = trained / "apt"
    assert invoke("export", run_dir, tmp_path / "half", "--dtype", "bfloat16").returncode == 0
    assert invoke("export", run_dir, tmp_path / "full").returncode == 0
    exported, own = read_info(tmp_path / "half"), read_info(run_dir / "export")
    assert dataclasses.replace(exported, training={}) == dataclasses.replace(own, training={})
    # How it was trained, without this machine's folders.
    assert exported.training["config"] == {
        **own.training["config"],
        "run_dir": "",
        "stage": {**own.training["config"]["stage"], "generator": "", "discriminator": ""},
    }
    weights = "transformer.safetensors"
    assert (tmp_path / "full" / weights).read_bytes() == (run_dir / "export" / weights).read_bytes()
    assert (tmp_path / "half" / weights).stat().st_size < 0.6 * (
        tmp_path / "full" / weights
    ).stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update", "7"], "no ema snapshot of update 7"),
        (["--weights", "raw"], "pass --update"),
    ],
)
def test_export_of_what_is_not_there(
    trained: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in error_line(invoke("export", trained / "apt", tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_export_of_no_run(tmp_path: Path) -> None:
    assert "has no apt.json" in error_line(invoke("export", tmp_path, tmp_path / "out"))


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    wild = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-updates", "0"]
    options = ["--run-dir", tmp_path, *TINY, "--num-updates", "9", *wild]
    result = invoke("train", "digits_pixels_pretrain", *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "became NaN or infinite" in last


def test_a_stop_has_a_status_of_its_own_and_one_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    command = ["train", "digits_pixels_pretrain", "--run-dir", run_dir, *TINY, "--continue"]
    command += ["--checkpoint-every", "1"]
    monkeypatch.setattr("apt.train.loop.PLOT_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", stopping(2))
        stopped = invoke(*command, "--num-updates", "10000")
    assert stopped.returncode == 75, stopped.stderr
    state = json.loads((run_dir / "state.json").read_text())
    assert state["state"] == "unfinished" and state["reason"] == "SIGTERM"
    done = state["update"]
    assert len(read_log(run_dir)) == done == 2
    assert (run_dir / "losses.png").is_file()  # drawn while it goes on

    line = error_line(invoke(*command, "--num-updates", str(done), "--start-over", "--resume"))
    assert "cannot be used together" in line
    assert invoke(*command, "--num-updates", str(done)).returncode == 0
    assert json.loads((run_dir / "state.json").read_text())["state"] == "finished"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert exit_status(False) == 0


def test_a_shorter_run_than_was_done_changes_nothing(trained: Path) -> None:
    run_dir = trained / "pretrain"
    before = (run_dir / "config.json").read_bytes()
    options = [*TINY, "--stage.timestep-shift", "1.25", "--num-updates", "1", "--resume"]
    line = error_line(invoke("train", "digits_pixels_pretrain", "--run-dir", run_dir, *options))
    assert "is already at update 2" in line and "set --num-updates to at least 2" in line
    assert (run_dir / "config.json").read_bytes() == before


def test_print_config_is_the_recipe() -> None:
    assert json.loads(invoke("train", "digits_apt", "--print-config").stdout) == plain(digits_apt())


def test_print_config_of_a_row_is_a_list() -> None:
    configs = json.loads(invoke("train", "digits", "--print-config").stdout)
    assert [config["name"] for config in configs] == [
        "digits_codec", "digits_pretrain", "digits_distill", "digits_apt",
    ]  # fmt: skip
    assert configs[0] == plain(digits_codec())


def test_a_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    for recipe in ("digits", "digits_gpu", "walks", "apt_video_wan"):
        printed = invoke("train", recipe, "--print-config").stdout
        (tmp_path / "config.json").write_text(printed)
        again = invoke("train", f"--config={tmp_path / 'config.json'}", "--print-config")
        assert again.stdout == printed, again.stderr
    changed = ["--config", tmp_path / "config.json", "--seed", "5", "--print-config"]
    expected = {**json.loads(printed), "seed": 5}
    assert json.loads(invoke("train", *changed).stdout) == expected


def test_a_single_run_continues_in_its_current_folder(tmp_path: Path) -> None:
    data = ["--negative-prompt", "one", "--data.source", "folder", "--data.path"]
    assert invoke("data", "digits", tmp_path / "clips", "--num", "4").returncode == 0
    begun = ["--run-dir", tmp_path / "run", *TINY, *data, tmp_path / "clips"]
    result = invoke("train", "digits_pixels_pretrain", *begun)
    assert result.returncode == 0, result.stderr
    (tmp_path / "clips").rename(tmp_path / "moved")
    run_dir = (tmp_path / "run").rename(tmp_path / "elsewhere")

    on = ["train", "--resume", run_dir, "--num-updates", "3", "--data.path", tmp_path / "moved"]
    assert "optimizer.learning_rate (was 0.0015, is 0.5)" in error_line(
        invoke(*on, "--optimizer.learning-rate", "0.5")
    )
    result = invoke(*on, "--micro-batch-size", "1")
    assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stderr.splitlines() if "with other options" in line)
    assert "micro_batch_size (was 0, is 1)" in said and "data.path (was " in said
    assert len(read_log(run_dir)) == 3 and not (tmp_path / "run").exists()
    header = result.stderr.splitlines()[:8]
    assert header[0] == "digits_pixels_pretrain: 3 updates of 2 samples, continued from update 2"
    assert re.fullmatch(r"  generator: \d+\.\d k parameters", header[1])
    assert header[3] == "  clips: 4 of 9x32x32 at 8 fps"
    assert re.fullmatch(r"  device: cpu with \d+\.\d GiB, bf16", header[4])
    assert header[6] == f"  folder: {run_dir}"
    speed = read_log(run_dir, SPEED_NAME)
    assert [entry["step"] for entry in speed] == [1, 2, 3]
    assert all(value is not None and value >= 0 for entry in speed for value in entry.values())
    rates = [entry["generator/learning_rate"] for entry in read_log(run_dir)]
    assert rates == pytest.approx([1.5e-5, 3e-5, 4.5e-5])  # of a warm-up over 100 updates

    (tmp_path / "moved" / "000003.mp4").unlink()
    (tmp_path / "moved").rename(tmp_path / "others")
    further = ["--num-updates", "4", "--data.path", tmp_path / "others"]
    other = error_line_at_end(invoke("train", "--resume", run_dir, *further))
    assert "differ in files" in other and "start a new run" in other


def test_a_row_goes_on_from_its_folder_alone(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved row"
    shutil.copytree(trained, moved)
    shutil.rmtree(moved / "apt")
    result = invoke("train", "--resume", moved)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f": {moved / 'apt' / 'export'}")
    started = json.loads((moved / "apt" / "config.json").read_text())["stage"]
    assert started["generator"] == f"{moved}/distill/export"
    # One that an earlier version began does not say what its stages are.
    (moved / "stages.json").unlink()
    line = error_line(invoke("train", "--resume", moved))
    assert "several stages (apt, distill, pretrain)" in line


def test_any_field_can_be_changed() -> None:
    result = invoke(
        "train", "digits_apt", "--print-config",
        "--stage.r1.weight", "7", "--stage.layers", "1", "2",
        "--data.source", "folder", "--data.path", "d", "--data.strict",
        "--optimizer.betas", "0.5", "0.75", "--precision", "bf16", "--monitor.action", "stop",
    )  # fmt: skip
    config = json.loads(result.stdout)
    assert config["stage"]["r1"]["weight"] == 7
    assert config["stage"]["layers"] == [1, 2]
    assert config["data"]["source"] == "folder"
    assert config["data"]["path"] == "d"
    assert config["data"]["strict"] is True
    assert config["optimizer"]["betas"] == [0.5, 0.75]
    assert config["precision"] == "bf16"
    assert config["monitor"]["action"] == "stop"


def test_help_of_a_recipe_shows_its_fields_and_values() -> None:
    result = invoke("train", "digits_apt", "--help")
    assert result.returncode == 0
    assert "--stage.r1.weight FLOAT" in result.stdout
    assert "--data.path STR" in result.stdout
    assert "--stage.teacher" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit_apt"], "unknown recipe 'digit_apt'; did you mean 'digits_apt'"),
        (["zzz"], "unknown recipe 'zzz'; choose from: "),
        (
            ["--resume", "digits_apt"],
            "digits_apt is not the folder of a run, which has a",
        ),
        (["--resume"], "--resume needs a RUN: diffusion-apt train --resume RUN"),
        (["--resume", "--take-over"], "--resume needs a RUN"),
        (["--config"], "--config needs a FILE"),
        (["--config", "none.json"], "cannot read 'none.json'"),
        (["--take-over", "digits_apt"], "the recipe's name comes first"),
        (["own", "--config", "none.json"], "--config FILE replaces the recipe's name"),
        (["own", "--resume", "run"], "or keep it and write --run-dir RUN --resume"),
        (
            ["--config", "."],
            "'.' is a folder; expected the output of `train RECIPE --print-config`",
        ),
        (["digits_apt", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["digits_apt", "--num-updates", "30"], "--optimizer.decay-updates to at most 30"),
        (["digits_apt", "--optimizer.betas", "0.5", "nan"], "optimizer.betas must be a finite"),
        (["digits_apt", "--optimizer.eps", "-1"], "optimizer.eps must be at least 0"),
        (["digits_apt", "--run-dir", "no-run", "--resume"], "holds no run to resume"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_line(invoke("train", *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stage.r1.weigth", "5"], "did you mean --stage.r1.weight?"),
        (["--stage.teacher", "x"], "no such option: --stage.teacher x; `diffusion-apt train "),
        (["--num-updates", "many"], "--num-updates: expected a whole number, got 'many';"),
        (["--precision", "fp8"], "--precision: expected one of 'fp32', 'bf16', 'auto', got 'fp8'"),
        (["--optimizer.betas", "0.5"], "--optimizer.betas: expected 2 values, got fewer"),
        (["--data.strict", "yes"], "no such argument: yes;"),
        (["--data.options", "a"], "--data.options: expected pairs of a name and a value;"),
        (["--stage.r1.weight", "-1"], "stage.r1: ApproximateR1: weight must be a finite number"),
    ],
)
def test_unknown_and_mistyped_fields(arguments: list[str], expected: str) -> None:
    assert expected in error_line(invoke("train", "digits_apt", *arguments))


def test_debug_shows_where_an_error_comes_from() -> None:
    result = invoke("train", "digit_apt", "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("error: unknown recipe")
