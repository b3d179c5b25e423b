"""`probe` and `traverse` as users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.save import save_bundle
from tests.cli.shell import invoke
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bundle(folder / "apt", tiny_bundle())
    save_bundle(folder / "diffusion", tiny_bundle("diffusion", SamplingInfo(num_steps=2)))
    return folder


def test_probe_writes_its_sheet_and_its_figures(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "probe"
    asked = ("--num-samples", "2", "--num-held-out", "1", "--prompt", "a bird", "a cat")
    result = invoke("probe", "--model", models / "apt", "--out", out, *asked)
    assert (result.returncode, result.stderr) == (0, "")
    figures = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert list(figures["error"]) == ["1", "2"] and figures["prompts"] == ["a bird", "a cat"]
    for name in ("layers.png", "errors.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    assert f"layer 2: error {figures['error']['2']:.4f}" in result.stdout


def test_a_model_that_was_previewed_with_nothing_needs_a_prompt(
    models: Path, tmp_path: Path
) -> None:
    result = invoke("probe", "--model", models / "apt", "--out", tmp_path / "probe")
    assert result.returncode == 2
    assert "pass prompts with --prompt" in result.stderr and result.stderr.count("\n") == 1
    none = invoke("probe", "--model", models / "apt", "--num-shown", "0", "--prompt", "a")
    assert "--num-shown must be at least 1, got 0" in none.stderr
    assert not (tmp_path / "probe").exists()


def test_traverse_shows_models_side_by_side(models: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    names = (models / "apt", models / "diffusion")
    out = tmp_path / "way"
    result = invoke(
        "traverse", "--prompt", "a bird", "--model", *names, "--out", out, "--num-between", "3"
    )
    assert (result.returncode, result.stderr) == (0, "")
    figures = json.loads((out / "traverse.json").read_text(encoding="utf-8"))
    assert list(figures["models"]) == [str(name) for name in names]
    assert all(len(model["steps"]) == 6 for model in figures["models"].values())
    with av.open(str(out / "traverse.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 7
    with Image.open(out / "traverse.png") as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model", "digits", "digits"), "each only once"),
        (("--out", __file__), "is a file"),
        (("--seeds", "1"), "two seeds"),
        (("--fps", "0"), "fps must be above 0"),
        (("--prompt", ""), "a prompt must be non-empty text"),
    ],
)
def test_bad_paths_are_one_line(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    where = () if "--out" in args else ("--out", str(tmp_path / "way"))
    result = invoke("traverse", "--prompt", "a bird", *where, *args)
    assert result.returncode == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
