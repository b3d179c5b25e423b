"""Families of public checkpoints and their layouts: which tensor of a file is which of ours.

A family is a folder of `apt.models`: a model with its sizes, a `FlowAdapter`, and one table of key
rules, which maps the layout of its authors to ours. Our parameters are named as in diffusers, whose
layout needs no rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apt.checkpoints.reading import Piece, StoredTensor
from apt.checkpoints.scales import with_scales
from apt.errors import CheckpointError
from apt.flow import FlowAdapter
from apt.registry import Buildable, Registry

COMFYUI_PREFIX = "model.diffusion_model."

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Names that torch's wrappers insert into keys, at any place."""

_COMPANIONS = (
    "first_stage_model.",
    "vae.",
    "text_encoders.",
    "text_encoder.",
    "cond_stage_model.",
    "conditioner.",
)
"""Prefixes of other models in an all-in-one file, which are ignored."""


@dataclass(frozen=True, kw_only=True)
class KeyRule:
    """One line of a conversion table, from a tensor of the original layout to ours.

    Attributes:
        theirs: pattern that must match a whole original key; groups are block numbers and the like.
        ours: our keys, with `\\1` for groups. If there are several, the original is split into as
            many equal parts along its first dimension (a fused projection).
        swap_halves: swap the two halves along the first dimension (shift before scale).
    """

    theirs: str
    ours: tuple[str, ...]
    swap_halves: bool = False

    def match(self, key: str) -> tuple[str, ...] | None:
        """Return our keys for an original key; None if the rule does not match."""
        found = re.fullmatch(self.theirs, key)
        return None if found is None else tuple(found.expand(ours) for ours in self.ours)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of public checkpoints.

    Attributes:
        name: name in messages and on the command line.
        makes: the task of our module, such as "text-to-video".
        adapter: conversion of time and velocity.
        config_class: the config dataclass of its registered sizes.
        diffusers_class: name of the transformer's class in diffusers.
        from_diffusers, to_diffusers: conversions between that class's config.json and
            `config_class`. The first raises CheckpointError for a config that our module does not
            support.
        rules: rules from the original layout to ours; each original key matches exactly one. They
            are a function of the config if they depend on it, as when only the last block differs;
            `rules_for` handles both.
        marks: fragments of original or diffusers keys that occur together in no other family.
        anchors: keys of which each layout has exactly one: anything before it in a file is a
            prefix.
        relative: returns what kind of checkpoint or LoRA of the family it is if our module does
            not support it, such as image-to-video, else None. Called with shapes by key, without
            prefix, in any layout, possibly with underscores for dots.
        pipeline_class: diffusers' pipeline that runs exports in one step.
    """

    name: str
    makes: str
    adapter: FlowAdapter
    config_class: type
    diffusers_class: str
    from_diffusers: Callable[[Mapping[str, Any]], Buildable]
    to_diffusers: Callable[[Any], dict[str, Any]]
    rules: Sequence[KeyRule] | Callable[[Any], Sequence[KeyRule]]
    marks: Sequence[str]
    anchors: Sequence[str]
    relative: Callable[[Mapping[str, tuple[int, ...]]], str | None]
    pipeline_class: str

    def rules_for(self, config: Any) -> Sequence[KeyRule]:
        """Return the key rules of a model with this config, an instance of `config_class`."""
        return self.rules(config) if callable(self.rules) else self.rules


def first_kind(keys: Iterable[str], kinds: Iterable[tuple[str, Sequence[str]]]) -> str | None:
    """Return the first of `kinds` with a fragment that occurs in a key; dots match underscores."""
    text = "\n".join(key.replace(".", "_") for key in keys)
    return next(
        (name for name, marks in kinds if any(mark.replace(".", "_") in text for mark in marks)),
        None,
    )


def diffusers_options(
    config: Mapping[str, Any], class_name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a config.json of diffusers, completed by defaults.

    Raises CheckpointError for another class, or an unknown option, which has no default.
    """
    name = config.get("_class_name", class_name)
    if name != class_name:
        raise CheckpointError(
            f"the config describes a {name}, expected {class_name}; use a checkpoint of that class"
        )
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise CheckpointError(
            f"the config of {class_name} has unknown options: {', '.join(unknown)}; the "
            "checkpoint is of another kind, or of a newer diffusers; use another one"
        )
    return {**defaults, **given}


FAMILIES: Registry[Family] = Registry("family")
"""Functions without arguments that return a `Family`, by its name."""


def all_families() -> list[Family]:
    """Return every registered family."""
    return [FAMILIES.get(name)() for name in FAMILIES.names()]


def family_marks() -> dict[str, Sequence[str]]:
    """Return the marks of all families, for messages; see `apt.checkpoints.foreign`."""
    return {f"a checkpoint of the {f.name} family": f.marks for f in all_families()}


def family_of(config: Any) -> Family | None:
    """Return the family that a model config belongs to; None for models of our own."""
    return next((f for f in all_families() if type(config) is f.config_class), None)


