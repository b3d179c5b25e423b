"""One update of a stage, run without data: what it holds, computes and sends on one rank."""

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
"""What is sharded over the ranks that have a copy of the weights in common."""


@dataclass(frozen=True)
class Peak:
    """The most that is held at once within a stretch of an update.

    Attributes:
        total: bytes.
        parts: bytes by part.
    """

    total: float
    parts: Counter[str]

    def between(self, other: Peak, share: float) -> Peak:
        """On the line from this at 0 to the other at 1."""
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
        stretches: for each part of an update, such as D's step, the peaks of its stretches: up to
            each network's call, inside it, and on to the optimiser and behind it.
        fixed: work of an update, whatever its micro-batches are.
        each: work of a micro-batch.
        micro_batches: of a rank's share.
        with_attention: bytes that would be held at least if what attention gives was kept.
    """

    stretches: Mapping[str, tuple[Peak, ...]]
    fixed: Work
    each: Work
    micro_batches: int
    with_attention: float = 0.0

    @property
    def peaks(self) -> dict[str, Peak]:
        """The highest stretch of each part of an update."""
        return {
            name: max(stretches, key=lambda peak: peak.total)
            for name, stretches in self.stretches.items()
        }

    @property
    def peak(self) -> Peak:
        """The highest of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def work(self) -> Work:
        """Of a whole update."""
        return self.fixed.plus(self.each.scaled(self.micro_batches))

    def between(self, other: Usage, share: float) -> Usage | None:
        """On the line from this at 0 to the other at 1; None if they did not go the same way."""
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
    """Run an update of a stage without data, and count.

    Args:
        config: of the run.
        layout: of the ranks.
        start: the model that the stage starts from.
        others: those of the stage's other fields.
        sample: the size of clips.
        gpu: as on a GPU, with its kernels; else as on the CPU.

    Raises:
        ConfigError: a batch that the ranks cannot share, as the run itself would.
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
    """One update of at most two micro-batches, and what it takes. The tracker has been entered.

    The first micro-batch stands for all but the last, which has the update's end with it.
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
                trained.zero_grad()  # as the loop of a run does
        mark()
        found[name] = tuple(stretches)
        whole = whole.plus(tracker.work)
        if len(batches.before) > 1:
            each = each.plus(batches.before[1].plus(batches.before[0], -1))
    fixed = whole.plus(each.scaled(len(batches)), -1)
    return Usage(found, fixed, each, len(batches), max(with_attention))


@contextlib.contextmanager
def host_memory(tracker: Tracker) -> Iterator[None]:
    """What blocks leave in host memory is not the device's, though both are the CPU here."""

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
    parts[OTHER] += tracker.peak - sum(parts.values())  # what came since it was looked at
    return Peak(tracker.peak, parts)


@contextlib.contextmanager
def _marks(
    stage: Stage,
    tracker: Tracker,
    mark: Callable[[], None],
    kept: Callable[[float], None],
) -> Iterator[None]:
    """A mark wherever a pass begins and ends, forward or backward, around the two blocks at each
    end of it, and before weights move.

    From block to block memory rises or falls as steadily in a deep network as in a shallow one, so
    it is highest at one end or the other of what lies between: which of the two, depth decides, and
    a stretch of its own for each tells both. The second block has what the first has not, such as
    the weights of the next one, gathered already.

    At the end of each pass forward, `kept` hears what would be held with attention's outputs.
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
    """Hooks of a network, and of blocks at its ends, that mark what passes and its gradient."""
    blocks = cast("Any", module).backbone.block_list()
    forward = False  # rather than again, in a backward pass

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
    # As many for any depth: of a few blocks, one may be both.
    at_ends = [blocks[min(max(at, 0), last)] for at in (0, 1, last - 2, last - 1, last)]
    return [
        module.register_forward_pre_hook(begins, prepend=True),
        *(block.register_forward_hook(passes) for block in at_ends),
        module.register_forward_hook(ends),
    ]


def _scope(tracker: Tracker, part: str | None) -> None:
    tracker.scope = part


def _heads(module: nn.Module) -> list[nn.Module]:
    """What a discriminator has behind its backbone."""
    heads = getattr(module, "heads", None)
    if heads is None:
        return []
    return [*heads, *(getattr(module, name) for name in ("norm", "project"))]


def name_states(stage: Stage) -> Callable[[], dict[int, str]]:
    """What tells the parts of what training keeps, by the address of storages.

    Everything but gradients is looked up once, now; gradients come and go.
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
        with torch.no_grad():  # or a shard is looked at by an op
            _name(found, [p.grad for p in parameters], GRADIENTS)
        return found

    return names


def _name(names: dict[int, str], tensors: Any, part: str) -> None:
    for tensor in tree_iter(tensors):
        if isinstance(tensor, Tensor):
            names.setdefault(local(tensor).untyped_storage()._cdata, part)


def share_of_batch(config: TrainConfig, layout: Layout) -> int:
    """How many samples of an update a data rank has. Raises ConfigError as the run would."""
    if config.batch_size % layout.data:
        lower = config.batch_size // layout.data * layout.data
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide by the {layout.data} groups of ranks "
            f"with samples of their own; set --batch-size {lower or layout.data} or "
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
    """The stage at work, with weights that nobody loads."""
    return PlannedHost(config, parallel, start=start, others=dict(others)).begin()


class PlannedBatches(MadeOneByOne):
    """Micro-batches of which one at a time is on the device; the others wait in host memory.

    As in a run, pixels are encoded when they are first asked for, and captions too. Each time that
    a micro-batch is taken, what had been done before is noted in `before`.
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
        """Be those of another batch from now on."""
        self._kept.clear()
        self._texts = [{} for _ in range(self._number)]

    def _read(self) -> Tensor:
        """A micro-batch as it waits for the next part: in host memory, unless the only one."""
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
    """A data rank's micro-batches, of which two stand for more. Raises ConfigError as the run."""
    share = share_of_batch(config, layout)
    size = config.micro_batch_size or share
    sized = dataclasses.replace(config, micro_batch_size=size)
    return PlannedBatches(sized, stage, sample, min(share // size, 2), tracker)
