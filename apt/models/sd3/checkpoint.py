"""Published checkpoints of SD3: configs of diffusers' SD3Transformer2DModel, keys of Stability AI's
own files, and registered sizes.

Keys of Stability AI's files are used without the prefix `model.diffusion_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apt.checkpoints.info import SampleInfo, SamplingInfo
from apt.checkpoints.layouts import FAMILIES, Family, KeyRule, diffusers_options, first_kind
from apt.errors import CheckpointError, ConfigError
from apt.models.architectures import MODELS, PretrainedEntry
from apt.models.sd3.model import FLOW, SD3Config
from apt.registry import replace_typed

CLASS_NAME = "SD3Transformer2DModel"

# Defaults of diffusers' class for values that a config leaves out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}


def config_from_diffusers(config: Mapping[str, Any]) -> SD3Config:
    """Return the config for a transformer's config.json.

    Raises CheckpointError for another class, or values that `SD3` does not support.
    """
    options = diffusers_options(config, CLASS_NAME, _DEFAULTS)
    try:
        ours = replace_typed(
            SD3Config(),
            {
                "in_channels": options["in_channels"],
                "depth": options["num_layers"],
                "num_heads": options["num_attention_heads"],
                "head_dim": options["attention_head_dim"],
                "patch_size": options["patch_size"],
                "text_dim": options["joint_attention_dim"],
                "pooled_dim": options["pooled_projection_dim"],
                "dual_attention_layers": options["dual_attention_layers"],
                "qk_norm": options["qk_norm"] is not None,
                "max_positions": options["pos_embed_max_size"],
                "sample_size": options["sample_size"],
            },
        )
    except ConfigError as error:
        raise CheckpointError(
            f"the config of {CLASS_NAME} cannot be built: {error}; download it again"
        ) from error
    # In diffusers, None means "the same".
    possible = {
        "caption_projection_dim": (ours.hidden_size,),
        "out_channels": (ours.in_channels, None),
        "qk_norm": ("rms_norm", None),
    }
    for key, values in possible.items():
        if options[key] not in values:
            expected = " or ".join(map(repr, values))
            raise CheckpointError(
                f"{key} is {options[key]!r} in this {CLASS_NAME}, expected {expected}; use a "
                "checkpoint of Stable Diffusion 3 or 3.5"
            )
    return ours


def config_to_diffusers(config: SD3Config) -> dict[str, Any]:
    """Return the config.json of a transformer."""
    return {
        "_class_name": CLASS_NAME,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_dim,
        "out_channels": config.in_channels,
        "pos_embed_max_size": config.max_positions,
        "dual_attention_layers": list(config.dual_attention_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def key_rules(config: SD3Config) -> Sequence[KeyRule]:
    """Return the rules that map the original layout to ours.

    Its modulation always has shift before scale. diffusers swaps them in two norms: that of the
    output, and that of the text in the last block.
    """
    last = config.depth - 1
    n, kind = r"(\d+)", r"(weight|bias)"
    image, text = rf"joint_blocks\.{n}\.x_block", rf"joint_blocks\.{n}\.context_block"
    block = r"transformer_blocks.\1"
    qkv = ("to_q", "to_k", "to_v")
    return (
        _rule("pos_embed", "pos_embed.pos_embed"),
        _rule(rf"x_embedder\.proj\.{kind}", r"pos_embed.proj.\1"),
        *(
            _rule(rf"{theirs}\.mlp\.{place}\.{kind}", rf"time_text_embed.{ours}.linear_{number}.\1")
            for theirs, ours in (
                ("t_embedder", "timestep_embedder"),
                ("y_embedder", "text_embedder"),
            )
            for place, number in ((0, 1), (2, 2))
        ),
        _rule(rf"context_embedder\.{kind}", r"context_embedder.\1"),
        # Image tokens
        _rule(rf"{image}\.adaLN_modulation\.1\.{kind}", rf"{block}.norm1.linear.\2"),
        *(
            rule
            for attn in ("attn", "attn2")
            for rule in (
                _rule(rf"{image}\.{attn}\.qkv\.{kind}", *(rf"{block}.{attn}.{p}.\2" for p in qkv)),
                _rule(rf"{image}\.{attn}\.ln_(q|k)\.weight", rf"{block}.{attn}.norm_\2.weight"),
                _rule(rf"{image}\.{attn}\.proj\.{kind}", rf"{block}.{attn}.to_out.0.\2"),
            )
        ),
        _rule(rf"{image}\.mlp\.fc1\.{kind}", rf"{block}.ff.net.0.proj.\2"),
        _rule(rf"{image}\.mlp\.fc2\.{kind}", rf"{block}.ff.net.2.\2"),
        # Text tokens
        _rule(
            rf"joint_blocks\.(?!{last}\.){n}\.context_block\.adaLN_modulation\.1\.{kind}",
            rf"{block}.norm1_context.linear.\2",
        ),
        _rule(
            rf"joint_blocks\.({last})\.context_block\.adaLN_modulation\.1\.{kind}",
            rf"{block}.norm1_context.linear.\2",
            swap_halves=True,
        ),
        _rule(
            rf"{text}\.attn\.qkv\.{kind}",
            *(rf"{block}.attn.add_{p}_proj.\2" for p in ("q", "k", "v")),
        ),
        _rule(rf"{text}\.attn\.ln_(q|k)\.weight", rf"{block}.attn.norm_added_\2.weight"),
        _rule(rf"{text}\.attn\.proj\.{kind}", rf"{block}.attn.to_add_out.\2"),
        _rule(rf"{text}\.mlp\.fc1\.{kind}", rf"{block}.ff_context.net.0.proj.\2"),
        _rule(rf"{text}\.mlp\.fc2\.{kind}", rf"{block}.ff_context.net.2.\2"),
        # Output
        _rule(
            rf"final_layer\.adaLN_modulation\.1\.{kind}", r"norm_out.linear.\1", swap_halves=True
        ),
        _rule(rf"final_layer\.linear\.{kind}", r"proj_out.\1"),
    )


def _rule(theirs: str, *ours: str, swap_halves: bool = False) -> KeyRule:
    return KeyRule(theirs=theirs, ours=ours, swap_halves=swap_halves)


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a ControlNet, which guides a model but is not one itself",
        ("controlnet_blocks.", "pos_embed_input."),
    ),
    (
        "an IP-Adapter, which adds to a model but is not one itself",
        ("to_k_ip", "ip_adapter.", "image_proj."),
    ),
    ("an SD3 with a context processor", ("context_processor.",)),
)
"""Checkpoints for SD3 other than plain text-to-image, with keys that only they have."""


def relative(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Name the kind of an SD3 that is not plain text-to-image, or None. See `Family.relative`."""
    return first_kind(shapes, _KINDS)


