"""The models that ship with the package."""

from __future__ import annotations

import pytest
import torch

from apt.checkpoints.info import CODEC_FILE
from apt.checkpoints.load import describe
from apt.checkpoints.source import list_pretrained, locate
from apt.pipeline import OneStepPipeline

SHIPPED: dict[str, tuple[str, int]] = {
    "digits": ("apt", 1),
    "digits-consistency": ("consistency", 1),
    "digits-diffusion": ("diffusion", 25),
}


CODECS = [name for name in list_pretrained() if name.endswith("-codec")]


def test_all_models_are_there_and_small() -> None:
    assert list_pretrained() == sorted([*SHIPPED, *CODECS])
    folders = [locate(name).folder for name in list_pretrained()]
    sizes = [file.stat().st_size for folder in folders for file in folder.iterdir()]
    assert max(sizes) <= 16 * 2**20 and sum(sizes) <= 32 * 2**20


def test_models_were_made_in_the_latents_of_the_codec_that_they_share() -> None:
    for codec in CODECS:
        shared = describe(codec)
        family = [name for name in SHIPPED if name.startswith(codec.removesuffix("-codec"))]
        for name in family:
            assert not (locate(name).folder / CODEC_FILE).exists(), "it would lie there twice"
            assert describe(name).codec.config == shared.codec.config


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_says_where_it_is_from(name: str) -> None:
    info = OneStepPipeline.from_pretrained(name, device="cpu").info
    assert (info.stage, info.sampling.num_steps) == SHIPPED[name]
    assert {"recipe", "seed", "updates"} <= info.training.keys()
    assert (info.sample.frames, info.sample.height, info.sample.width) == (9, 32, 32)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_paints_the_colour_it_is_asked_for(name: str) -> None:
    """The backgrounds are dark photographs, so the brightest pixels are the digit's."""
    pipeline = OneStepPipeline.from_pretrained(name, device="cpu")
    prompts = ["a red seven moving left", "a green three moving up", "a blue zero moving right"]
    videos = pipeline(prompts, seed=1, batch_size=3, num_steps=min(SHIPPED[name][1], 5))
    for channel, video in enumerate(videos):
        pixels = video.reshape(-1, 3).float()
        brightest = pixels[pixels.amax(dim=1).topk(200).indices].mean(dim=0)
        assert int(torch.argmax(brightest)) == channel
