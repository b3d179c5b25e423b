"""What a checkpoint probably is that does not fit the model which it is loaded into."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from apt.errors import LISTED

Shapes = Mapping[str, tuple[int, ...]]
Marks = Mapping[str, Sequence[str]]
"""Names of families, each with fragments of keys that all occur in its files."""


def looks_like(keys: Collection[str], marks: Marks) -> str | None:
    """What a checkpoint with these keys probably is: a family of `marks`, or a known other kind."""
    for name, fragments in (*_ADAPTERS, *marks.items(), *_OTHERS):
        if fragments and all(any(fragment in key for key in keys) for fragment in fragments):
            return name
    return None


def advice(
    missing: list[str], unexpected: list[str], stored: Shapes, expected: Shapes, marks: Marks
) -> str:
    """What to do about a checkpoint that does not fit, in a sentence.

    Args:
        missing, unexpected: keys that only the model, or only the checkpoint has.
        stored, expected: shapes by key.
        marks: of the families that it may belong to.
    """
    for prefix in _WRAPPER_PREFIXES:
        if {key.removeprefix(prefix): shape for key, shape in stored.items()} == dict(expected):
            return f"It fits once the prefix {prefix!r} is taken off its keys."
    if not missing and not unexpected:
        return "The keys agree, so the config is of another size of the same model."
    family = looks_like(stored.keys(), marks)
    if family is not None and family != looks_like(expected.keys(), marks):
        return f"Its keys look like {family}; load it as that."
    pairs = [
        f"{key} (for {close[0]}?)"
        for key in unexpected[:LISTED]
        if (close := difflib.get_close_matches(key, missing[:2000], n=1, cutoff=0.8))
    ]
    if pairs:
        return f"Similar names: {', '.join(pairs)}."
    return f"It shares {len(expected.keys() & stored.keys())} of {len(expected)} keys with it."


_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "transformer.")
"""What wrapping a module adds to its keys."""

_ADAPTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoKr adapter, not a whole model", (".lokr_w",)),
    ("a LoHa adapter, not a whole model", (".hada_w",)),
    ("a LoRA, not a whole model", (".lora_A.",)),
    ("a LoRA of another naming, not a whole model", (".lora_down.",)),
    ("a LoRA of an old naming, not a whole model", ("lora.down.",)),
    ("differences from a model (a LoRA cut from a fine-tune), not a whole model", (".diff_b",)),
)
"""They change a model, and their keys have the marks of its family."""

_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlNet, which guides a model and is none itself", ("controlnet_blocks.",)),
    ("a ControlNet, which guides a model and is none itself", ("control_model.",)),
    ("an IP-Adapter, which adds to a model and is none itself", ("image_proj.", "to_k_ip")),
    ("an IP-Adapter, which adds to a model and is none itself", ("image_proj.", "ip_adapter.")),
    ("the module that makes a Wan a VACE, without the Wan", ("vace_blocks.",)),
    (
        "FLUX or another model of two kinds of blocks, which this package has no model of",
        ("double_blocks.", "single_blocks."),
    ),
    (
        "FLUX, which this package has no model of",
        ("single_transformer_blocks.", "transformer_blocks."),
    ),
    ("a T5 or UMT5 text encoder", ("shared.weight", "encoder.block.")),
    ("a T5 or UMT5 text encoder", ("encoder.block.", ".SelfAttention.")),
    ("a UMT5 text encoder in the layout of Wan's authors", ("token_embedding.", ".ffn.gate.")),
    ("a CLIP text encoder", ("text_model.encoder.layers.",)),
    ("a CLIP text encoder", ("transformer.resblocks.", "token_embedding.")),
    ("an image encoder (CLIP or SigLIP)", ("vision_model.encoder.",)),
    ("an image encoder (CLIP), as image-to-video models use it", ("visual.transformer.",)),
    ("an image or video autoencoder (VAE)", ("encoder.", "decoder.")),
    ("the decoder of an image or video autoencoder (VAE)", ("decoder.", "up_blocks.")),
    ("a U-Net such as Stable Diffusion 1.5 or XL", ("input_blocks.", "output_blocks.")),
    ("a U-Net such as Stable Diffusion 1.5 or XL", ("down_blocks.", "up_blocks.")),
)
"""Kinds of checkpoints that are no family of ours: each with fragments that all occur."""
