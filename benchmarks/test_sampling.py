"""Time a digits video: one step, two steps, and 25 with guidance. `make bench` runs it.

Times do not depend on the weights, so the models here are untrained. Each result is checked before
it is timed. pytest-benchmark's extra info has the device.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from apt.condition import Condition
from apt.flow import SamplerName, bind, bind_guided, one_step_sample, sample, sampling_timesteps
from apt.models import create_codec, create_model, create_text_encoder
from apt.rng import Draw, sample_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("num_steps", "cfg_scale"), [(1, 1.0), (2, 1.0), (25, 1.5)], ids=["1", "2", "25-guided"]
)
@torch.inference_mode()
def test_digits_video(benchmark: BenchmarkFixture, num_steps: int, cfg_scale: float) -> None:
    with torch.device(DEVICE):
        backbone = create_model("mmdit_digits")
        encoder = create_text_encoder("bytes")
    codec = create_codec("patchify", lapped=True)
    shape = (codec.channels, *codec.latent_shape(9, 32, 32))
    condition = Condition(encoder(["a red seven moving left"]))
    negative = Condition(encoder([""]))
    grid = sampling_timesteps(num_steps)
    sampler: SamplerName = "consistency" if cfg_scale == 1 else "euler"

    def noise(step: int) -> torch.Tensor:
        return sample_noise(1, shape, Draw(0, step, stream="bench", device=DEVICE))

    def generate() -> torch.Tensor:
        predict = bind_guided(backbone, condition, negative, cfg_scale)
        pixels = codec.decode(sample(predict, noise(0), grid, sampler=sampler, noise=noise))
        return pixels.cpu()  # waits for the device

    pixels = generate()
    assert pixels.shape == (1, 3, 9, 32, 32)
    assert pixels.isfinite().all()
    if num_steps == 1:
        expected = codec.decode(one_step_sample(bind(backbone, condition), noise(0))).cpu()
        torch.testing.assert_close(pixels, expected)
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark(generate)
