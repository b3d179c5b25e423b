"""Training through LoRA adapters (peft): few weights train, and the base stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apt.checkpoints.lora import LoRALayer
from apt.errors import ConfigError, MissingPackageError
from apt.models.transformer import DiffusionTransformer
from apt.train.config import LoRAConfig

_BASE = ".base_layer."
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(backbone: DiffusionTransformer, config: LoRAConfig, *, seed: int) -> None:
    """Put adapters beside linear layers, in place; only they train from now on.

    They begin as no change. Does nothing if the rank is 0.

    Args:
        backbone: whose blocks get them.
        config: rank, alpha, and which layers.
        seed: of their random halves.

    Raises:
        MissingPackageError: peft is not installed.
        ConfigError: no layer has one of the names.
    """
    if not config.rank:
        return
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"training through LoRA needs peft, which does not import here ({error}); "
            "run `pip install 'diffusion-apt[lora]'`"
        ) from error
    chosen = _targets(backbone, config.targets)
    torch.manual_seed(seed)
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=chosen
    )
    peft.inject_adapter_in_model(options, backbone)


def split_adapters(
    state: Mapping[str, Tensor], config: LoRAConfig
) -> tuple[dict[str, Tensor], dict[str, LoRALayer]]:
    """A backbone's state with adapters as the base's own state, and the adapters by module name."""
    base = {
        name.replace(_BASE, "."): value
        for name, value in state.items()
        if not name.endswith((_DOWN, _UP))
    }
    scale = (config.alpha or config.rank) / max(config.rank, 1)
    layers = {
        name.removesuffix(_DOWN): LoRALayer(down, state[name.removesuffix(_DOWN) + _UP], scale)
        for name, down in state.items()
        if name.endswith(_DOWN)
    }
    return base, layers


def _targets(backbone: DiffusionTransformer, wanted: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers inside blocks whose names end in one of `wanted`."""
    inside = {id(module) for block in backbone.block_list() for module in block.modules()}
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    chosen = [
        name
        for name in linear
        if not wanted or any(f".{name}".endswith(f".{suffix}") for suffix in wanted)
    ]
    unused = [s for s in wanted if not any(f".{name}".endswith(f".{s}") for name in chosen)]
    if unused or not chosen:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"lora.targets {', '.join(unused)} name no linear layer of the blocks; there are "
            f"{', '.join(ends)} (a name may be longer, such as attn1.to_q)"
        )
    return chosen
