"""VAE and text encoder: rehearsals with tiny ones, and the sizes of real ones."""

from __future__ import annotations

import sys

import pytest
import torch

from apt.bench.timing import HostClock
from benchmarks.encoders import TINY_UMT5, TINY_VAE, UMT5_XXL, WAN_VAE, measure_text, measure_vae

CPU = torch.device("cpu")


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_without_the_package_it_is_skipped_with_the_reason(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "diffusers":
        found = measure_vae(5, 16, 24, torch.bfloat16, device=CPU, clock=HostClock())
    else:
        found = measure_text(7, torch.bfloat16, device=CPU, clock=HostClock())
    assert found.status == "skipped"
    assert package in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiny_ones_run_in_their_type(dtype):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    clock = HostClock()
    vae = measure_vae(5, 16, 24, dtype, device=CPU, clock=clock, config=TINY_VAE)
    text = measure_text(7, dtype, device=CPU, clock=clock, config=TINY_UMT5)
    assert (vae.status, text.status) == ("measured", "measured"), (vae.reason, text.reason)
    assert vae.metrics["frames_per_s"] > 0


@pytest.mark.slow
def test_full_sizes_are_those_of_the_published_models():
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(**WAN_VAE)
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5_XXL))
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert sum(p.numel() for p in text.parameters()) == 5_680_910_336