def diffusion_model(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the diffusion model in a file, with keys without prefixes and wrappers.

    8-bit tensors have their scales.

    Raises:
        CheckpointError: for several diffusion models in the file, or an unsupported quantisation.
    """
    keys = {key: _unwrapped(key) for key in stored}
    prefix = _prefix(keys.values(), source=str(next(iter(stored.values())).file) if stored else "")
    if not prefix:
        return with_scales({keys[key]: tensor for key, tensor in stored.items()})
    return with_scales(
        {
            name.removeprefix(prefix): stored[key]
            for key, name in keys.items()
            if not name.startswith(_COMPANIONS)
        }
    )


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


_BLOCKS = re.compile(r"((?:.*\.)?)(?:joint_|transformer_)?blocks\.\d+\..*")


def _prefix(keys: Collection[str], source: str) -> str:
    """Return the prefix of a diffusion model's keys: `model.diffusion_model.`, `module.`, ..."""
    anchors = [anchor for family in all_families() for anchor in family.anchors]
    # Other models also have a patch embedding, but no blocks beside it.
    before_blocks = {match[1] for key in keys if (match := _BLOCKS.fullmatch(key))}
    found = {
        prefix
        for key in keys
        for anchor in anchors
        if key.endswith(anchor) and (prefix := key.removesuffix(anchor)) in before_blocks
    }
    if len(found) > 1 and "" not in found:
        raise CheckpointError(
            f"{source!r} has several diffusion models, with the prefixes "
            f"{' and '.join(sorted(found))}; save the one that you want in a separate file"
        )
    return found.pop() if len(found) == 1 else ""


def map_keys(
    stored: Mapping[str, StoredTensor], expected: Collection[str], rules: Sequence[KeyRule]
) -> dict[str, Piece]:
    """Find each of our tensors in a checkpoint in our layout or the original one.

    A key that no rule matches keeps its name, and is later reported as unexpected.

    Args:
        stored: tensors as returned by `diffusion_model`.
        expected: our keys, which decide between the layouts.
        rules: rules from the original layout to ours.

    Raises:
        CheckpointError: if two tensors of the checkpoint map to the same one of ours.
    """
    pieces: dict[str, Piece] = {}
    for key, tensor in stored.items():
        for ours, piece in _converted(key, tensor, rules):
            if ours in pieces:
                raise CheckpointError(
                    f"{pieces[ours].stored.key!r} and {key!r} are both our {ours!r}; the "
                    "checkpoint mixes layouts, use the one that its authors published"
                )
            pieces[ours] = piece
    expected = set(expected)
    if len(expected & stored.keys()) >= len(expected & pieces.keys()):
        return {key: Piece(tensor) for key, tensor in stored.items()}
    return pieces


def _converted(
    key: str, tensor: StoredTensor, rules: Sequence[KeyRule]
) -> Iterable[tuple[str, Piece]]:
    for rule in rules:
        ours = rule.match(key)
        if ours is not None:
            for part, name in enumerate(ours):
                yield name, Piece(tensor, part, len(ours), rule.swap_halves)
            return
    yield key, Piece(tensor)


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original layout: our tensors concatenated along dimension 0.

    With `swap_halves`, the two halves of each are swapped.
    """

    ours: tuple[str, ...]
    swap_halves: bool


def original_layout(keys: Iterable[str], rules: Sequence[KeyRule]) -> dict[str, OriginalTensor]:
    """Invert the rules: return original keys, and the tensors of ours that each is made of.

    Raises:
        ValueError: for a rule that cannot be inverted, or a key of ours that no rule produces.
    """
    left = dict.fromkeys(keys)
    original: dict[str, OriginalTensor] = {}
    templates = [_Template.parse(rule) for rule in rules]
    for key in list(left):
        if key not in left:
            continue
        for template in templates:
            theirs = template.theirs_of(key)
            if theirs is None:
                continue
            ours = template.rule.match(theirs)
            if ours is not None and key in ours and all(name in left for name in ours):
                original[theirs] = OriginalTensor(ours, template.rule.swap_halves)
                for name in ours:
                    del left[name]
                break
    if left:
        raise ValueError(f"no rule produces {len(left)} keys, such as {next(iter(left))!r}")
    return original


@dataclass(frozen=True)
class _Template:
    """An inverted rule: a pattern for our first key, and the original key with placeholders."""

    rule: KeyRule
    pattern: re.Pattern[str]
    theirs: tuple[str | int, ...]

    def theirs_of(self, key: str) -> str | None:
        """Return the original key for one of ours; None if that is not the first of this rule."""
        found = self.pattern.fullmatch(key)
        if found is None:
            return None
        return "".join(part if isinstance(part, str) else found[f"g{part}"] for part in self.theirs)

    @classmethod
    def parse(cls, rule: KeyRule) -> _Template:
        """Parse `rule.theirs`: literal text, flat groups and lookaheads.

        Raises ValueError for anything else, and for a group that does not appear in our key.
        """
        parts: list[str | int] = []
        groups: list[str] = []
        # A group, a lookahead (which produces no text), an escape, or plain text.
        tokens = re.compile(
            r"\((?P<group>[^()?][^()]*)\)|\(\?[!=][^()]*\)|\\(?P<escaped>\W)|(?P<plain>[\w-])"
        )
        position = 0
        while position < len(rule.theirs):
            found = tokens.match(rule.theirs, position)
            if found is None:
                raise ValueError(f"cannot invert {rule.theirs!r} at character {position}")
            position = found.end()
            if found["group"] is not None:
                groups.append(found["group"])
                parts.append(len(groups))
            elif found["escaped"] or found["plain"]:
                parts.append(found["escaped"] or found["plain"])
        pattern, used = "", set()
        for piece in re.split(r"(\\\d)", rule.ours[0]):
            if not re.fullmatch(r"\\\d", piece):
                pattern += re.escape(piece)
                continue
            number = int(piece[1])
            repeated = number in used
            pattern += f"(?P=g{number})" if repeated else f"(?P<g{number}>{groups[number - 1]})"
            used.add(number)
        if used != set(range(1, len(groups) + 1)):
            raise ValueError(f"{rule.ours[0]!r} does not use every group of {rule.theirs!r}")
        return cls(rule, re.compile(pattern), tuple(parts))
