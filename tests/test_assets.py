"""The models that ship with the package."""

from __future__ import annotations

import pytest
import torch

from apt.checkpoints.source import list_pretrained, locate
from apt.pipeline import OneStepPipeline

SHIPPED: dict[str, tuple[str, int]] = {
    "digits": ("apt", 1),
    "digits-diffusion": ("diffusion", 25),
}


def test_both_models_are_there() -> None:
    assert list_pretrained() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_and_says_where_it_is_from(name: str) -> None:
    assert sum(file.stat().st_size for file in locate(name).folder.iterdir()) <= 16 * 2**20
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
