"""Training with LoRA adapters (peft): few weights train, and the base stays unchanged."""

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
    """Add adapters to linear layers, in place; from then on only the adapters train.

    New adapters leave the outputs unchanged at first. Does nothing if the rank is 0.

    Args:
        backbone: the network whose blocks get adapters.
        config: rank, alpha, and which layers.
        seed: for the random half of each adapter.
        begun: adapters to continue from, by module name.

    Raises:
        MissingPackageError: peft is not installed.
        ConfigError: a name matches no layer, or `begun` has other layers or another rank.
    """
    if not config.rank:
        return
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"training with LoRA needs peft, which cannot be imported ({error}); "
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
    """A network's whole weights, under the names that they have without adapters.

    Each tensor is made when it is read. Weights that are held in bf16 because they do not train are
    read from the file that they came from.

    Args:
        network: a network with or without adapters.
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
    """Return the adapters among a network's whole weights, by module name."""
    scale = (config.alpha or config.rank) / max(config.rank, 1)
    names = [name.removesuffix(_DOWN) for name in state if name.endswith(_DOWN)]
    return {name: LoRALayer(state[name + _DOWN], state[name + _UP], scale) for name in names}


def _begin(backbone: DiffusionTransformer, seed: int) -> None:
    """Initialise the down projections randomly and the up projections with zeros, on the CPU.

    peft creates them on the device of the layer beside them, which may be the meta device.
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
    """Replace the values of new adapters by those of earlier ones."""
    scale = (config.alpha or config.rank) / config.rank
    parameters = dict(backbone.named_parameters())
    places = {name.removesuffix(_DOWN) for name in parameters if name.endswith(_DOWN)}
    if places != begun.keys():
        odd = sorted(places ^ begun.keys())
        raise ConfigError(
            f"the adapters to continue from belong to other layers than lora.targets selects, such "
            f"as {odd[0]}; use the options that they were trained with"
        )
    for name, layer in begun.items():
        down, up = parameters[name + _DOWN], parameters[name + _UP]
        if not isinstance(layer, LoRALayer) or layer.down.shape != down.shape:
            raise ConfigError(
                f"lora.rank is {config.rank}, but the adapter of {name} to continue from has "
                "another rank or type; use the options that it was trained with"
            )
        down.copy_(layer.down)
        up.copy_(layer.up * (layer.scale / scale))


def _targets(backbone: DiffusionTransformer, wanted: tuple[str, ...]) -> list[str]:
    """Return the full names of linear layers in blocks whose names end in one of `wanted`."""
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
            f"lora.targets {', '.join(unused)} match no linear layer of the blocks; choose from: "
            f"{', '.join(ends)} (or a longer name, such as attn1.to_q)"
        )
    return chosen
