"""How strong an adapter is: alpha over rank, from wherever its file keeps alpha.

In this order: a tensor `NAME.alpha`; what PEFT writes, in the header (diffusers'
`lora_adapter_metadata`) or in `adapter_config.json` beside the file; a number in the header
(`lora_alpha`, `alpha`, kohya's `ss_network_alpha`). With none of them alpha is the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.errors import CheckpointError
from apt.hub.inert import read_json
from apt.untrusted import parse_json

CONFIG_FILE = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"

_DOCUMENTS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config", "config")
"""Entries of a header that are JSON objects as PEFT writes them."""
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "lora_network_alpha")
_KOHYA_ALPHA = "ss_network_alpha"

_PEFT_TYPES = ("LORA", "LOKR", "LOHA")
_CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to begin that take a part out of the base model's weights, so the rest fits no other."""


@dataclass(frozen=True)
class Strength:
    """What a file says of alpha.

    Attributes:
        origin: where it says so, for messages.
        alpha: of all layers; None for their rank.
        rank: that the file claims for all layers; None if it claims none.
        alphas, ranks: of single layers, by patterns of their names.
        rslora: divide by the square root of the rank (Kalajdzievski 2023).
    """

    origin: str
    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, name: str, rank: int | None, alpha: Tensor | None) -> float:
        """What multiplies the change of a layer.

        Args:
            name: of the layer in the file, without prefix.
            rank: of its factors; None for whole matrices (of a LoKr).
            alpha: the tensor beside them; None if there is none.

        Raises CheckpointError if the file claims another rank.
        """
        if alpha is not None:
            # LyCORIS keeps an alpha beside whole matrices too, which counts for nothing.
            return 1.0 if rank is None else float(alpha) / rank
        claimed = _matching(self.ranks, name, self.rank)
        if rank is None:
            rank = None if claimed is None else int(claimed)
        elif claimed is not None and claimed != rank:
            raise CheckpointError(
                f"{self.origin} says rank {claimed:g} for {name!r}, whose factors have {rank}: "
                "the two are not of one LoRA, so its strength is unknown; put the file where its "
                "own description is"
            )
        value = _matching(self.alphas, name, self.alpha)
        if value is None or rank is None:
            return 1.0
        return value / (math.sqrt(rank) if self.rslora else rank)


def read_strength(file: Path, header: Mapping[str, str], keys: Collection[str]) -> Strength:
    """What a LoRA says of its strength, besides tensors.

    Args:
        file: the LoRA, beside which `adapter_config.json` may lie.
        header: the strings in its header.
        keys: of its tensors.

    Raises:
        CheckpointError: a description that is damaged, of another kind of adapter, or of one whose
            base was changed.
    """
    for entry in _DOCUMENTS:
        if entry in header:
            origin = f"{entry!r} in the header of {str(file)!r}"
            options = _parse(header[entry], origin)
            if any(key in _PEFT_FIELDS for key in options):
                return _from_peft(options, origin)
    config = file.with_name(CONFIG_FILE)
    # Beside PEFT's own file it describes that one, and not others that lie there too.
    if config.is_file() and (file.name == PEFT_FILE or not file.with_name(PEFT_FILE).exists()):
        return _from_peft(read_json(config), repr(str(config)))
    origin = f"the header of {str(file)!r}"
    names = _ALPHAS if _puts_alpha_into_factors(header, keys) else (*_ALPHAS, _KOHYA_ALPHA)
    alpha = next((header[name] for name in names if header.get(name) not in (None, "None")), None)
    return Strength(
        origin,
        alpha=None if alpha is None else _number(alpha, "alpha", origin),
        rslora=_flag(header.get("use_rslora", header.get("rslora", False))),
    )


def _puts_alpha_into_factors(header: Mapping[str, str], keys: Collection[str]) -> bool:
    """Whether musubi-tuner's converter wrote the file, which keeps kohya's header all the same."""
    return _KOHYA_ALPHA in header and any(
        key.startswith(("diffusion_model.", "transformer.")) and ".lora_A." in key for key in keys
    )


_PEFT_FIELDS = ("r", "lora_alpha", "alpha", "peft_type", "alpha_pattern", "use_rslora")


def _from_peft(options: Mapping[str, Any], origin: str) -> Strength:
    kind = str(options.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in _PEFT_TYPES:
        raise CheckpointError(
            f"{origin} describes an adapter of the type {kind}, which is not read here; expected "
            f"one of {', '.join(_PEFT_TYPES)}"
        )
    begun = str(options.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGED_BASES):
        raise CheckpointError(
            f"{origin} says init_lora_weights = {begun!r}: such a LoRA fits only the base whose "
            "weights were changed with it; convert it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    alpha = options.get("lora_alpha", options.get("alpha"))
    rank = options.get("r")
    return Strength(
        origin,
        alpha=None if alpha is None else _number(alpha, "lora_alpha", origin),
        rank=None if rank is None else _positive(rank, "r", origin),
        alphas=_pattern(options, "alpha_pattern", origin),
        ranks=_pattern(options, "rank_pattern", origin),
        rslora=_flag(options.get("use_rslora", False)),
    )


def _parse(text: str, origin: str) -> dict[str, Any]:
    """A JSON object; of several components, or with their names before keys, the transformer's."""
    try:
        document = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        return {}
    if isinstance(document.get("transformer"), dict):
        document = document["transformer"]
    return {key.removeprefix("transformer."): value for key, value in document.items()}


def _pattern(options: Mapping[str, Any], name: str, origin: str) -> dict[str, float]:
    patterns = options.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{origin}: {name} must be an object, got {patterns!r:.80}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{origin}: {name} has no valid pattern {pattern!r}") from error
    check = _positive if name == "rank_pattern" else _number
    return {pattern: check(value, name, origin) for pattern, value in patterns.items()}


def _matching(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    """The value of the first pattern that fits the end of a name, as PEFT chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
            return value
    return default


def _number(value: object, name: str, origin: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise CheckpointError(f"{origin}: {name} must be a finite number, got {value!r:.80}")
    return number


def _positive(value: object, name: str, origin: str) -> float:
    number = _number(value, name, origin)
    if number < 1 or number != int(number):
        raise CheckpointError(f"{origin}: {name} must be a whole number above 0, got {value!r:.80}")
    return number


def _flag(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1")
