"""One of two ranks that count FSDP's all-gathers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apt.distributed.mesh import Layout, RankMesh
from apt.distributed.parallel import Parallel
from apt.methods.apt import discriminator_loss
from apt.models import create_discriminator
from apt.rng import Draw
from tests.models.nets import inputs, tiny_mmdit


class Gathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def count(logits: Callable[[], Tensor]) -> dict[str, int]:
    with Gathers() as forward:
        loss = logits().sum()
    with Gathers() as backward:
        loss.backward()
    return {"forward": forward.count, "backward": backward.count}


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = RankMesh(Layout(shard=2), "cpu")
    discriminator = create_discriminator(tiny_mmdit())
    Parallel(rank, 2, torch.device("cpu"), mesh).shard(
        discriminator, discriminator.backbone.block_list()
    )
    x, t, c = inputs(2)
    draw = Draw(0, offset=2 * rank, stream="perturbation")

    def pair() -> Tensor:
        return discriminator_loss(discriminator, x, x, t, c, draw)[0]

    def apart() -> Tensor:
        return torch.cat([discriminator(x, t, c).logits for _ in range(3)])

    found = {"blocks": discriminator.backbone.depth, "pair": count(pair), "apart": count(apart)}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
