"""Networks whose tokens two and four ranks share, compared with one; test_sequence.py starts this.

Each rank computes both, and writes how far they are apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from apt.distributed.sequence import SequenceGroup
from apt.kernels import attention, query_pooling
from apt.models import create_discriminator
from apt.models.discriminator import discriminate_groups
from tests.distributed.gang import gang
from tests.models.backbones import CASES, Case

GRID = (1, 3, 5)  # 15 tokens: shares of 8 and 7, or of 4, 4, 4 and 3
Distances = dict[str, float]


ONE_OF_EACH = ("apt_8b", "sd3.5_medium", "wan2.1_t2v_1.3b", "wan2.1_t2v_1.3b_token_timesteps")
HEADS = (2, 6, 12)  # four ranks share the first two in rows


def main(folder: Path, kind: str) -> None:
    for world in (2, 4):
        layout = ParallelConfig(sequence=world)
        gang(world, lambda parallel: work(parallel, folder, kind), layout)


def work(parallel: Parallel, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    group = parallel.sequence
    assert group is not None and group.size == parallel.world_size
    found: dict[str, Distances] = {}
    if kind == "all":
        for name, case in CASES.items():
            found[f"velocity/{name}"] = velocity_apart(group, case)
            found[f"discriminator/{name}"] = discriminator_apart(group, case, "attention")
        for name in ONE_OF_EACH:
            found[f"compiled/{name}"] = velocity_apart(group, CASES[name], compiled=True)
    else:
        for heads in HEADS:
            found[f"attention/{heads}"] = attention_apart(group, heads)
            found[f"traffic/{heads}"] = traffic(group, heads)
        found["query_pooling"] = pooling_apart(group)
        for name in ONE_OF_EACH[::3]:
            found[f"velocity/{name}"] = velocity_apart(
                group, CASES[name], checkpointing=True, lengths=(2, 5)
            )
        for name, head in zip(ONE_OF_EACH[::2], ("attention", "conv3d"), strict=True):
            found[f"discriminator/{name}"] = discriminator_apart(group, CASES[name], head)
    (folder / f"{group.size}-{group.rank}.json").write_text(json.dumps(found))


def attention_apart(group: SequenceGroup, heads: int) -> Distances:
    """Queries of one stream over the keys of two, some masked, with gradients."""
    draw = torch.Generator().manual_seed(heads)
    visual, text = group.split(11), group.split(3)  # four ranks: one has no text
    joint = visual.beside(text)
    q = torch.randn(2, 11, heads, 4, generator=draw)
    k, v = torch.randn(2, 2, 14, heads, 4, generator=draw)
    direction = torch.randn(q.shape, generator=draw)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 12:] = mask[1, 3:5] = False
    whole = [value.requires_grad_() for value in (q, k, v)]
    attention(q, k, v, mask=mask).backward(direction)

    order = joint_order(group, 11, 3)
    own = [visual.own(q.detach()), *(joint.own(x.detach()[:, order]) for x in (k, v))]
    own = [value.requires_grad_() for value in own]
    out = attention(*own, mask=mask[:, order], queries=visual, keys=joint)
    out.backward(visual.own(direction))
    expected = attention(q, k, v, mask=mask)
    apart = {"output": distance(visual.whole(out), expected)}
    for name, split, part, value in zip("qkv", (visual, joint, joint), own, whole, strict=True):
        assert part.grad is not None and value.grad is not None
        reference = value.grad if split is visual else value.grad[:, order]
        apart[name] = distance(split.whole(part.grad), reference)
    return apart


class Traffic(TorchDispatchMode):
    """Counts all-to-alls, and the numbers that leave this rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls, self.numbers = rank, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.calls += 1
            self.numbers += sum(n for rank, n in enumerate(args[2]) if rank != self.rank)
        return func(*args, **(kwargs or {}))


def traffic(group: SequenceGroup, heads: int) -> dict[str, float]:
    """Traffic of attention on one sample of 24 tokens."""
    split = group.split(24)
    q, k, v = (torch.ones(1, split.length, heads, 4, requires_grad=True) for _ in range(3))
    with Traffic(group.rank) as forward:
        out = attention(q, k, v, queries=split, keys=split)
    with Traffic(group.rank) as backward:
        out.sum().backward()
    return {
        "forward calls": forward.calls,
        "forward numbers": forward.numbers,
        "backward calls": backward.calls,
        "backward numbers": backward.numbers,
    }


def joint_order(group: SequenceGroup, visual: int, text: int) -> Tensor:
    """Where each token of two streams lies once they are split."""
    places = torch.arange(visual + text)[None]
    return group.split(visual).order(places, group.split(text))[0]


