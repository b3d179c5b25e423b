"""Training through LoRA adapters (peft): few weights train, and the base stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from apt.checkpoints.lora import LoRALayer
from apt.checkpoints.lora.layers import Layer
from apt.checkpoints.origin import BASE_LAYER, stored_piece
from apt.errors import ConfigError, MissingPackageError
from apt.models.transformer import DiffusionTransformer
from apt.rng import generator_for
from apt.train.config import LoRAConfig
from apt.train.networks import model_state

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(
    backbone: DiffusionTransformer,
    config: LoRAConfig,
    *,
    seed: int,
    begun: Mapping[str, Layer] = MappingProxyType({}),
) -> None:
    """Put adapters beside linear layers, in place; only they train from now on.

    They begin as no change, or as those that are given. Does nothing if the rank is 0.

    Args:
        backbone: whose blocks get them.
        config: rank, alpha, and which layers.
        seed: of their random halves.
        begun: adapters to go on from, by module name.

    Raises:
        MissingPackageError: peft is not installed.
        ConfigError: no layer has one of the names, or `begun` are of other layers or another rank.
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
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=chosen
    )
    peft.inject_adapter_in_model(options, backbone)
    _begin(backbone, seed)
    if begun:
        _go_on(backbone, config, begun)


class BaseWeights(Mapping[str, Tensor]):
    """A network's whole weights in the names that they have without adapters.

    Each is made when it is asked for. What is held in bf16 because it does not train is what the
    file has that it came from.

    Args:
        network: with adapters or without.
        state: its whole weights by name.
    """

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._network, self._state = network, state
        self._held = {
            name: value.dtype for name, value in model_state(network).items() if name in state
        }
        self._names = {
            name.replace(BASE_LAYER, "."): name for name in state if not name.endswith((_DOWN, _UP))
        }

    def __getitem__(self, name: str) -> Tensor:
        ours = self._names[name]
        if self._held[ours] == torch.bfloat16:
            piece = stored_piece(self._network, ours)
            if piece is not None:
                with piece.stored.mapped() as stored:
                    return piece.take(stored).to(torch.float32, copy=True)
        return self._state[ours]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def find_adapters(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, LoRALayer]:
    """The adapters in a network's whole weights, by module name."""
    scale = (config.alpha or config.rank) / max(config.rank, 1)
    names = [name.removesuffix(_DOWN) for name in state if name.endswith(_DOWN)]
    return {name: LoRALayer(state[name + _DOWN], state[name + _UP], scale) for name in names}


def _begin(backbone: DiffusionTransformer, seed: int) -> None:
    """Random values for the lower halves, and zeros for the upper ones, on the CPU.

    peft puts them where the layer beside them is, which may be on the meta device.
    """
    for name, layer in backbone.named_modules():
        if not isinstance(layer, nn.Linear) or ".lora_" not in name:
            continue
        weight = torch.zeros(layer.weight.shape)
        if f"{name}.weight".endswith(_DOWN):
            generator = generator_for(seed, "adapter", name)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        layer.weight = nn.Parameter(weight)


@torch.no_grad()
def _go_on(backbone: DiffusionTransformer, config: LoRAConfig, begun: Mapping[str, Layer]) -> None:
    """Put adapters of before in the place of new ones."""
    scale = (config.alpha or config.rank) / config.rank
    parameters = dict(backbone.named_parameters())
    places = {name.removesuffix(_DOWN) for name in parameters if name.endswith(_DOWN)}
    if places != begun.keys():
        odd = sorted(places ^ begun.keys())
        raise ConfigError(
            f"the adapters to go on from are beside other layers than lora.targets says, such as "
            f"{odd[0]}; use the options that they were trained with"
        )
    for name, layer in begun.items():
        down, up = parameters[name + _DOWN], parameters[name + _UP]
        if not isinstance(layer, LoRALayer) or layer.down.shape != down.shape:
            raise ConfigError(
                f"lora.rank is {config.rank}, and the adapter of {name} to go on from is another; "
                "use the options that it was trained with"
            )
        down.copy_(layer.down)
        up.copy_(layer.up * (layer.scale / scale))


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
