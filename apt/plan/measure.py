"""Run one update of a stage without data, and measure one rank's memory, work and traffic."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from apt.checkpoints.info import SampleInfo
from apt.condition import EncodedText
from apt.data.loader import num_micro_batches
from apt.distributed.imagined import imagined_ranks
from apt.distributed.mesh import Layout
from apt.distributed.parallel import Parallel
from apt.distributed.tensors import local
from apt.errors import ConfigError
from apt.kernels import attention_backend
from apt.kernels.backends import imagined_gpu
from apt.methods.base import MicroBatch, Stage
from apt.models import checkpointing
from apt.models.cached import CachedCodec
from apt.plan.host import PlannedHost
from apt.plan.models import PlannedModel
from apt.plan.tracking import OTHER, Tracker, Work
from apt.plan.without_data import without_data
from apt.train.config import TrainConfig
from apt.train.host import MadeOneByOne, encoded

__all__ = [
    "AVERAGES",
    "BATCH",
    "FROZEN",
    "GRADIENTS",
    "HEADS",
    "OPTIMIZER",
    "STATES",
    "WEIGHTS",
    "Peak",
    "PlannedBatches",
    "Usage",
    "begin_stage",
    "follow_update",
    "make_batches",
    "measure",
    "name_states",
    "share_of_batch",
]

WEIGHTS = "weights"
FROZEN = "frozen weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimiser states"
AVERAGES = "averages"
HEADS = "heads and logits"
BATCH = "batch"

STATES = (WEIGHTS, FROZEN, GRADIENTS, OPTIMIZER, AVERAGES)
"""Parts that are sharded over the ranks that share a copy of the weights."""


@dataclass(frozen=True)
class Peak:
    """The peak of memory in a stretch of an update.

    Attributes:
        total: bytes.
        parts: bytes by part.
    """

    total: float
    parts: Counter[str]

    def between(self, other: Peak, share: float) -> Peak:
        """Interpolate linearly from this peak (share 0) to the other (share 1)."""
        return Peak(
            self.total + share * (other.total - self.total),
            Counter(
                {
                    part: self.parts[part] + share * (other.parts[part] - self.parts[part])
                    for part in self.parts.keys() | other.parts.keys()
                }
            ),
        )


@dataclass(frozen=True)
class Usage:
    """What one update takes on one rank.

    Attributes:
        stretches: for each part of an update, such as D's step, the peaks of its stretches: before
            and inside each call of a network, and before and after the optimiser's step.
        fixed: work of an update that does not depend on the number of micro-batches.
        each: work per micro-batch.
        micro_batches: number of micro-batches on a rank.
        with_attention: a lower bound of the bytes needed if attention's outputs were kept.
    """

    stretches: Mapping[str, tuple[Peak, ...]]
    fixed: Work
    each: Work
    micro_batches: int
    with_attention: float = 0.0

    @property
    def peaks(self) -> dict[str, Peak]:
        """The highest peak of each part of an update."""
        return {
            name: max(stretches, key=lambda peak: peak.total)
            for name, stretches in self.stretches.items()
        }

    @property
    def peak(self) -> Peak:
        """The highest peak of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def work(self) -> Work:
        """Work of a whole update."""
        return self.fixed.plus(self.each.scaled(self.micro_batches))

    def between(self, other: Usage, share: float) -> Usage | None:
        """Interpolate linearly from this (share 0) to the other (share 1).

        Returns None if the two updates have different stretches.
        """
        lengths = [{k: len(v) for k, v in usage.stretches.items()} for usage in (self, other)]
        if lengths[0] != lengths[1]:
            return None

        def work(mine: Work, theirs: Work) -> Work:
            return mine.plus(theirs.plus(mine, -1).scaled(share))

        return Usage(
            {
                name: tuple(
                    a.between(b, share) for a, b in zip(mine, other.stretches[name], strict=True)
                )
                for name, mine in self.stretches.items()
            },
            work(self.fixed, other.fixed),
            work(self.each, other.each),
            self.micro_batches,
            self.with_attention + share * (other.with_attention - self.with_attention),
        )


def measure(
    config: TrainConfig,
    layout: Layout,
    start: PlannedModel,
    others: Mapping[str, PlannedModel],
    sample: SampleInfo,
    *,
    gpu: bool,
) -> Usage:
    """Run an update of a stage without data, and return what it takes on one rank.

    Args:
        config: the configuration of the run.
        layout: the layout of the ranks.
        start: the model that the stage starts from.
        others: the models that other fields of the stage name, by field.
        sample: the size of clips.
        gpu: run as on a GPU, with its kernels; else as on the CPU.

    Raises:
        ConfigError: the ranks cannot share the batch; training would raise the same.
    """
    share = share_of_batch(config, layout)
    number = share // (config.micro_batch_size or share)
    with contextlib.ExitStack() as stack:
        parallel = stack.enter_context(imagined_ranks(layout))
        if gpu:
            stack.enter_context(imagined_gpu())
            stack.enter_context(attention_backend("_native_flash"))
        stack.enter_context(without_data())
        tracker = Tracker(scalar=0.5)
        stack.enter_context(tracker.watching())
        if gpu:
            stack.enter_context(host_memory(tracker))
        stage = begin_stage(config, parallel, start, others)
        tracker.name_parts = name_states(stage)
        batches = make_batches(config, stage, sample, layout, tracker)
        usage = follow_update(stage, batches, tracker)
        return dataclasses.replace(usage, micro_batches=number)