def pooling_apart(group: SequenceGroup) -> Distances:
    """Large scores, so that maxima of ranks differ."""
    draw = torch.Generator().manual_seed(0)
    split = group.split(13)
    x = 4 * torch.randn(2, 13, 16, generator=draw)
    weights = [torch.randn(8, generator=draw)] + [
        torch.randn(8, 16, generator=draw) for _ in range(2)
    ]

    def pool(x: Tensor, weights: Iterable[Tensor], sequence: SequenceGroup | None) -> Tensor:
        query, keys, values = weights
        return query_pooling(x, query, keys, values, num_heads=2, sequence=sequence)

    def leaves(x: Tensor) -> list[Tensor]:
        return [value.detach().clone().requires_grad_() for value in (x, *weights)]

    whole, own = leaves(x), leaves(split.own(x))
    expected, found = pool(whole[0], whole[1:], None), pool(own[0], own[1:], group)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    apart = {"output": distance(found, expected)}
    of_x = split.whole(gradient(own[0])) / group.size
    apart["x"] = distance(of_x, gradient(whole[0]))
    for name, mine, theirs in zip(("query", "keys", "values"), own[1:], whole[1:], strict=True):
        apart[name] = distance(over_ranks(gradient(mine), group), gradient(theirs))
    return apart


def velocity_apart(
    group: SequenceGroup,
    case: Case,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
    lengths: tuple[int, ...] = (),
) -> Distances:
    """Velocity, and the gradients of x and of all parameters, with rows that samples share."""
    x, t, c = case.inputs(2, GRID, lengths=lengths)
    rows = torch.tensor([1, 0, 1])
    x = torch.cat([x, x[:1].flip(-1)])

    def compute(sequence: SequenceGroup | None) -> tuple[Tensor, Tensor, nn.Module]:
        model = case.build()
        model.split_tokens(sequence)
        model.set_checkpointing(checkpointing)
        if compiled and sequence is not None:
            for block in model.block_list():
                block.compile(backend="aot_eager", fullgraph=True)
        leaf = x.clone().requires_grad_()
        velocity = model(leaf, t, c, rows=rows)
        velocity.sin().sum().backward()
        return velocity, gradient(leaf), model

    return compared(compute, group, "velocity")


def discriminator_apart(group: SequenceGroup, case: Case, head: str) -> Distances:
    """Logits of groups of samples, and gradients, cut behind the last head."""
    x, t, c = case.inputs(2, GRID)
    groups = {"real": torch.tensor([0, 1]), "fake": torch.tensor([1])}
    x = torch.cat([x, 1 - x[1:]])

    def compute(sequence: SequenceGroup | None) -> tuple[Tensor, Tensor, nn.Module]:
        torch.manual_seed(0)
        model = create_discriminator(case.build(), head=head, layers=[1, 2])
        model.backbone.split_tokens(sequence)
        leaf = x.clone().requires_grad_()
        output = discriminate_groups(model, leaf, t, c, groups)
        loss = output["real"].logits.sin().sum() - output["fake"].logits.exp().sum()
        (of_x,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        loss.backward()
        features = [feature for part in output.values() for feature in part.features]
        seen = [*(part.logits[:, None] for part in output.values()), *features]
        return torch.cat([value.flatten() for value in seen]), of_x, model

    return compared(compute, group, "logits and features")


def compared(
    compute: Callable[[SequenceGroup | None], tuple[Tensor, Tensor, nn.Module]],
    group: SequenceGroup,
    name: str,
) -> Distances:
    output, of_x, model = compute(None)
    split_output, split_of_x, split_model = compute(group)
    theirs = gradients(model)
    mine = {k: over_ranks(value, group) for k, value in gradients(split_model).items()}
    assert mine.keys() == theirs.keys()
    # Of all parameters in one: a gradient that is 0 except for rounding has no direction.
    whole = torch.cat([theirs[k].flatten() for k in theirs])
    split = torch.cat([mine[k].flatten() for k in theirs])
    size = float(whole.norm())
    worst = max(
        float((mine[k] - theirs[k]).norm()) / max(float(theirs[k].norm()), 1e-3 * size)
        for k in theirs
    )
    return {
        name: distance(split_output, output),
        "gradient of x": distance(split_of_x, of_x),
        "gradients": distance(split, whole),
        "worst gradient": worst,
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def over_ranks(value: Tensor, group: SequenceGroup) -> Tensor:
    """The mean, as FSDP takes it."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group.group)
    return total / group.size


def distance(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach() - expected.detach()).double().norm()
    return float(difference / expected.detach().double().norm())
