"""Published checkpoints of Wan: configs of diffusers' WanTransformer3DModel, keys of Wan's own
files, and registered sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from apt.checkpoints.info import SampleInfo, SamplingInfo
from apt.checkpoints.layouts import FAMILIES, Family, KeyRule, diffusers_options, first_kind
from apt.errors import CheckpointError, ConfigError
from apt.models.architectures import MODELS, PretrainedEntry
from apt.models.wan.model import FLOW, WanConfig
from apt.registry import replace_typed

CLASS_NAME = "WanTransformer3DModel"

# Defaults of diffusers' class for values that a config leaves out.
_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}

# Options of which `Wan` supports only the default, and what other values mean.
_FIXED: dict[str, str] = {
    "image_dim": "image-to-video with an image encoder",
    "added_kv_proj_dim": "image-to-video with an image encoder",
    "pos_embed_seq_len": "video between two given frames",
    "cross_attn_norm": "no norm before the cross-attention",
    "qk_norm": "another norm of queries and keys",
}


def config_from_diffusers(config: Mapping[str, Any]) -> WanConfig:
    """Return the config for a transformer's config.json.

    Raises CheckpointError for another class, or a Wan that is not plain text-to-video.
    """
    options = diffusers_options(config, CLASS_NAME, _DEFAULTS)
    for key, meaning in _FIXED.items():
        if options[key] != _DEFAULTS[key]:
            raise CheckpointError(
                f"{key} is {options[key]!r} in this Wan ({meaning}), expected {_DEFAULTS[key]!r}; "
                "use a text-to-video checkpoint"
            )
    # In diffusers, 0 and None mean "the same".
    if (options["out_channels"] or options["in_channels"]) != options["in_channels"]:
        raise CheckpointError(
            f"this Wan reads {options['in_channels']} channels and writes "
            f"{options['out_channels']}, so it is conditioned on latents; use a text-to-video "
            "checkpoint"
        )
    try:
        return replace_typed(
            WanConfig(),
            {
                "in_channels": options["in_channels"],
                "hidden_size": options["num_attention_heads"] * options["attention_head_dim"],
                "depth": options["num_layers"],
                "num_heads": options["num_attention_heads"],
                "mlp_size": options["ffn_dim"],
                "patch_size": options["patch_size"],
                "text_dim": options["text_dim"],
                "time_dim": options["freq_dim"],
                "max_positions": options["rope_max_seq_len"],
                "norm_eps": options["eps"],
            },
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"the config of {CLASS_NAME} cannot be built: {error}; download it again"
        ) from error


def config_to_diffusers(config: WanConfig) -> dict[str, Any]:
    """Return a transformer's config.json. `text_length` is an argument of diffusers' pipeline."""
    return {
        "_class_name": CLASS_NAME,
        **_DEFAULTS,
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.time_dim,
        "ffn_dim": config.mlp_size,
        "num_layers": config.depth,
        "eps": config.norm_eps,
        "rope_max_seq_len": config.max_positions,
    }


def _rule(theirs: str, ours: str) -> KeyRule:
    return KeyRule(theirs=theirs, ours=(ours,))


def _attention_rules(theirs: str, ours: str) -> list[KeyRule]:
    block = rf"blocks\.(\d+)\.{theirs}"
    return [
        _rule(rf"{block}\.([qkv])\.(weight|bias)", rf"blocks.\1.{ours}.to_\2.\3"),
        _rule(rf"{block}\.o\.(weight|bias)", rf"blocks.\1.{ours}.to_out.0.\2"),
        _rule(rf"{block}\.norm_([qk])\.weight", rf"blocks.\1.{ours}.norm_\2.weight"),
    ]


RULES: tuple[KeyRule, ...] = (
    _rule(r"patch_embedding\.(weight|bias)", r"patch_embedding.\1"),
    _rule(r"text_embedding\.0\.(weight|bias)", r"condition_embedder.text_embedder.linear_1.\1"),
    _rule(r"text_embedding\.2\.(weight|bias)", r"condition_embedder.text_embedder.linear_2.\1"),
    _rule(r"time_embedding\.0\.(weight|bias)", r"condition_embedder.time_embedder.linear_1.\1"),
    _rule(r"time_embedding\.2\.(weight|bias)", r"condition_embedder.time_embedder.linear_2.\1"),
    _rule(r"time_projection\.1\.(weight|bias)", r"condition_embedder.time_proj.\1"),
    _rule(r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    *_attention_rules("self_attn", "attn1"),
    *_attention_rules("cross_attn", "attn2"),
    # The authors' norm3 is diffusers' norm2, which numbers norms in order of use; the other norms
    # have no weights.
    _rule(r"blocks\.(\d+)\.norm3\.(weight|bias)", r"blocks.\1.norm2.\2"),
    _rule(r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"blocks.\1.ffn.net.0.proj.\2"),
    _rule(r"blocks\.(\d+)\.ffn\.2\.(weight|bias)", r"blocks.\1.ffn.net.2.\2"),
    _rule(r"head\.head\.(weight|bias)", r"proj_out.\1"),
    _rule(r"head\.modulation", r"scale_shift_table"),
)
"""Maps the layout of Wan's own repositories, which ComfyUI's files also use, after a prefix."""


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a VACE (control and editing by videos)", ("vace_blocks.", "vace_patch_embedding")),
    ("an Animate (a character moved by a video)", ("face_adapter.", "pose_patch_embedding")),
    ("a speech-to-video model (S2V)", ("casual_audio_encoder.", "audio_injector.")),
    ("a HuMo (video from text, image and sound)", ("audio_cross_attn_wrapper", "audio_proj_glob")),
    ("a MultiTalk or InfiniteTalk (video from sound)", ("audio_cross_attn", "audio_proj.")),
    ("a SCAIL (a character moved by poses)", ("patch_embedding_pose", "patch_embedding_mask")),
    ("a WanDancer (dance from music)", ("patch_embedding_global", "music_projection")),
    ("a Fun model with camera control", ("control_adapter.",)),
    ("a ReCamMaster (a video seen by another camera)", (".cam_encoder.",)),
    ("a Fun Control model (video by control videos)", ("ref_conv.",)),
    ("a SkyReels with a noise level for each frame", ("fps_embedding.", "fps_projection.")),
    ("a Wan with trained sparse attention (VSA)", ("to_gate_compress",)),
    (
        "video between a first and a last frame (FLF2V), with an image encoder",
        ("img_emb.emb_pos", "image_embedder.pos_embed"),
    ),
    (
        "image-to-video (I2V), with an image encoder",
        (
            "img_emb.",
            ".k_img",
            ".v_img",
            ".norm_k_img",
            "image_embedder.",
            ".add_k_proj",
            ".add_v_proj",
            ".norm_added_k",
        ),
    ),
    ("for the second, low-noise transformer", ("transformer_2.",)),
)
"""Wans that are not plain text-to-video, with keys that only they have; the first match counts."""

_CHANNELS = {
    20: "SCAIL",
    32: "image-to-video or Fun with camera control",
    33: "image-to-video",
    36: "image-to-video (I2V) or inpainting, such as Wan 2.2 I2V A14B and Fun-InP",
    48: "Fun Control",
    52: "Fun Control with a reference image, such as Wan 2.2",
    100: "Fun Control with a camera",
}
"""Models that read further latents besides the noisy ones, by total channels; noise has 16."""


def relative(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Name the kind of a Wan that is not plain text-to-video, or None. See `Family.relative`."""
    kind = first_kind(shapes, _KINDS)
    entry = shapes.get("patch_embedding.weight", ())
    end = shapes.get("head.head.weight", shapes.get("proj_out.weight", ()))
    if kind is not None or len(entry) != 5 or not end:
        return kind
    read, written = entry[1], end[0] // math.prod(entry[2:])
    if read == written:
        return None
    known = _CHANNELS.get(read, "of an unknown kind") if written == 16 else "of an unknown kind"
    return f"{known}: it reads {read} channels and writes {written}"


