"""Two sharded ranks, of which one computes non-finite values, then values that do not repeat.

test_diagnosis.py runs it. Both are forked from one process, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from apt.distributed.parallel import Parallel
from apt.errors import HardwareError
from apt.methods import PretrainConfig
from apt.train.diagnosis import check_replay, where_not_finite
from apt.train.host import RunHost
from apt.train.initial import initial_bundle
from apt.train.networks import NonFiniteGradient
from tests.train.tiny_methods import micro_batches, randomize, train_config

BAD = 1


def rank_of(rank: int, port: int, folder: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    parallel = Parallel.from_environment("cpu")
    config = train_config(PretrainConfig())
    start = initial_bundle(config)
    randomize(start.backbone, 0)  # type: ignore[arg-type]
    stage = PretrainConfig().build(start, RunHost(config, parallel))
    linear = next(m for m in start.backbone.block_list()[1].modules() if is_linear(m))
    part, batches = stage.parts()["generator"], micro_batches(2, first=4 * rank)
    told = []
    check_replay(stage.trained, part, batches[:1], 0)

    def overflow(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * (torch.nan if rank == BAD else 1)

    handle = linear.register_forward_hook(overflow)
    try:
        part(batches, 0)
    except NonFiniteGradient as error:
        told.append(where_not_finite(error, stage.trained, part, batches, 0))
    handle.remove()

    numbers = count()

    def drift(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + (1e-5 * next(numbers) if rank == BAD else 0)

    linear.register_forward_hook(drift)
    try:
        check_replay(stage.trained, part, batches[:1], 0)
    except HardwareError as error:
        told.append(str(error))
    (folder / str(rank)).write_text(json.dumps(told))
    parallel.barrier()


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def main(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            rank_of(rank, port, folder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
