"""Two runs against each other, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apt.errors import DataError, InputError, MissingPackageError
from apt.evaluate.compare import FIDELITIES, compare
from apt.evaluate.video_measures import read_video
from apt.metrics.fidelity import psnr
from tests.cli.shell import error_line, invoke
from tests.study.folders import KEYS, PROMPTS, write_samples


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images: a run, the same again, and one in which one sample is a little darker."""
    root = tmp_path_factory.mktemp("runs")
    made = {
        name: write_samples(root / name, suffix=".png").folder for name in ("a", "same", "near")
    }
    first = made["near"] / "0.png"
    pixels = np.array(Image.open(first))
    Image.fromarray(np.maximum(pixels, 2) - 2).save(first)
    made["video"] = write_samples(root / "video", KEYS[:2]).folder
    made["other"] = write_samples(root / "other", KEYS[:2], look=1).folder
    return made


def test_equal_runs(folders: dict[str, Path]) -> None:
    found = compare(folders["a"], folders["same"], limits={"psnr": 60, "ssim": 1.0})
    assert found.figures == {"psnr": [float("inf")] * 6, "ssim": [1.0] * 6}
    assert found.failed == []


def test_the_worst_pair_decides(folders: dict[str, Path]) -> None:
    done: list[tuple[int, int]] = []
    found = compare(
        folders["a"],
        folders["near"],
        limits={"psnr": 43.0, "ssim": 0.99},
        progress=lambda *now: done.append(now),
    )
    assert done[-1] == (6, 6)
    pair, worst = found.worst("psnr")
    assert pair == f"{PROMPTS[0]!r} seed 0"
    expected = psnr(read_video(folders["a"] / "0.png"), read_video(folders["near"] / "0.png"))
    assert worst == expected == pytest.approx(42.1, abs=0.2)
    assert found.failed == ["psnr"]
    assert "limit 43: MISSED" in found.render() and "limit 0.99: met" in found.render()


def test_videos_and_single_files(folders: dict[str, Path]) -> None:
    found = compare(folders["video"], folders["other"], measures=["psnr"])
    single = compare(folders["video"] / "0.mp4", folders["other"] / "0.mp4", measures=["psnr"])
    assert single.figures["psnr"] == [found.figures["psnr"][0]]
    assert read_video(folders["video"] / "0.mp4").shape == (5, 32, 32, 3)
    assert 5 < single.figures["psnr"][0] < 12


def test_what_does_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 samples are in only one of"):
        compare(folders["a"], folders["video"])
    with pytest.raises(InputError, match="two files, or two folders"):
        compare(folders["a"], folders["a"] / "0.png")
    with pytest.raises(DataError, match="no manifest of samples"):
        compare(folders["a"], tmp_path)
    with pytest.raises(InputError, match=r"unknown measures \['lpips'\]; choose from psnr"):
        compare(folders["a"], folders["same"], measures=["lpips"])
    with pytest.raises(InputError, match="must be finite numbers, got nan for psnr"):
        compare(folders["a"], folders["same"], limits={"psnr": float("nan")})
    with pytest.raises(InputError, match="cannot be compared"):
        compare(folders["a"] / "0.png", folders["video"] / "0.mp4")


@pytest.mark.parametrize(
    ("name", "package", "equal"),
    [("flip", "flip_evaluator", 0.0), ("cvvdp", "pycvvdp", 10.0)],
)
def test_measures_of_the_extra(
    folders: dict[str, Path], name: str, package: str, equal: float
) -> None:
    try:
        __import__(package)
    except (ImportError, RuntimeError):
        with pytest.raises(MissingPackageError, match=r"pip install diffusion-apt\[eval\]"):
            compare(folders["a"], folders["same"], measures=[name])
        return
    same = compare(folders["a"] / "0.png", folders["same"] / "0.png", measures=[name])
    near = compare(folders["a"] / "0.png", folders["near"] / "0.png", measures=[name])
    video = compare(folders["video"] / "0.mp4", folders["other"] / "0.mp4", measures=[name])
    figures = [found.figures[name][0] for found in (same, near, video)]
    assert figures[0] == pytest.approx(equal, abs=1e-3)
    assert figures == sorted(figures, reverse=FIDELITIES[name].higher_is_better)
    assert len(set(figures)) == 3


class TestCommand:
    def test_exit_code_and_figures(self, folders: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "figures.json"
        arguments = ("compare", folders["a"], folders["near"], "--min-psnr", "43", "--out", out)
        result = invoke(*arguments)
        assert result.returncode == 1, result.stderr
        assert "MISSED" in result.stdout
        document = json.loads(out.read_text())
        assert document["measures"]["psnr"]["met"] is False
        assert document["measures"]["psnr"]["figures"][1:] == [None] * 5
        assert len(document["pairs"]) == 6
        passed = invoke("compare", folders["a"], folders["same"], "--min-psnr", "60")
        assert passed.returncode == 0 and "PSNR (dB): mean inf" in passed.stdout

    def test_bad_input_is_one_line(self, folders: dict[str, Path], tmp_path: Path) -> None:
        assert "two folders" in error_line(invoke("compare", folders["a"], folders["a"] / "0.png"))
        out = tmp_path / "file" / "x.json"
        out.parent.write_text("")
        line = error_line(invoke("compare", folders["a"], folders["same"], "--out", out))
        assert "is a file" in line
