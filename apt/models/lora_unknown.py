"""What a LoRA is of, if its keys belong to nothing in a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from apt.hub.mismatch import listed
from apt.models.families import FAMILIES, Family
from apt.models.lora_keys import bare_names, split_key

_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"^(lora_te|text_encoder)", "it also changes the text encoder, which is not supported"),
    (r"\.oft_|\.boft_", "it is an OFT or BOFT, which is not supported"),
    (r"\.[ab][12]\.weight$", "it is a GLoRA, which is not supported"),
    (r"\.ia3_|\.on_input$", "it is an (IA)3, which is not supported"),
    (r"\.vera_lambda", "it is a VeRA, which is not supported"),
    (
        r"\.modules_to_save|\.set_weight$",
        "it has whole weights in place of the model's, which is not supported",
    ),
    (r"\.reshape_weight$", "it makes a weight larger, as control LoRAs do, which is not supported"),
)
_KINDS = (("magnitude|dora_scale", "DoRA"), ("lokr_", "LoKr"), ("hada_", "LoHa"), ("", "LoRA"))


def describe_unknown(file: Path, unknown: Sequence[str], total: int, family: Family | None) -> str:
    """A message for keys that belong to nothing in a model.

    Args:
        file: that has them.
        unknown: these keys.
        total: how many keys it has in all.
        family: of the model.
    """
    start = (
        f"{str(file)!r}: {len(unknown)} of {total} keys belong to nothing in this model: "
        f"{listed(unknown)}"
    )
    for pattern, what in _ADAPTERS:
        if any(re.search(pattern, key) for key in unknown):
            return f"{start}; {what}"
    modules = {split_key(key)[0] for key in unknown}
    keys = [f"{bare}.weight" for module in modules for bare in bare_names(module)]
    for name in FAMILIES.names():
        other = FAMILIES.get(name)()
        rules = other.rules_for(other.config_class())
        mine = family is not None and family.name == name
        if not mine and any(rule.match(key) for key in keys for rule in rules):
            return f"{start}; its names are those of the family {name!r}"
    if family is not None:
        relative = family.relative({f"{module}.": () for module in modules})
        if relative is not None:
            return (
                f"{start}; it is a LoRA of a model that is {relative}, and this one is plain "
                f"{family.makes}: use a LoRA that was made for it"
            )
    kind = next(kind for pattern, kind in _KINDS if any(re.search(pattern, k) for k in unknown))
    return f"{start}; it is a {kind} of another model"