@FAMILIES.register("sd3")
def sd3() -> Family:
    """Stable Diffusion 3 and 3.5, text to image."""
    return Family(
        name="sd3",
        makes="text-to-image",
        adapter=FLOW,
        config_class=SD3Config,
        diffusers_class=CLASS_NAME,
        from_diffusers=config_from_diffusers,
        to_diffusers=config_to_diffusers,
        rules=key_rules,
        # Both layouts have both. FLUX has only the second, AuraFlow the first but not this bias.
        marks=("pos_embed", "context_embedder.bias"),
        anchors=("x_embedder.proj.weight", "pos_embed.proj.weight"),
        relative=relative,
        pipeline_class="StableDiffusion3Pipeline",
    )


def _stability(repo: str, num_steps: int, cfg_scale: float) -> PretrainedEntry:
    """Return an entry for weights of Stability AI; steps and guidance are from their page."""
    return PretrainedEntry(
        repo=repo,
        license="stabilityai-ai-community",
        source="Stability AI; arXiv 2403.03206",
        codec="sd3_vae",
        compression=(1, 8, 8),
        text_encoder="sd3",
        text_tokens=77 + 256,  # CLIP's and T5's
        gated=True,
        sample=SampleInfo(frames=1, height=1024, width=1024, fps=1),
        sampling=SamplingInfo(num_steps=num_steps, cfg_scale=cfg_scale, timestep_shift=3.0),
    )


@MODELS.register(
    "sd3.5_medium",
    pretrained={"stabilityai": _stability("stabilityai/stable-diffusion-3.5-medium", 40, 4.5)},
)
def sd3_5_medium() -> SD3Config:
    """Stable Diffusion 3.5 medium: 2.2 B parameters, images of up to 2 megapixels."""
    return SD3Config(
        depth=24, num_heads=24, dual_attention_layers=tuple(range(13)), max_positions=384
    )


@MODELS.register(
    "sd3.5_large",
    pretrained={"stabilityai": _stability("stabilityai/stable-diffusion-3.5-large", 28, 3.5)},
)
def sd3_5_large() -> SD3Config:
    """Stable Diffusion 3.5 large: 8.1 B parameters, images of 1 megapixel (APT Table 3)."""
    return SD3Config(depth=38, num_heads=38)
