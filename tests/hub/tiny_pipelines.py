"""Whole pipelines of diffusers on disk, tiny and random, as the Hub has the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

from tests.models.test_text_transformers import PROMPTS, WIDTH, t5_model
from tests.models.test_wan_pipeline import tiny_vae
from tests.models.tiny_sd3 import tiny_pipeline
from tests.models.tiny_tokenizers import unigram_tokenizer
from tests.models.wan_nets import tiny_peer

PROMPT = "a red seven moving left"


def wan_folder(folder: Path, *, two_experts: bool = False, **transformer: Any) -> Path:
    """A Wan 2.1 pipeline, or one of two experts like Wan 2.2 A14B, with a sharded transformer.

    Its scheduler is the Hub's, not the one that a single step needs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": WIDTH,
            # Enough positions for the videos that the real model is made for.
            "rope_max_seq_len": 128,
            **transformer,
        }
        pipeline = diffusers.WanPipeline(
            tokenizer=unigram_tokenizer(PROMPTS),
            text_encoder=t5_model("UMT5").eval(),
            vae=tiny_vae(16),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                num_train_timesteps=1000,
                flow_shift=5.0,
            ),
            transformer=tiny_peer(**size),
            transformer_2=tiny_peer(seed=1, **size) if two_experts else None,
            boundary_ratio=0.875 if two_experts else None,
        )
    pipeline.save_pretrained(folder)
    for name in ("transformer", "transformer_2")[: 1 + two_experts]:
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        getattr(pipeline, name).save_pretrained(folder / name, max_shard_size="40KB")
    return folder


def sd3_folder(folder: Path) -> Path:
    """A Stable Diffusion 3.5 pipeline."""
    tiny_pipeline().save_pretrained(folder)
    return folder
