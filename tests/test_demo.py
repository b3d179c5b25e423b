"""`make demo` from end to end, with small untrained models in place of the shipped ones."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
from PIL import Image

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.save import save_bundle
from tests.tiny import tiny_bundle

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


def run_demo(monkeypatch: pytest.MonkeyPatch, *args: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(DEMO), run_name="__main__")
    return stopped.value.code


def test_demo_writes_all_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bundle(tmp_path / "apt", tiny_bundle())
    sampling = SamplingInfo(num_steps=3, cfg_scale=2.0)
    save_bundle(tmp_path / "diffusion", tiny_bundle("diffusion", sampling))
    save_bundle(tmp_path / "consistency", tiny_bundle("consistency"))
    out, picture = tmp_path / "demo", tmp_path / "demo.webp"
    names = {"model": "apt", "diffusion": "diffusion", "consistency": "consistency"}
    models = [part for name, run in names.items() for part in (f"--{name}", str(tmp_path / run))]
    assert run_demo(monkeypatch, "--out", str(out), "--picture", str(picture), *models) == 0

    prompts = runpy.run_path(str(DEMO))["PROMPTS"]
    samplers = ("consistency_1_step", "apt_1_step", "apt_2_steps", "diffusion_3_steps")
    for sampler in samplers:
        videos = sorted((out / sampler).iterdir())
        assert [video.stem.replace("_", " ") for video in videos] == sorted(prompts)
        with av.open(str(videos[0])) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height > 400
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<video") == 4 * len(prompts)
    with Image.open(picture) as moving:
        assert moving.n_frames == 9
        assert moving.width > moving.height > 3 * 4 * 32
    printed = capsys.readouterr().out
    for text in ("1 step", "2 steps", "3 steps", "median", "ratio", "1.0×", str(out)):
        assert text in printed


def test_demo_without_its_models_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert run_demo(monkeypatch, "--out", str(tmp_path / "demo"), "--model", missing) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no model") and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()