def follow_update(stage: Stage, batches: PlannedBatches, tracker: Tracker) -> Usage:
    """Run an update of at most two micro-batches, and return what it takes.

    The tracker must be active. The first micro-batch represents all except the last, which includes
    the end of the update.
    """
    found: dict[str, tuple[Peak, ...]] = {}
    whole, each = Work(), Work()
    with_attention = [0.0]
    for name, part in stage.parts().items():
        stretches: list[Peak] = []

        def mark(stretches: list[Peak] = stretches) -> None:
            stretches.append(_peak(tracker))
            tracker.begin_stretch()

        tracker.reset()
        with _marks(stage, tracker, mark, with_attention.append):
            batches.before.clear()
            if not stage.shares_batch:
                batches.forget()
            part(batches, 0)
            for trained in stage.trained.values():
                trained.zero_grad()  # as the training loop does
        mark()
        found[name] = tuple(stretches)
        whole = whole.plus(tracker.work)
        if len(batches.before) > 1:
            each = each.plus(batches.before[1].plus(batches.before[0], -1))
    fixed = whole.plus(each.scaled(len(batches)), -1)
    return Usage(found, fixed, each, len(batches), max(with_attention))


@contextlib.contextmanager
def host_memory(tracker: Tracker) -> Iterator[None]:
    """Leave out what blocks save in host memory, though here the device is the CPU too."""

    class OnHost(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool = False) -> None:
            def pack(tensor: Tensor) -> Tensor:
                with tracker.elsewhere():
                    return torch.empty_like(tensor)

            super().__init__(pack, torch.empty_like)

    original = checkpointing.save_on_cpu
    checkpointing.save_on_cpu = OnHost  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        checkpointing.save_on_cpu = original  # type: ignore[misc]


def _peak(tracker: Tracker) -> Peak:
    parts = Counter(tracker.parts)
    parts[OTHER] += tracker.peak - sum(parts.values())  # what was added since the last breakdown
    return Peak(tracker.peak, parts)


