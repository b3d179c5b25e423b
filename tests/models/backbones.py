"""Tiny versions of every registered backbone, for tests over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.models import MODELS
from apt.models.mmdit import MMDiTConfig
from apt.models.sd3 import SD3Config
from apt.models.transformer import DiffusionTransformer
from apt.models.wan import WanConfig
from apt.registry import replace_typed

CHANNELS, TEXT_DIM, POOLED_DIM, DEPTH = 4, 8, 6, 3

SHAPES: dict[type, dict[str, Any]] = {
    # 8 channels a head: 4 turn with time, 2 with height and 2 with width.
    MMDiTConfig: {"hidden_size": 24, "num_heads": 3},
    SD3Config: {
        "num_heads": 2,
        "head_dim": 6,
        "pooled_dim": POOLED_DIM,
        "max_positions": 12,
        "sample_size": 8,
    },
    WanConfig: {
        "hidden_size": 24,
        "num_heads": 2,
        "mlp_size": 20,
        "text_length": 9,
        "time_dim": 16,
        "max_positions": 32,
    },
}
"""Options that make a family small, besides channels, depth and text."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mmdit_shared_weights": ("mmdit_small", {"num_dual_blocks": 0}),
    "mmdit_block_modulation": ("mmdit_small", {"modulation": "block", "num_dual_blocks": 2}),
    "sd3_no_qk_norm": ("sd3.5_large", {"qk_norm": False}),
    "sd3_second_attention_last": ("sd3.5_large", {"dual_attention_layers": (2,)}),
    "wan_odd_patch": ("wan2.1_t2v_1.3b", {"patch_size": (2, 1, 3)}),
}
"""Variants that no registered size has, but that take their own path through the code."""


@dataclass(frozen=True)
class Case:
    """A tiny backbone and the inputs that it takes.

    Attributes:
        name: of the registered model that it is a tiny copy of.
        config: to build from.
        token_timesteps: whether its timesteps are one for each token.
    """

    name: str
    config: Any
    token_timesteps: bool = False

    def build(self, *, seed: int = 0, **changes: Any) -> DiffusionTransformer:
        """Random in every parameter: no layer is left at its initial zeros."""
        if "depth" in changes and isinstance(self.config, SD3Config):
            layers = self.config.dual_attention_layers
            changes["dual_attention_layers"] = tuple(i for i in layers if i < changes["depth"])
        with torch.random.fork_rng():
            model = dataclasses.replace(self.config, **changes).build()
        generator = torch.Generator().manual_seed(seed)
        # Without their norm, larger queries and keys make a softmax that amplifies rounding errors.
        std = 0.2 if getattr(self.config, "qk_norm", True) else 0.1
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        return model

    def inputs(
        self,
        samples: int = 2,
        grid: tuple[int, int, int] = (2, 2, 3),
        *,
        lengths: Sequence[int] = (),
        seed: int = 1,
    ) -> tuple[Tensor, Tensor, Condition]:
        """Latents, timesteps and text of 5 tokens; `lengths` are numbers of words, if there is
        padding behind them. Image models get one frame."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, CHANNELS, *self.latent_shape(grid), generator=generator)
        t = torch.rand(samples, generator=generator)
        if self.token_timesteps:
            length = torch.Size(self.config.token_grid(x.shape[2:])).numel()
            t = t[:, None] * torch.linspace(0.2, 1, length)
        tokens = torch.randn(samples, 5, TEXT_DIM, generator=generator)
        pooled = torch.randn(samples, POOLED_DIM, generator=generator)
        mask = torch.arange(5) < torch.tensor(lengths)[:, None] if lengths else None
        return x, t, Condition(EncodedText(tokens, mask, pooled))

    def latent_shape(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        patch = self.config.patch_size
        pt, ph, pw = (1, patch, patch) if isinstance(patch, int) else patch
        frames = 1 if isinstance(self.config, SD3Config) else grid[0] * pt
        return frames, grid[1] * ph, grid[2] * pw


def tiny_config(name: str, **options: Any) -> Any:
    """Return a registered model's config in a tiny shape, with its characteristic options."""
    config = MODELS.get(name)()
    assert type(config) in SHAPES, f"give {type(config).__name__} a tiny shape in SHAPES"
    options = {**SHAPES[type(config)], **options}
    if isinstance(config, MMDiTConfig) and config.pooled_dim:
        options["pooled_dim"] = POOLED_DIM
    if isinstance(config, SD3Config) and config.dual_attention_layers:
        options.setdefault("dual_attention_layers", (0, 1))
    shape = {"in_channels": CHANNELS, "depth": DEPTH, "text_dim": TEXT_DIM}
    return replace_typed(config, {**shape, **options})


def cases() -> dict[str, Case]:
    """Every registered model, unless another is the same in this shape, and the variants."""
    models: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MODELS.names()}
    found: dict[str, Case] = {}
    for name, (base, options) in (models | VARIANTS).items():
        case = Case(base, tiny_config(base, **options))
        if case.config in [other.config for other in found.values()]:
            continue
        found[name] = case
        if type(case.build()).token_timesteps:
            found[f"{name}_token_timesteps"] = dataclasses.replace(case, token_timesteps=True)
    return found


CASES = cases()
