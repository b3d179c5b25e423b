"""Sizes of the latents of causal video codecs."""

from __future__ import annotations

from typing import Any

from apt.errors import ConfigError, InputError

_LARGEST_PATCH = 16


def causal_latent_shape(
    frames: int, height: int, width: int, temporal: int, spatial: int
) -> tuple[int, int, int]:
    """(T', H', W') for a clip, whose first frame is a latent frame of its own.

    Args:
        frames, height, width: of the clip.
        temporal: frames per latent frame after the first.
        spatial: pixels per latent along height and width.

    Raises:
        InputError: sizes that do not fit, with the nearest that do.
    """
    if frames < 1 or (frames - 1) % temporal:
        low = max(frames - 1, 0) // temporal * temporal + 1
        raise InputError(
            f"{frames} frames do not fit; use {low} or {low + temporal} ({temporal}k + 1)"
        )
    for name, size in (("height", height), ("width", width)):
        if size < spatial or size % spatial:
            low = max(size // spatial, 1) * spatial
            raise InputError(
                f"{name} {size} does not fit; use a multiple of {spatial}, such as {low} or "
                f"{low + spatial}"
            )
    return (frames - 1) // temporal + 1, height // spatial, width // spatial


def tokens_multiple(backbone_config: Any) -> int:
    """Latents along a side of a frame that become one token: the patch of a backbone.

    Raises ConfigError for a patch that is no square of at most 16.
    """
    for side in range(1, _LARGEST_PATCH + 1):
        try:
            backbone_config.token_grid((1, side, side))
        except InputError:
            continue
        return side
    raise ConfigError(
        f"{type(backbone_config).__name__} tells no patch of height and width; set "
        "--data.size-multiple to the pixels that become one token"
    )
