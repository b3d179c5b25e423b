"""A whole Stable Diffusion 3.5, tiny and random, as diffusers' own objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny_tokenizers import clip_tokenizer, unigram_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TEXT_DIM, POOLED_DIM, CHANNELS = 40, 14, 16
PROMPTS = ["a red seven moving left", "a blue four", "", "a " + "very " * 30 + "long prompt"]


def tiny_transformer(**options: Any) -> Any:
    """diffusers' class; no layer is at its initial values."""
    shape: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED_DIM,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    model = diffusers.SD3Transformer2DModel(**{**shape, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def tiny_pipeline() -> Any:
    """Everything that `StableDiffusion3Pipeline` needs; the two CLIPs differ in all they can."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizers = [
            clip_tokenizer(model_max_length=77),
            clip_tokenizer(model_max_length=77, pad_token="!"),
        ]
        clips = [
            transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=32,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    max_position_embeddings=77,
                    projection_dim=pooled,
                    hidden_act=activation,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
            for tokenizer, width, pooled, activation in zip(
                tokenizers, (12, 20), (6, 8), ("quick_gelu", "gelu"), strict=True
            )
        ]
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=80, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2
            )
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 8),
            norm_num_groups=2,
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=CHANNELS,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clips[0].eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1].eval(),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5.eval(),
        tokenizer_3=unigram_tokenizer(PROMPTS),
    )
