"""A small training run whose parts test_parallel.py runs in one process and under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt.distributed.parallel import Parallel
from apt.errors import CheckpointError
from apt.train import checkpoint
from apt.train.networks import EMA, model_state, optimizer_state

STEPS = 3
BATCH = 8


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])
        self.head = nn.Linear(7, 1)
        self.query = nn.Parameter(torch.empty(1, 1, 7))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("count", torch.arange(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def hidden(self, x: Tensor) -> Tensor:
        x = x + self.query[0, 0]
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)) * self.scale


class Run:
    """A sharded or whole Net with its optimiser and EMA."""

    def __init__(self, parallel: Parallel, seed: int) -> None:
        self.parallel = parallel
        self.net = Net(seed)
        parallel.shard(self.net, self.net.blocks, forward_methods=["hidden"])
        self.optimizer = torch.optim.RMSprop(self.net.parameters(), lr=1e-2, alpha=0.9)
        self.ema = EMA(self.net, 0.9)
        self.step = 0

    def train(self) -> None:
        for _ in range(STEPS):
            x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(self.step))
            share = BATCH // self.parallel.world_size
            x = x[self.parallel.rank * share :][:share]
            loss = (self.net(x) - 1).square().mean() + self.net.hidden(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.net)
            with torch.no_grad():
                self.net(x)  # leaves FSDP2's root unsharded, as drawing samples does
            self.step += 1

    def average_given_weights(self) -> None:
        """Update an EMA over weights that are equal, bit for bit, in every setting."""
        for i in range(4):
            generator = torch.Generator().manual_seed(100 + i)
            for value in model_state(self.net).values():
                whole = torch.randn(value.shape, generator=generator).to(value.dtype)
                if isinstance(value, DTensor):
                    mesh, placements = value.device_mesh, value.placements
                    whole = torch.distributed.tensor.distribute_tensor(whole, mesh, placements)
                value.copy_(whole)
            self.ema.update(self.net)

    def state(self) -> dict[str, Any]:
        return {
            "net": model_state(self.net),
            "optimizer": optimizer_state(self.net, self.optimizer),
            "ema": self.ema.state_dict(),
            "step": self.step,
        }

    def load(self, path: Path) -> dict[str, Any]:
        state = self.state()
        meta = checkpoint.load(path, state)
        self.step = state["step"]
        return meta


def main(folder: Path) -> None:
    with Parallel.from_environment("cpu") as parallel:
        rank = parallel.rank
        run = Run(parallel, seed=0)
        run.train()
        trained = checkpoint.save(folder / "two", 3, run.state(), {"world_size": 2})
        assert checkpoint.latest(folder / "two") == trained

        averaged = Run(parallel, seed=0)
        averaged.average_given_weights()
        checkpoint.save(folder / "two_averaged", 0, averaged.state(), {})
        before = {k: v.full_tensor().clone() for k, v in _sharded(averaged.net).items()}
        with averaged.ema.applied(averaged.net):
            inside = {k: v.full_tensor().clone() for k, v in _sharded(averaged.net).items()}
        after = {k: v.full_tensor() for k, v in _sharded(averaged.net).items()}
        assert all(torch.equal(before[k], after[k]) for k in before)
        shadow = averaged.ema.state_dict()
        assert all(torch.equal(inside[k], shadow[k].full_tensor()) for k in inside)

        resharded = Run(parallel, seed=1)
        resharded.load(folder / "one" / "step_00000003")
        checkpoint.save(folder / "one_again", resharded.step, resharded.state(), {})

        # Rank 1 alone finds its file altered: both must hear of it.
        broken = checkpoint.save(folder / "broken", 1, run.state(), {})
        parallel.barrier()
        if rank == 1:
            (broken / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")
        parallel.barrier()
        try:
            checkpoint.load(broken, run.state())
            refused = ""
        except CheckpointError as error:
            refused = str(error)

        # Rank 0 alone cannot make the folder.
        (folder / "file").touch()
        try:
            checkpoint.save(folder / "file" / "root", 1, run.state(), {})
            unwritable = ""
        except CheckpointError as error:
            unwritable = str(error)

        report = {
            "world_size": parallel.world_size,
            "backend": dist.get_backend(),
            "sharded": all(isinstance(p, DTensor) for p in run.net.parameters()),
            "mean": parallel.mean({"b": float(rank), "a": torch.tensor(3.0 * rank)}),
            "any": [parallel.any(rank == 1), parallel.any(False)],
            "refused": refused,
            "unwritable": unwritable,
        }
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
    assert not dist.is_initialized()


def _sharded(net: nn.Module) -> dict[str, DTensor]:
    return {k: v for k, v in model_state(net).items() if isinstance(v, DTensor)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # as the command does, because gloo's threads may abort Python's shutdown
