"""Groups of four ranks in all layouts; test_mesh.py starts this."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from apt.errors import ConfigError, PeerError
from tests.distributed.gang import gang

LAYOUTS = {
    "default": ParallelConfig(),
    "replicated": ParallelConfig(replicate=2),
    "sequence": ParallelConfig(sequence=2),
    "both": ParallelConfig(replicate=2, sequence=2),
    "all sequence": ParallelConfig(sequence=4),
}
NAMES = ("replicate", "states", "data", "sequence")


def main(folder: Path) -> None:
    def work(parallel: Parallel) -> None:
        found = {name: described(parallel.laid_out(layout)) for name, layout in LAYOUTS.items()}
        try:
            parallel.laid_out(ParallelConfig(sequence=3))
        except ConfigError as error:
            found["refused"] = {"message": str(error)}
        found["told"] = told(parallel)
        (folder / f"{parallel.rank}.json").write_text(json.dumps(found))

    gang(4, work, LAYOUTS["default"])


def told(parallel: Parallel) -> dict[str, object]:
    """What each rank hears of a result and of a failure of rank 0."""
    made: list[int] = []

    def make() -> dict[str, object]:
        made.append(parallel.rank)
        return {"clips": list(range(1000)), "from": parallel.rank}

    def fail() -> None:
        made.append(parallel.rank)
        raise ConfigError("no such folder")

    found: dict[str, object] = {"made": parallel.from_main(make)}
    try:
        parallel.from_main(fail)
    except (ConfigError, PeerError) as error:
        found["error"] = [type(error).__name__, str(error)]
    # Ranks still meet, and no other rank has done the work.
    return {**found, "worked": made, "sum": parallel.mean({"rank": float(parallel.rank)})["rank"]}


def described(parallel: Parallel) -> dict[str, object]:
    """The ranks of each group, as a collective over it finds them, and who has which samples."""
    groups = {}
    for name in NAMES:
        group = parallel.group(name)
        size = 1 if group is None else dist.get_world_size(group)
        members = torch.full((size,), parallel.rank)
        if group is not None:
            dist.all_gather_into_tensor(members, torch.tensor([parallel.rank]), group=group)
        groups[name] = members.tolist()
    return {"groups": groups, "data": [parallel.data_rank, parallel.data_size]}
