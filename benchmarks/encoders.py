"""Time the networks around Wan's transformer: the VAE's decoder and the text encoder.

They are built at full size from their configurations, with random weights: nothing is downloaded.
If diffusers or transformers is missing, they are skipped, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.bench.dit import created_in
from apt.bench.records import Measurement
from apt.bench.timing import Clock, Work, median, time_interleaved
from apt.checkpoints.external import import_hub_extra
from apt.errors import InputError
from benchmarks.training import peak_gb, reset_peak

PROMPT_TOKENS = 512

# google/umt5-xxl, which Wan uses; all other options are the class's defaults
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
TINY_UMT5 = UMT5_XXL | {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
}  # fmt: skip
WAN_VAE: Mapping[str, Any] = {}  # Wan 2.1's is the default of AutoencoderKLWan
TINY_VAE = {
    "base_dim": 3, "dim_mult": [1] * 4, "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}  # fmt: skip


def measure_vae(
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    device: torch.device,
    clock: Clock,
    config: Mapping[str, Any] = WAN_VAE,
) -> Measurement:
    """Measure decoding the latents of one clip, as the pipeline does after its one step."""
    size = f"{frames}x{height}x{width}"
    case = case_of("Wan 2.1 VAE decode", size, dtype)

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        diffusers = import_hub_extra("diffusers")
        with created_in(device, dtype):
            vae = diffusers.AutoencoderKLWan(**config).eval().requires_grad_(False)
        grid = ((frames - 1) // 4 + 1, height // 8, width // 8)
        latents = torch.randn(1, vae.config.z_dim, *grid, device=device).to(dtype)
        return vae, lambda: vae.decode(latents, return_dict=False)[0]

    return measure(case, build, (1, 3, frames, height, width), device, clock)


def measure_text(
    tokens: int,
    dtype: torch.dtype,
    *,
    device: torch.device,
    clock: Clock,
    config: Mapping[str, Any] = UMT5_XXL,
) -> Measurement:
    """Measure encoding one prompt of `tokens` tokens."""
    case = case_of("UMT5-XXL", f"{tokens} tokens", dtype)

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        transformers = import_hub_extra("transformers")
        with created_in(device, dtype):
            encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
        encoder.eval().requires_grad_(False)
        ids = torch.randint(2, config["vocab_size"], (1, tokens), device=device)
        return encoder, lambda: encoder(input_ids=ids).last_hidden_state

    return measure(case, build, (1, tokens, config["d_model"]), device, clock)


def measure(
    case: Mapping[str, str | int],
    build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]],
    shape: tuple[int, ...],
    device: torch.device,
    clock: Clock,
) -> Measurement:
    """Time a network that `build` creates; "skipped" if its package is missing."""
    try:
        network, run = build()
    except InputError as error:
        return Measurement(case=case, status="skipped", reason=str(error))
    reset_peak(device)
    with torch.no_grad():
        output = run()
        if tuple(output.shape) != shape:
            reason = f"the output is {tuple(output.shape)}, expected {shape}"
            return Measurement(case=case, status="wrong", reason=reason)
        samples = time_interleaved(
            {"run": Work(lambda _: run())}, clock, rounds=5, warmup=1, max_seconds=10
        )["run"].samples_ms
    metrics = {
        "parameters": float(sum(p.numel() for p in network.parameters())),
        "peak_gb": peak_gb(device),
    }
    if len(shape) == 5:
        metrics["frames_per_s"] = shape[2] / median(samples) * 1e3
    return Measurement(case=case, samples_ms=samples, metrics=metrics)


def case_of(part: str, size: str, dtype: torch.dtype) -> dict[str, str | int]:
    """Return the case as records hold it."""
    return {"part": part, "size": size, "dtype": str(dtype).removeprefix("torch.")}
