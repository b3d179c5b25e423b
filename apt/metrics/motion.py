"""Flicker, motion and sharpness of a video, from its pixels alone.

Clips are (T, H, W, 3) uint8, or float32 in [0, 255]. Luma is that of BT.709 for R'G'B' values, in
grey levels of 0 to 255. No figure means much by itself: a frozen video has the least flicker, and
noise the most detail. Read them together, and next to those of real videos.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError

_BT709 = (0.2126, 0.7152, 0.0722)

_CELLS = 4
_WORKING_SIDE = 128
_BLOCK = 8
_REACH = 8
_FEWEST = 0.02
_EXPLAINED = 0.7
_VISIBLE = 1.0


def luma(clip: Tensor) -> Tensor:
    """Return luma (T, H, W), float32 in [0, 255]. Raises InputError unless clip is (T, H, W, 3)."""
    _check_clip(clip)
    return clip.float() @ torch.tensor(_BT709, device=clip.device)


def sharpness(clip: Tensor) -> Tensor:
    """Return the sharpness (T,) of frames: the variance of the Laplacian, in squared grey levels.

    The Laplacian of luma is the sum of the four neighbours minus four times the pixel; border
    pixels are left out. This is the focus measure of Pech-Pacheco et al. (2000). Compare frames of
    equal size, and next to real videos: noise and ringing raise it, too.

    Raises InputError for frames below 3x3 pixels.
    """
    frames = luma(clip)
    if min(frames.shape[1:]) < 3:
        raise InputError(f"sharpness needs frames of at least 3x3 pixels, got {clip.shape[1:3]}")
    inner = frames[:, 1:-1, 1:-1]
    around = frames[:, :-2, 1:-1] + frames[:, 2:, 1:-1] + frames[:, 1:-1, :-2] + frames[:, 1:-1, 2:]
    return (around - 4 * inner).flatten(1).var(dim=1, unbiased=False)


def flicker(clip: Tensor) -> float:
    """Return the amplitude, in grey levels, of brightness that jumps from frame to frame.

    The mean of |m(t-1) - 2 m(t) + m(t+1)| / 4, where m is the mean luma of each of 4x4 cells of the
    frame (fewer in frames of fewer pixels). Brightness that alternates by ±a gives a. A frozen
    video, a steady fade, and motion within a cell give 0. This is not VBench's "temporal
    flickering", which is 1 minus the mean change between frames divided by 255 and so rewards
    videos that do not move; for that change, see `frame_change`.

    Raises InputError for fewer than three frames.
    """
    if len(clip) < 3:
        raise InputError(f"flicker needs at least 3 frames, got {len(clip)}")
    frames = luma(clip)
    cells = (min(_CELLS, frames.shape[1]), min(_CELLS, frames.shape[2]))
    means = F.adaptive_avg_pool2d(frames[:, None], cells).double()
    return float((means[:-2] - 2 * means[1:-1] + means[2:]).abs().mean() / 4)


def frame_change(clip: Tensor) -> float:
    """Return the mean absolute change of pixel values between frames, in grey levels; 0 is frozen.

    VBench's temporal flickering is (255 - this) / 255 (Huang et al., 2024).

    Raises InputError for fewer than two frames.
    """
    _check_clip(clip)
    if len(clip) < 2:
        raise InputError(f"the change between frames needs at least 2 frames, got {len(clip)}")
    return float(clip.float().diff(dim=0).abs().mean())


def motion(clip: Tensor) -> float:
    """Return the speed of moving parts, as a share of the frame's shorter side per frame.

    Frames whose shorter side is over 128 pixels are first reduced to that. Each block of 8x8 pixels
    is searched for in the next frame, at most 8 pixels away in each direction, by the least
    absolute difference of luma without its mean: first at whole pixels, then half a pixel around
    the best, between bilinearly interpolated pixels. A block counts as moved if it changed by more
    than one grey level on average and its best match explains at least 0.7 of that change, so that
    noise and flicker do not count as motion. The result is the median displacement of the blocks
    that moved (0 if they are 2 % or fewer), averaged over pairs of frames.

    A small object before a still background counts with its own speed, as in VBench's dynamic
    degree (Huang et al., 2024), which uses the longest vectors of optical flow. At the size that is
    searched, speeds below a quarter of a pixel or above 8 pixels per frame are missed. A cut may
    count as motion.

    Raises InputError for fewer than two frames, or frames below 8x8 pixels.
    """
    if len(clip) < 2:
        raise InputError(f"motion needs at least 2 frames, got {len(clip)}")
    frames = luma(clip)
    shorter = min(frames.shape[1:])
    if shorter < _BLOCK:
        raise InputError(f"motion needs frames of at least 8x8 pixels, got {clip.shape[1:3]}")
    if shorter > _WORKING_SIDE:
        scale = _WORKING_SIDE / shorter
        size = [max(_WORKING_SIDE, round(side * scale)) for side in frames.shape[1:]]
        frames = F.interpolate(frames[:, None], size, mode="bilinear", antialias=True)[:, 0]
    speeds = [_speed(first, second) for first, second in itertools.pairwise(frames)]
    return sum(speeds) / len(speeds) / min(frames.shape[1:])


def _check_clip(clip: Tensor) -> None:
    if clip.ndim != 4 or clip.shape[-1] != 3 or not clip.numel():
        raise InputError(f"a clip has shape {tuple(clip.shape)}; expected (T, H, W, 3) in [0, 255]")


def _speed(first: Tensor, second: Tensor) -> float:
    """Return the median displacement in pixels of the blocks of (H, W) that moved."""
    lengths = _displacements(first, second)
    moved = lengths[lengths > 0]
    return float(moved.median()) if len(moved) > _FEWEST * len(lengths) else 0.0


def _displacements(first: Tensor, second: Tensor) -> Tensor:
    """Return the displacement (blocks,) in pixels of each block of (H, W); 0 if it did not move."""
    height, width = (side - side % _BLOCK for side in first.shape)
    blocks = _blocks(first[:height, :width])
    padded = F.pad(second[None, None], (_REACH + 1,) * 4, mode="replicate")[0, 0]
    best = torch.full((len(blocks),), float("inf"), device=first.device)
    found_at = torch.zeros(len(blocks), 2, dtype=torch.long, device=first.device)
    for step in _nearest_first(_REACH):
        top, left = (1 + _REACH + distance for distance in step)
        error = _error(_blocks(padded[top : top + height, left : left + width]), blocks)
        better = error < best
        best = torch.where(better, error, best)
        found_at[better] = torch.tensor(step, device=first.device)

    # The padded frame at twice the resolution: even positions are its pixels.
    fine_size = [2 * side - 1 for side in padded.shape]
    fine = F.interpolate(padded[None, None], fine_size, mode="bilinear", align_corners=True)[0, 0]
    origins = torch.cartesian_prod(
        torch.arange(0, height, _BLOCK, device=first.device),
        torch.arange(0, width, _BLOCK, device=first.device),
    )
    within = torch.arange(_BLOCK, device=first.device)
    starts = 2 * (origins + found_at + 1 + _REACH)
    halves = 2 * found_at
    for step in _nearest_first(1):
        offset = torch.tensor(step, device=first.device)
        rows, columns = ((starts + offset)[:, axis, None] + 2 * within for axis in (0, 1))
        candidate = _without_mean(fine[rows[:, :, None], columns[:, None, :]].flatten(1))
        error = _error(candidate, blocks)
        better = error < best
        best = torch.where(better, error, best)
        halves = torch.where(better[:, None], 2 * found_at + offset, halves)

    length = halves.float().norm(dim=1) / 2
    still = _error(_blocks(second[:height, :width]), blocks)
    moved = (still > _VISIBLE) & (best <= (1 - _EXPLAINED) * still)
    return torch.where(moved, length, torch.zeros_like(length))


def _nearest_first(reach: int) -> list[tuple[int, int]]:
    """Return all steps of at most ``reach`` each way; of equal matches the shortest is kept."""
    span = range(-reach, reach + 1)
    return sorted(itertools.product(span, span), key=lambda step: step[0] ** 2 + step[1] ** 2)


def _error(candidate: Tensor, blocks: Tensor) -> Tensor:
    return (candidate - blocks).abs().mean(dim=1)


def _blocks(frame: Tensor) -> Tensor:
    """Cut (H, W) into blocks (blocks, 64), each with its mean removed."""
    return _without_mean(
        frame.unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK).reshape(-1, _BLOCK**2)
    )


def _without_mean(blocks: Tensor) -> Tensor:
    return blocks - blocks.mean(dim=1, keepdim=True)
