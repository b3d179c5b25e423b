"""What files say of how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")

import av
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.checkpoints.save import save_bundle
from apt.checkpoints.source import weights_digest
from apt.errors import InputError
from apt.media import SUFFIXES, read_tags, write_contact_sheet, write_media
from apt.pipeline import OneStepPipeline
from apt.version import __version__
from tests.cli.shell import error_line, invoke
from tests.tiny import tiny_bundle

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
PROMPT = 'eine rote Sieben – 七 移动 🎬, "quoted"; a=b\\c\nand a second line\t'


def tags_of(path: Path, tags: dict[str, Any]) -> dict[str, Any]:
    return read_tags(write_media(path, FRAMES, fps=8, scale=1, tags=tags))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_they_come_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    tags = {"prompt": PROMPT, "seed": 2**63 - 1, "model": {"name": "x"}, "settings": {"cfg": 1.5}}
    assert tags_of(tmp_path / f"a{suffix}", tags) == tags


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(prompt=st.text(max_size=300))
@settings(max_examples=12, deadline=None)
def test_every_text_does(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, prompt: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"drawn{suffix}"
    assert tags_of(path, {"prompt": prompt, "seed": 0}) == {"prompt": prompt, "seed": 0}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_ones_do_too(tmp_path: Path, suffix: str) -> None:
    tags = {"prompt": "長" * 3000, "seed": 0}
    assert tags_of(tmp_path / f"a{suffix}", tags) == tags


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pixels_are_the_same_with_them(tmp_path: Path, suffix: str) -> None:
    without = write_media(tmp_path / f"a{suffix}", FRAMES, fps=8)
    tagged = write_media(tmp_path / f"b{suffix}", FRAMES, fps=8, tags={"prompt": PROMPT})
    assert np.array_equal(pixels(without), pixels(tagged))


def pixels(path: Path) -> np.ndarray:
    if path.suffix in (".mp4", ".mkv"):
        with av.open(str(path)) as container:
            return np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            )
    with Image.open(path) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames)


def test_other_programs_see_the_prompt_as_the_title(tmp_path: Path) -> None:
    video = write_media(tmp_path / "a.mp4", FRAMES, fps=8, tags={"prompt": "七 moves\nleft"})
    with av.open(str(video)) as container:
        assert container.metadata["title"] == "七 moves left"
    picture = write_media(tmp_path / "a.png", FRAMES, fps=8, tags={"prompt": "七"})
    with Image.open(picture) as image:
        assert image.info["Title"] == "七"
        assert json.loads(image.info["Comment"])["diffusion-apt"]["prompt"] == "七"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_them_says_so(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match="does not say how it was made"):
        read_tags(write_media(tmp_path / f"a{suffix}", FRAMES, fps=8))


@pytest.mark.parametrize("comment", ["{", "[1]", '{"diffusion-apt": 1}', "[" * 100_000, "hello"])
def test_what_others_wrote_in_their_place_is_no_traceback(tmp_path: Path, comment: str) -> None:
    text = Image.new("RGB", (4, 4))
    text.save(tmp_path / "a.gif", comment=comment.encode())
    with pytest.raises(InputError, match="does not say how it was made"):
        read_tags(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.webp", "a.gif", "a.txt", "missing.png"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"\x00junk" * 8)
    with pytest.raises(InputError, match="cannot read"):
        read_tags(tmp_path / name)


def test_a_video_without_its_end_is_one_line(tmp_path: Path) -> None:
    video = write_media(tmp_path / "a.mp4", FRAMES, fps=8)
    content = video.read_bytes()
    # What is left by a writer that was killed: no index.
    video.write_bytes(content[: content.index(b"moov") - 4])
    with pytest.raises(InputError, match="cannot read"):
        read_tags(video)


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_json_does_not_hold_is_refused_and_nothing_written(
    tmp_path: Path, suffix: str, value: object
) -> None:
    with pytest.raises(InputError, match="tags must be JSON values"):
        write_media(tmp_path / f"a{suffix}", FRAMES, fps=8, tags={"value": value})
    assert not list(tmp_path.iterdir())


def test_a_sheet_has_all_prompts(tmp_path: Path) -> None:
    tags = {"prompt": ["a", "b"], "seed": [0]}
    cells = [[FRAMES], [FRAMES]]
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, cells, rows=["a", "b"], columns=["seed 0"], tags=tags)
    assert read_tags(path) == tags


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("secret") / "folder", tiny_bundle())


def test_generate_writes_them_and_the_command_reads_them(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    options = ["--seed", "3", "4", "--num-steps", "2", "--fps", "5", "--frames", "5"]
    command = ["generate", "--model", model, "--prompt", "a red seven", "--out", out, *options]
    done = invoke(*command, "--contact-sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    tags = read_tags(tmp_path / "a-seed4.png")
    assert (tags["prompt"], tags["seed"]) == ("a red seven", 4)
    assert tags["model"] == {
        "name": "none",  # the recipe of its record
        "revision": None,
        "weights": weights_digest(model),
        "stage": "apt",
    }
    wanted = {"num_steps": 2, "fps": 5, "frames": 5, "height": 32, "dtype": "float32"}
    assert tags["settings"].items() >= wanted.items()
    assert tags["software"] == f"diffusion-apt {__version__}"
    sheet = read_tags(tmp_path / "sheet.png")
    assert (sheet["prompt"], sheet["seed"]) == (["a red seven"], [3, 4])
    read = invoke("tags", tmp_path / "a-seed4.png")
    assert json.loads(read.stdout) == {"file": str(tmp_path / "a-seed4.png"), **tags}
    for file in tmp_path.glob("*.png"):
        content = file.read_bytes()
        assert b"secret" not in content and str(tmp_path).encode() not in content


def test_generate_can_leave_them_out(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    command = ["generate", "--model", model, "--prompt", "a", "--out", out, "--no-tags"]
    assert invoke(*command).returncode == 0
    assert "does not say how it was made" in error_line(invoke("tags", out))


def test_a_pipelines_tags_make_the_same_video_again(model: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(model)
    tags = pipeline.tags("a", seed=5, num_steps=3, guidance_scale=2.0)
    settings = tags["settings"]
    again = {name: settings[name] for name in ("timesteps", "sampler", "cfg_scale", "frames")}
    first = pipeline("a", seed=5, num_steps=3, guidance_scale=2.0)
    assert bool((first == pipeline(tags["prompt"], seed=tags["seed"], **again)).all())
    with pytest.raises(InputError, match="num_steps must be"):
        pipeline.tags("a", num_steps=0)


def test_a_built_in_model_goes_by_its_name() -> None:
    origin = OneStepPipeline.from_pretrained("digits", device="cpu").tags("a")["model"]
    assert origin["name"] == "digits" and origin["weights"].startswith("sha256:")
    assert OneStepPipeline(tiny_bundle()).tags("a")["model"]["name"] == "mmdit_digits"
