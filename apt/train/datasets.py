"""Open the data set of a run."""

from __future__ import annotations

from typing import Any

from apt.condition import PromptCheck
from apt.data.builtin_sources import Folder, Latents, Shards
from apt.data.captions import CaptionRule
from apt.data.clips import check_clips
from apt.data.dataset import TrainingData
from apt.data.digits import MovingDigits
from apt.data.folder import VideoFolder
from apt.data.latents import LatentFolder
from apt.data.source import ClipRequest
from apt.distributed.parallel import FromMain, made_here
from apt.train.config import DataConfig

# Opening these reads a folder, and the result is small enough to send to the other ranks.
_READ_ONCE = (Folder, Latents, Shards)
# These check what they read themselves.
_OURS = (MovingDigits, VideoFolder, LatentFolder)


def make_dataset(
    config: DataConfig,
    *,
    seed: int,
    check: PromptCheck | None = None,
    captioned: bool = True,
    dataset: Any = None,
    from_main: FromMain = made_here,
) -> TrainingData:
    """Open the data set of a run.

    Args:
        config: the source and the size of clips.
        seed: for the order of clips and where they start.
        check: the text encoder's check of captions; None if it has read all of them already.
        captioned: whether captions are read.
        dataset: a data set to use instead of the source in `config`; see `check_clips`.
        from_main: `Parallel.from_main` of several ranks, so that only one rank reads a folder.

    Raises:
        ConfigError: a folder source without a path, or the digits in another size.
        DataError: the folder has nothing usable, a latent cache is damaged or incomplete, or a
            user's own clips cannot be trained on.
    """
    request = _request(config, seed, check, captioned)
    if dataset is not None:
        return _looked_at(dataset, request)
    source = config.make_source()
    if type(source) in _READ_ONCE:
        opened = from_main(lambda: source.open(request))
    else:
        opened = source.open(request)
    return _looked_at(opened, request)


def kept_apart(
    config: DataConfig, *, seed: int, check: PromptCheck | None = None, captioned: bool = True
) -> TrainingData | None:
    """Return the clips that the source itself keeps out of training, or None.

    The arguments are those of `make_dataset`.
    """
    request = _request(config, seed, check, captioned)
    opened = config.make_source().open_heldout(request)
    return None if opened is None else _looked_at(opened, request)


def _request(
    config: DataConfig, seed: int, check: PromptCheck | None, captioned: bool
) -> ClipRequest:
    rule = None if check is None else CaptionRule(check, config.long_captions)
    return config.request(seed=seed, captions=rule, captioned=captioned)


def _looked_at(opened: Any, request: ClipRequest) -> TrainingData:
    return opened if isinstance(opened, _OURS) else check_clips(opened, request)
