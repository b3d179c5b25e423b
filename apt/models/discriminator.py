"""The discriminator: a diffusion backbone with heads on its hidden tokens (APT Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt.errors import ConfigError
from apt.models.conditions import TextCondition
from apt.models.protocols import Backbone
from apt.models.registry import HEADS

# Blocks 16, 26 and 36 of the paper's 36, counted from 1.
_PAPER_DEPTHS = (16 / 36, 26 / 36, 1.0)


class DiscriminatorOutput(NamedTuple):
    """Logits (B,) fp32, and the features (B, D) fp32 of each head."""

    logits: Tensor
    features: list[Tensor]


class Discriminator(nn.Module):
    """D(x, t, c): one fp32 logit per sample, for clean latents x.

    Head features are concatenated, normalised and projected. Heads, norm and projection run in
    fp32 whatever autocast says: at |logit| = 2 one bf16 ulp is 0.016, as large as the difference
    that the approximated R1 squares.

    Args:
        backbone: any backbone, usually with the weights of the diffusion model. It becomes the
            discriminator's own: layers that no head reads are deleted from it, so every parameter
            left trains.
        head: registered head, "attention" (the paper) or "conv3d".
        layers: blocks whose tokens are read, counted from 1, rising; None scales the paper's 16, 26
            and 36 of 36 to the backbone's depth.

    Raises:
        ConfigError: layers outside 1..depth, or not rising.
    """

    def __init__(
        self, backbone: Backbone, *, head: str = "attention", layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        chosen = paper_layers(backbone.depth) if layers is None else tuple(layers)
        if not chosen or list(chosen) != sorted(set(chosen)):
            raise ConfigError(f"discriminator layers must be rising, got {list(chosen)}")
        if chosen[0] < 1 or chosen[-1] > backbone.depth:
            raise ConfigError(
                f"discriminator layers {list(chosen)} must lie in 1..{backbone.depth}, "
                "the backbone's blocks counted from 1"
            )
        backbone.keep_hidden_states(chosen[-1])
        self.backbone = backbone
        self.layers = chosen
        width = backbone.hidden_size
        self.heads = nn.ModuleList(HEADS.create(head, hidden_size=width) for _ in chosen)
        self.norm = nn.LayerNorm(width * len(chosen))
        self.project = nn.Linear(width * len(chosen), 1)

    def forward(
        self, x: Tensor, t: Tensor, c: TextCondition, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        """Judge clean latents x (B, C, T, H, W).

        `t` (R,) in [0, 1] only tells the backbone which of its features to use (APT Eq. 6): x is
        never noised. `rows` (B,) int64 lets real, perturbed and generated samples share a row of
        `t` and `c`; None if R = B.
        """
        hidden = self.backbone.hidden_states(x, t, c, layers=self.layers, rows=rows)
        grid = self.backbone.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self.heads, hidden, strict=True)
            features = [head(tokens.float(), grid) for head, tokens in pairs]
            logits = self.project(self.norm(torch.cat(features, dim=-1)))[:, 0]
        return DiscriminatorOutput(logits, features)

    def head_parameters(self) -> list[nn.Parameter]:
        """What is not the backbone."""
        return [*self.heads.parameters(), *self.norm.parameters(), *self.project.parameters()]


def paper_layers(depth: int) -> tuple[int, ...]:
    """The paper's head positions scaled to another depth, counted from 1, without repeats."""
    return tuple(sorted({max(1, round(depth * fraction)) for fraction in _PAPER_DEPTHS}))


def create_discriminator(
    backbone: Backbone, *, head: str = "attention", layers: Sequence[int] | None = None
) -> Discriminator:
    """`Discriminator` over any registered backbone; see there."""
    return Discriminator(backbone, head=head, layers=layers)