@FAMILIES.register("wan")
def wan() -> Family:
    """Wan 2.1 and 2.2, text to video."""
    return Family(
        name="wan",
        makes="text-to-video",
        adapter=FLOW,
        config_class=WanConfig,
        diffusers_class=CLASS_NAME,
        from_diffusers=config_from_diffusers,
        to_diffusers=config_to_diffusers,
        rules=RULES,
        marks=("patch_embedding.", ".norm_k.", ".ffn."),
        anchors=("patch_embedding.weight",),
        relative=relative,
        pipeline_class="WanPipeline",
    )


NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The fixed negative prompt that Wan's authors sample with, and that distillation uses."""


def _published(
    repo: str, sample: SampleInfo, sampling: SamplingInfo, **options: Any
) -> PretrainedEntry:
    parts = {"codec": "wan_vae", "compression": (4, 8, 8)}
    return PretrainedEntry(
        repo=repo,
        license="Apache-2.0",
        source="Wan team, arXiv 2503.20314",
        text_encoder="umt5",
        text_tokens=512,
        sample=sample,
        sampling=sampling,
        **{**parts, **options},
    )


# The authors' sampling settings: from their configs, and from diffusers' page on Wan for the shift
# at 480p.
_480P = SampleInfo(frames=81, height=480, width=832, fps=16)
_720P = SampleInfo(frames=81, height=720, width=1280, fps=16)
_SAMPLING = SamplingInfo(
    num_steps=50, cfg_scale=5.0, timestep_shift=3.0, negative_prompt=NEGATIVE_PROMPT
)
_SAMPLING_720P = dataclasses.replace(_SAMPLING, timestep_shift=5.0)
_SAMPLING_A14B = dataclasses.replace(_SAMPLING, num_steps=40, cfg_scale=4.0, timestep_shift=12.0)
_BOUNDARY_A14B = 0.875