@contextlib.contextmanager
def _marks(
    stage: Stage,
    tracker: Tracker,
    mark: Callable[[], None],
    kept: Callable[[float], None],
) -> Iterator[None]:
    """Set marks between the stretches of an update.

    They are where a forward or backward pass begins and ends, around the first two and last two
    blocks, and before optimiser steps. Between those blocks, memory changes by the same amount from
    block to block, whatever the depth, so its peak is at one end or the other. Which end depends on
    the depth, so each has its own stretch. The second block is included because it holds what the
    first does not, such as the gathered weights of the next block.

    At the end of each forward pass, `kept` receives the bytes that would be held with attention's
    outputs.
    """
    handles = []
    for trained in stage.trained.values():
        handles += _marks_of_passes(trained.module, tracker, mark, kept)
        optimizer = cast("Any", trained).optimizer
        handles.append(optimizer.register_step_pre_hook(lambda *_: mark()))
        for head in _heads(trained.module):
            handles.append(head.register_forward_pre_hook(lambda *_: _scope(tracker, HEADS)))
            handles.append(head.register_forward_hook(lambda *_: _scope(tracker, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        tracker.scope = None


def _marks_of_passes(
    module: nn.Module,
    tracker: Tracker,
    mark: Callable[[], None],
    kept: Callable[[float], None],
) -> list[RemovableHandle]:
    """Add hooks to a network and its outer blocks that set marks in forward and backward passes."""
    blocks = cast("Any", module).backbone.block_list()
    forward = False  # True in a forward pass, but not when a backward pass recomputes blocks

    def here(tensors: Any) -> None:
        mark()
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: mark())
                return

    def begins(_: nn.Module, inputs: Any) -> None:
        nonlocal forward
        forward = True
        tracker.attended = 0
        here(inputs)

    def passes(_: nn.Module, __: Any, tokens: Any) -> None:
        if forward:
            here(tokens)

    def ends(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal forward
        forward = False
        if torch.is_grad_enabled():
            kept(float(tracker.held + tracker.attended))
        here(output)

    last = len(blocks) - 1
    # The same number of hooks at any depth: in a shallow network, a block may appear twice.
    at_ends = [blocks[min(max(at, 0), last)] for at in (0, 1, last - 2, last - 1, last)]
    return [
        module.register_forward_pre_hook(begins, prepend=True),
        *(block.register_forward_hook(passes) for block in at_ends),
        module.register_forward_hook(ends),
    ]


def _scope(tracker: Tracker, part: str | None) -> None:
    tracker.scope = part


def _heads(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a discriminator after its backbone."""
    heads = getattr(module, "heads", None)
    if heads is None:
        return []
    return [*heads, *(getattr(module, name) for name in ("norm", "project"))]


def name_states(stage: Stage) -> Callable[[], dict[int, str]]:
    """Return a function that maps the addresses of storages to the parts of the training state.

    Gradients come and go, so they are looked up at each call; everything else once, here.
    """
    fixed: dict[int, str] = {}
    parameters: list[nn.Parameter] = []
    modules = {id(trained.module) for trained in stage.trained.values()}
    _name(fixed, stage.extra_state(), AVERAGES)  # first: a network may carry its average
    for value in [*vars(stage).values(), *stage.frozen]:
        if isinstance(value, nn.Module) and id(value) not in modules:
            _name(fixed, [*value.parameters(), *value.buffers()], FROZEN)
    for trained in stage.trained.values():
        state = trained.state()
        own = [*trained.module.parameters()]
        _name(fixed, [p for p in own if not p.requires_grad], FROZEN)
        _name(fixed, [p for p in own if p.requires_grad], WEIGHTS)
        _name(fixed, [*trained.module.buffers()], WEIGHTS)
        _name(fixed, state["optimizer"], OPTIMIZER)
        _name(fixed, state.get("ema", {}), AVERAGES)
        parameters += [p for p in own if p.requires_grad]

    def names() -> dict[int, str]:
        found = dict(fixed)
        with torch.no_grad():  # else taking a shard would dispatch an op
            _name(found, [p.grad for p in parameters], GRADIENTS)
        return found

    return names


def _name(names: dict[int, str], tensors: Any, part: str) -> None:
    for tensor in tree_iter(tensors):
        if isinstance(tensor, Tensor):
            names.setdefault(local(tensor).untyped_storage()._cdata, part)


def share_of_batch(config: TrainConfig, layout: Layout) -> int:
    """Return the samples per update of a data rank. Raises ConfigError as training would."""
    if config.batch_size % layout.data:
        lower = config.batch_size // layout.data * layout.data
        raise ConfigError(
            f"batch_size {config.batch_size} is not divisible by the {layout.data} groups of ranks "
            f"with their own samples; set --batch-size {lower or layout.data} or "
            f"{lower + layout.data}"
        )
    share = config.batch_size // layout.data
    num_micro_batches(share, config.micro_batch_size)
    return share


def begin_stage(
    config: TrainConfig,
    parallel: Parallel,
    start: PlannedModel,
    others: Mapping[str, PlannedModel],
) -> Stage:
    """Return the stage, ready to train, with weights that are never loaded."""
    return PlannedHost(config, parallel, start=start, others=dict(others)).begin()


class PlannedBatches(MadeOneByOne):
    """Micro-batches, one of which is on the device at a time; the others wait in host memory.

    As in a run, pixels and captions are encoded when first used. Whenever iteration takes a
    micro-batch, the work done so far is appended to `before`.
    """

    def __init__(
        self, config: TrainConfig, stage: Stage, sample: SampleInfo, number: int, tracker: Tracker
    ) -> None:
        size = config.micro_batch_size or config.batch_size
        super().__init__(number)
        self._stage = stage
        self._tracker = tracker
        self._captions = ["a caption"] * size
        self._shape = (size, 3, sample.frames, sample.height, sample.width)
        self._kept: dict[int, Tensor] = {}
        self._texts: list[dict[str, EncodedText]]
        self.forget()
        codec = stage.codec
        self.before: list[Work] = []
        self._latents = isinstance(codec, CachedCodec)
        if codec is not None and self._latents:
            clip = codec.latent_shape(sample.frames, sample.height, sample.width)
            self._shape = (size, codec.channels, *clip)

    def make(self, number: int) -> MicroBatch:
        if number not in self._kept:
            self._kept[number] = self._read()
        x = self._kept[number]
        if self._number > 1:
            x = x.to(self._stage.host.device, copy=True)
        self._tracker.adopt(x, BATCH)
        first = number * len(self._captions)
        return MicroBatch(x, self._captions, first, texts=self._texts[number])

    def forget(self) -> None:
        """Represent another batch from now on."""
        self._kept.clear()
        self._texts = [{} for _ in range(self._number)]

    def _read(self) -> Tensor:
        """Return a micro-batch to keep: in host memory, unless it is the only one."""
        x = torch.zeros(self._shape, device=self._stage.host.device)
        codec = self._stage.codec
        if codec is not None and not self._latents:
            x = encoded(self._stage, codec, x)
        if self._number == 1:
            return x
        with self._tracker.elsewhere():
            return x.to("cpu", copy=True)

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in range(self._number):
            self.before.append(self._tracker.work.plus(Work()))
            yield self.make(number)


def make_batches(
    config: TrainConfig, stage: Stage, sample: SampleInfo, layout: Layout, tracker: Tracker
) -> PlannedBatches:
    """Return at most two micro-batches of a data rank, which represent all of them.

    Raises ConfigError as training would.
    """
    share = share_of_batch(config, layout)
    size = config.micro_batch_size or share
    sized = dataclasses.replace(config, micro_batch_size=size)
    return PlannedBatches(sized, stage, sample, min(share // size, 2), tracker)
