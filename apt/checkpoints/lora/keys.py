"""Keys of LoRA files: which part of an adapter a key is, and which of our weights it changes.

    PREFIX NAME PART      diffusion_model. blocks.0.self_attn.q .lora_down.weight

NAME is in our layout (that of diffusers) or in that of the authors, with dots or, in files of kohya
and OneTrainer, underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from apt.checkpoints.layouts import FAMILIES, Family, KeyRule
from apt.errors import listed

Kind = Literal["weight", "bias", "modulation"]

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "dit.",
    "pipe.",
    "model.",
    "module.",
    "net.",
    "generator.",
    "lora_prior_unet_",
    "lora_transformer_",
    "lora_unet_",
    "lora_dit_",
    "lora_model_",
    "lycoris_",
    "lora_",
    # VideoX-Fun writes two underscores.
    "_",
)
_INFIXES = ("_orig_mod.", ".processor")
"""What torch's wrappers and diffusers' old attention processors insert into names."""

# peft may add the adapter's name after each part.
_ADAPTER = r"(?:\.(?!weight$)[\w-]+)?"

_PARTS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:A|down){_ADAPTER}(?:\.weight)?", "down"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (rf"\.lora_(?:B|up){_ADAPTER}(?:\.weight)?", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight", "down"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"\.(?:lora_)?alpha", "alpha"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.dora_scale", "magnitude"),
    (rf"\.(lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]){_ADAPTER}", r"\1"),
    (r"\.(?:diff|w_norm)", "weight"),
    (r"\.(?:diff_b|b_norm)", "bias"),
    (r"\.diff_m", "modulation"),
)

KIND_OF_PART: dict[str, Kind] = {"bias": "bias", "up_bias": "bias", "modulation": "modulation"}
"""The parameter of a module that a part changes; other parts change its weight."""

_UNREADABLE: tuple[tuple[str, str], ...] = (
    (r"^(lora_te|text_encoder)", "it also changes the text encoder, which is not supported"),
    (r"\.oft_|\.boft_", "it is an OFT or BOFT, which is not supported"),
    (r"\.[ab][12]\.weight$", "it is a GLoRA, which is not supported"),
    (r"\.ia3_|\.on_input$", "it is an (IA)3, which is not supported"),
    (r"\.vera_lambda", "it is a VeRA, which is not supported"),
    (
        r"\.modules_to_save|\.set_weight$",
        "it replaces whole weights of the model, which is not supported",
    ),
    (r"\.reshape_weight$", "it enlarges a weight, like control LoRAs, which is not supported"),
)
_KINDS = (("magnitude|dora_scale", "DoRA"), ("lokr_", "LoKr"), ("hada_", "LoHa"), ("", "LoRA"))


def split_key(key: str) -> tuple[str, str | None]:
    """Split a key into the module's name, with its prefix, and the adapter's part or None."""
    for infix in _INFIXES:
        key = key.replace(infix, "")
    for pattern, part in _PARTS:
        found = re.search(f"{pattern}$", key)
        if found is not None:
            return key[: found.start()], found.expand(part)
    return key, None


def bare_names(name: str) -> Iterator[str]:
    """Yield a name unchanged, then without its first prefix, without its second, and so on."""
    yield name
    while (prefix := next((p for p in _PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
        yield name


class Names:
    """Finds our parameters by the names that LoRA files use."""

    def __init__(self, model: nn.Module, rules: Iterable[KeyRule]) -> None:
        self._ours = {name for name, _ in model.named_parameters()}
        self._flat = {_flat(name): name for name in self._ours}
        self._rules = [(rule, re.compile(rule.theirs.replace(r"\.", "_"))) for rule in rules]
        self._found: dict[tuple[str, Kind], tuple[list[str], KeyRule | None]] = {}

    def find(self, name: str, kind: Kind) -> tuple[list[str], KeyRule | None]:
        """Find our parameters for a module's name in a file, and the rule that maps them, if any.

        An empty list means that the model has no such module.
        """
        if (name, kind) not in self._found:
            keys = (key for bare in bare_names(name) for key in _keys(bare, kind))
            found = (self._find_key(key) for key in keys)
            self._found[name, kind] = next((hit for hit in found if hit[0]), ([], None))
        return self._found[name, kind]

    def _find_key(self, key: str) -> tuple[list[str], KeyRule | None]:
        flat = _flat(key)
        if flat in self._flat:
            return [self._flat[flat]], None
        for rule, pattern in self._rules:
            found = pattern.fullmatch(flat)
            if found is not None:
                ours = [found.expand(part) for part in rule.ours]
                if all(part in self._ours for part in ours):
                    return ours, rule
        return [], None


def _keys(name: str, kind: Kind) -> tuple[str, ...]:
    """Return the keys that a module's parameter of this kind may have."""
    if kind == "bias":
        return (f"{name}.bias",)
    if kind == "modulation":
        return f"{name}.modulation", f"{name}.scale_shift_table"
    # A parameter outside a layer has its own name; `to_out` was once a layer itself.
    return f"{name}.weight", name, f"{name}.0.weight"


def _flat(name: str) -> str:
    return name.replace(".", "_")


def describe_unknown(file: Path, unknown: Sequence[str], total: int, family: Family | None) -> str:
    """Return a message about keys that match nothing in a model.

    Args:
        file: the file that has them.
        unknown: these keys.
        total: the total number of keys in the file.
        family: the model's family.
    """
    start = (
        f"{str(file)!r}: {len(unknown)} of {total} keys match nothing in this model: "
        f"{listed(unknown)}"
    )
    for pattern, what in _UNREADABLE:
        if any(re.search(pattern, key) for key in unknown):
            return f"{start}; {what}"
    modules = {split_key(key)[0] for key in unknown}
    keys = [f"{bare}.weight" for module in modules for bare in bare_names(module)]
    for name in FAMILIES.names():
        other = FAMILIES.get(name)()
        rules = other.rules_for(other.config_class())
        mine = family is not None and family.name == name
        if not mine and any(rule.match(key) for key in keys for rule in rules):
            return f"{start}; it is for models of the family {name!r}, so load it into one of those"
    if family is not None:
        relative = family.relative({f"{module}.": () for module in modules})
        if relative is not None:
            return (
                f"{start}; it is a LoRA for a model that is {relative}, but this one is plain "
                f"{family.makes}: use a LoRA that was made for it"
            )
    kind = next(kind for pattern, kind in _KINDS if any(re.search(pattern, k) for k in unknown))
    return f"{start}; it is a {kind} for another model"
