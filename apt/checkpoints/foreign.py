"""Guesses at what a checkpoint is that does not fit the model it is loaded into, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from apt.errors import LISTED

Shapes = Mapping[str, tuple[int, ...]]
Marks = Mapping[str, Sequence[str]]
"""Families by name, each with fragments of keys that all occur in its files."""


def looks_like(keys: Collection[str], marks: Marks) -> str | None:
    """Guess what a checkpoint with these keys is: a family of `marks`, or another known kind."""
    for name, fragments in (*_ADAPTERS, *marks.items(), *_OTHERS):
        if fragments and all(any(fragment in key for key in keys) for fragment in fragments):
            return name
    return None


def advice(
    missing: list[str], unexpected: list[str], stored: Shapes, expected: Shapes, marks: Marks
) -> str:
    """Return a sentence about what to do with a checkpoint that does not fit.

    Args:
        missing, unexpected: keys that only the model has, and keys that only the checkpoint has.
        stored, expected: shapes by key.
        marks: marks of the families that it may belong to.
    """
    for prefix in _WRAPPER_PREFIXES:
        if {key.removeprefix(prefix): shape for key, shape in stored.items()} == dict(expected):
            return f"It fits if you remove the prefix {prefix!r} from its keys."
    if not missing and not unexpected:
        return "The keys match, so the config is for another size of the same model."
    family = looks_like(stored.keys(), marks)
    if family is not None and family != looks_like(expected.keys(), marks):
        return f"Its keys look like {family}; load it as such."
    pairs = [
        f"{key} (for {close[0]}?)"
        for key in unexpected[:LISTED]
        if (close := difflib.get_close_matches(key, missing[:2000], n=1, cutoff=0.8))
    ]
    if pairs:
        return f"Similar names: {', '.join(pairs)}."
    return f"It has {len(expected.keys() & stored.keys())} of the model's {len(expected)} keys."


_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "transformer.")
"""Prefixes that wrapping a module adds to its keys."""

_ADAPTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoKr adapter, not a whole model", (".lokr_w",)),
    ("a LoHa adapter, not a whole model", (".hada_w",)),
    ("a LoRA, not a whole model", (".lora_A.",)),
    ("a LoRA with other key names, not a whole model", (".lora_down.",)),
    ("a LoRA with old key names, not a whole model", ("lora.down.",)),
    ("differences from a model (a LoRA cut from a fine-tune), not a whole model", (".diff_b",)),
)
"""Adapters of models, whose keys also have the marks of the model's family."""

_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlNet, which guides a model but is not one itself", ("controlnet_blocks.",)),
    ("a ControlNet, which guides a model but is not one itself", ("control_model.",)),
    ("an IP-Adapter, which adds to a model but is not one itself", ("image_proj.", "to_k_ip")),
    ("an IP-Adapter, which adds to a model but is not one itself", ("image_proj.", "ip_adapter.")),
    ("the module that turns a Wan into a VACE, without the Wan", ("vace_blocks.",)),
    (
        "FLUX or another model with two kinds of blocks, which this package does not support",
        ("double_blocks.", "single_blocks."),
    ),
    (
        "FLUX, which this package does not support",
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
"""Other kinds of checkpoints, each with fragments of keys that all occur in its files."""
