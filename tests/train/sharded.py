"""Stages of training on 1, 2 and 4 ranks, in fp32 and in bf16; test_sharded.py starts this.

All ranks of all worlds see the same micro-batches of one sample, so even in bf16 the same gradients
are added up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.load import load_model
from apt.checkpoints.origin import fill_from_origins
from apt.checkpoints.weights import save_tensors
from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from apt.distributed.tensors import WholeTensors
from apt.files import write_safetensors
from apt.methods.apt import AdversarialConfig
from apt.methods.base import MethodConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.models import create_model
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.networks import model_state
from apt.train.outcome import save_outcome
from apt.train.trainer import make_stage
from tests.counting import CollectiveCounter, LiveTensors, bytes_of
from tests.distributed.gang import begin, wait_for
from tests.train.tiny_methods import floats, micro_batches, save_start, train_config

UPDATES = 2
DEEP: dict[str, Any] = {
    "in_channels": 4, "hidden_size": 32, "depth": 24, "num_heads": 2, "text_dim": 16,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "two": (2, ParallelConfig()),
    "four": (4, ParallelConfig()),
    "hybrid": (4, ParallelConfig(replicate=2)),
    "once": (2, ParallelConfig(reduce_once=True)),
}
# A large eps: otherwise the first updates would be the gradient's sign, which rounding can flip.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-2)


def stages(root: Path) -> dict[str, MethodConfig]:
    return {
        "pretrain": PretrainConfig(),
        "distill": DistillConfig(teacher=str(root / "generator")),
        "apt": adversarial(root),
        "apart": adversarial(root, discriminator_forwards=2),
    }


def adversarial(root: Path, **options: Any) -> AdversarialConfig:
    return AdversarialConfig(
        generator=str(root / "generator"),
        discriminator=str(root / "discriminator"),
        layers=(1, 3),
        **options,
    )


def config(root: Path, stage: str, precision: Any, **changes: Any) -> TrainConfig:
    return train_config(
        stages(root)[stage],
        optimizer=OPTIMIZER,
        precision=precision,
        micro_batch_size=1,
        activation_checkpointing=precision == "bf16",
        **changes,
    )


def train(config: TrainConfig, parallel: Parallel, folder: Path | None = None) -> dict[str, Any]:
    """Metrics, counts and whole weights after some updates; rank 0 has the weights."""
    with LiveTensors() as built:
        stage = make_stage(config, parallel)
    share = config.batch_size // parallel.data_size
    mine = micro_batches(1)[parallel.data_rank * share :][:share]
    found: dict[str, Any] = {"built": built.peak, "states": {}}
    for update in range(UPDATES):
        with CollectiveCounter() as counter:
            metrics = {}
            for part in stage.parts().values():
                metrics |= floats(part(mine, update))
                for trained in stage.trained.values():
                    trained.zero_grad()
        found |= {"calls": dict(counter.calls), "sent": dict(counter.sent)}
        found[f"metrics {update}"] = parallel.mean(metrics)
    found["states"] = bytes_of([trained.state() for trained in stage.trained.values()])
    found["weights"] = whole(stage)
    if folder is not None:
        with LiveTensors() as exported:
            save_outcome(stage, config, parallel, folder, updates=UPDATES)
        found |= {"exported": exported.peak, "largest": exported.largest}
    return found


def write_shards(folder: Path) -> None:
    """A model of many tensors in six files, and what they hold in one."""
    state = create_model("mmdit_small", **DEEP).state_dict()
    names = list(state)
    files = {name: f"part-{number % 6}.safetensors" for number, name in enumerate(names)}
    folder.mkdir()
    for file in set(files.values()):
        write_safetensors(folder / file, {k: v for k, v in state.items() if files[k] == file})
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    write_safetensors(folder / "whole.safetensors", state)


def stream(folder: Path, name: str, parallel: Parallel) -> dict[str, int]:
    """Bytes that a rank allocates to load a sharded checkpoint, and to write it out again."""
    with LiveTensors() as loading:
        model = load_model(folder / INDEX, architecture="mmdit_small", options=DEEP, device="meta")
        parallel.shard(model, model.block_list())
        fill_from_origins(model, parallel.device)
    with LiveTensors() as saving:
        tensors = WholeTensors(model_state(model))
        with tensors.shown() as here:
            if here:
                like = {key: value.to("meta") for key, value in model_state(model).items()}
                save_tensors(folder / f"{name}.safetensors", tensors, like=like)
    return {
        "share": bytes_of(model_state(model)),
        "loading": loading.peak,
        "saving": saving.peak,
        "whole": sum(value.numel() * 4 for value in model.state_dict().values()),
        "largest": max(value.numel() * 4 for value in model.state_dict().values()),
    }


def whole(stage: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, trained in stage.trained.items():
        state |= {f"{name}/{key}": value for key, value in model_state(trained.module).items()}
        if trained.ema is not None:
            state |= {f"{name}/ema/{key}": v for key, v in trained.ema.state_dict().items()}
    for part, tensors in stage.extra_state().items():
        state |= {f"{part}/{key}": value for key, value in tensors.items()}
    tensors = WholeTensors(state)
    with tensors.shown() as here:
        return {name: tensors[name].clone() for name in tensors} if here else {}


def main(root: Path, names: list[str]) -> None:
    save_start(root)
    if not (root / "deep").exists():  # another call's
        write_shards(root / "deep")

    def work(name: str) -> Callable[[Parallel], None]:
        def go(parallel: Parallel) -> None:
            report: dict[str, Any] = {}
            weights: dict[str, dict[str, Tensor]] = {}
            for stage in stages(root):
                if name == "one" and stage == "apart":
                    continue  # it is held against "apt"
                for precision in ("fp32", "bf16"):
                    key = f"{stage} {precision}"
                    folder = root / name / stage if precision == "fp32" else None
                    layout = LAYOUTS[name][1]
                    chosen = config(root, stage, precision, parallel=layout)
                    found = train(chosen, parallel, folder)
                    weights[key] = found.pop("weights")
                    report[key] = found
            report["stream"] = stream(root / "deep", name, parallel)
            (root / f"{name}.{parallel.rank}.json").write_text(json.dumps(report))
            if parallel.is_main:
                torch.save(weights, root / f"{name}.pt")

        return go

    begun = [begin(LAYOUTS[name][0], work(name), LAYOUTS[name][1]) for name in names]
    for children in begun:
        wait_for(children)