@MODELS.register(
    "wan2.1_t2v_1.3b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _480P, _SAMPLING)},
)
def wan21_t2v_1_3b() -> WanConfig:
    """Wan 2.1 text to video, 1.42 B parameters: 480p, 16 fps."""
    return WanConfig()


@MODELS.register(
    "wan2.1_t2v_14b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-14B-Diffusers", _720P, _SAMPLING_720P)},
)
def wan21_t2v_14b() -> WanConfig:
    """Wan 2.1 text to video, 14.3 B parameters: 480p and 720p, 16 fps."""
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)


@MODELS.register(
    "wan2.2_ti2v_5b",
    pretrained={
        "official": _published(
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            SampleInfo(frames=121, height=704, width=1280, fps=24),
            _SAMPLING_720P,
            codec="wan2.2_vae",
            compression=(4, 16, 16),
            note="text to video; starting from a given first frame needs timesteps per token",
        )
    },
)
def wan22_ti2v_5b() -> WanConfig:
    """Wan 2.2 text (and image) to video, 5.00 B parameters: 720p, 24 fps, 16x16x4 VAE.

    Text to video uses one timestep per sample; image to video uses one per token, which is 0 for
    the tokens of the given first frame.
    """
    return WanConfig(in_channels=48, hidden_size=3072, depth=30, num_heads=24, mlp_size=14336)


@MODELS.register(
    "wan2.2_t2v_a14b",
    pretrained={
        "high_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            _SAMPLING_A14B,
            lowest_t=_BOUNDARY_A14B,
            note="the expert for t from 0.875 to 1, which one-step generation needs",
        ),
        "low_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            dataclasses.replace(_SAMPLING_A14B, cfg_scale=3.0),
            subfolder="transformer_2",
            note="the expert for t below 0.875, which was never trained on pure noise",
        ),
    },
)
def wan22_t2v_a14b() -> WanConfig:
    """Wan 2.2 text to video, 14.3 B parameters: the high-noise expert of two.

    Wan 2.2 A14B has one expert for t >= 0.875 and another below. A single step starts at t = 1, so
    the generator uses only the high-noise expert, and exports have no second transformer. As a
    teacher, trust it only for t >= 0.875.
    """
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)
