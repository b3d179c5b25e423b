"""The discriminator: a diffusion backbone with heads on its hidden tokens (APT Sec. 3.3).

Tokens have the backbone's dtype; a head computes and returns its features in the dtype of its own
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.condition import Condition
from apt.distributed.sequence import SequenceGroup, TokenSplit
from apt.errors import ConfigError, InputError
from apt.kernels import query_pooling
from apt.models.architectures import HEADS
from apt.models.transformer import DiffusionTransformer

# Blocks 16, 26 and 36 of the paper's 36, counted from 1.
_PAPER_DEPTHS = (16 / 36, 26 / 36, 1.0)

_HEAD_DIM = 64
_NORM_EPS = 1e-6


class DiscriminatorOutput(NamedTuple):
    """Logits (B,) fp32, and the features (B, D) fp32 of each head."""

    logits: Tensor
    features: list[Tensor]


class LogitNetwork(Protocol):
    """A discriminator as the losses see it: `Discriminator`, or any callable like it."""

    def __call__(
        self, x: Tensor, t: Tensor, c: Any, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        """Return logits of x (B, ...); sample i uses row `rows[i]` of t (R,) and c, or row i."""
        ...


class Discriminator(nn.Module):
    """D(x, t, c), the paper's D-hat of Eq. 6: one fp32 logit per sample, for clean latents x.

    Heads read the visual tokens after some of the blocks; their features are concatenated,
    normalised and projected (Sec. 3.3). Heads, norm and projection run in fp32 even inside
    autocast: at |logit| = 2 one bf16 ulp is 0.016, as large as the difference that the approximated
    R1 squares. Heads get tokens in the backbone's dtype and convert them to fp32; the attention
    head does so without an fp32 copy of all tokens.

    Args:
        backbone: any backbone, usually with the weights of the diffusion model. The discriminator
            takes it over and deletes the layers that no head reads, so that every remaining
            parameter trains. `create_discriminator` copies it first.
        head: registered head, "attention" (the paper's) or "conv3d".
        layers: blocks that the heads read, counted from 1, in increasing order; None scales the
            paper's 16, 26 and 36 of 36 to the backbone's depth.

    Raises:
        ConfigError: for layers that are not integers in 1..depth in increasing order.
        InputError: for an unknown head. Neither error changes the backbone.
    """

    def __init__(
        self,
        backbone: DiffusionTransformer,
        *,
        head: str = "attention",
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        chosen = paper_layers(backbone.depth) if layers is None else tuple(layers)
        if not all(isinstance(layer, int) for layer in chosen):
            raise ConfigError(f"discriminator layers must be integers, got {list(chosen)}")
        if not chosen or list(chosen) != sorted(set(chosen)):
            raise ConfigError(
                "discriminator layers must be at least one block, in increasing order, got "
                f"{list(chosen)}"
            )
        if chosen[0] < 1 or chosen[-1] > backbone.depth:
            raise ConfigError(
                f"discriminator layers {list(chosen)} must lie in 1..{backbone.depth}, "
                "the backbone's blocks counted from 1"
            )
        width = backbone.hidden_size
        heads = nn.ModuleList(HEADS.create(head, hidden_size=width) for _ in chosen)
        # Only after all arguments have been checked.
        backbone.keep_hidden_states(chosen[-1])
        self.backbone = backbone
        self.layers = chosen
        self.heads = heads
        self.norm = nn.LayerNorm(width * len(chosen))
        self.project = nn.Linear(width * len(chosen), 1)

    def forward(
        self, x: Tensor, t: Tensor, c: Condition, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        """Return logits and features of clean latents x (B, C, T, H, W).

        `t` (R,) in [0, 1] only selects which features the backbone computes (APT Eq. 6); no noise
        is added to x. With `rows` (B,) int64, real, perturbed and generated samples can share a row
        of `t` and `c`; None if R = B.
        """
        hidden = self.backbone.hidden_states(x, t, c, layers=self.layers, rows=rows)
        grid = self.backbone.token_grid(x.shape[2:])
        split = self.backbone.token_split(x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self.heads, hidden, strict=True)
            features = [_read(head, tokens, grid, split) for head, tokens in pairs]
            logits = self.project(self.norm(torch.cat(features, dim=-1)))[:, 0]
        return DiscriminatorOutput(logits, features)

    def __repr__(self) -> str:
        """Describe the module in one line, like its backbone."""
        from apt.words import described_weights

        head = type(self.heads[0]).__name__
        layers, weights = list(self.layers), described_weights(self)
        return f"Discriminator({self.backbone!r}, {head} after blocks {layers}, {weights})"

    def head_parameters(self) -> list[nn.Parameter]:
        """Return all parameters outside the backbone."""
        return [*self.heads.parameters(), *self.norm.parameters(), *self.project.parameters()]


def _read(
    head: nn.Module, tokens: Tensor, grid: tuple[int, int, int], split: TokenSplit | None
) -> Tensor:
    """Return a head's features (B, D); if tokens are split over ranks, all ranks get the same."""
    if split is None:
        features: Tensor = head(tokens, grid)
    elif isinstance(head, AttentionHead):
        features = head(tokens, grid, split.group)
    else:  # other heads need all tokens
        features = head(split.whole(tokens), grid)
    return features


def discriminate_groups(
    discriminator: LogitNetwork,
    x: Tensor,
    t: Tensor,
    c: Any,
    groups: Mapping[str, Tensor],
    *,
    apart: str | None = None,
) -> dict[str, DiscriminatorOutput]:
    """Return logits and features of several groups from one forward pass, as if from one each.

    Groups share everything that depends only on `t` and `c`: the timestep embedding, the pooled
    text, the modulation of every block and the first projection of the text are computed once for
    each of the R rows, and the rotary tables once. Text tokens inside the blocks cannot be shared:
    attention mixes the sample into them, so each sample has its own from the first block on. A
    sharded D gathers its weights once for all groups.

    Args:
        x: latents (B, C, T, H, W), group after group.
        t: (R,) in [0, 1].
        c: R rows.
        groups: for each group, in the order of x, the rows (n,) int64 of its samples; may be empty.
        apart: a group with a forward pass of its own, unless it is the only one; its activations
            are then not alive together with those of the others.

    Returns:
        Logits (n,) and features (n, D) of each group.

    Raises:
        InputError: if the sizes of the groups do not add up to B.
    """
    sizes = [len(rows) for rows in groups.values()]
    if sum(sizes) != x.shape[0]:
        raise InputError(
            f"groups {dict(zip(groups, sizes, strict=True))} must add up to the "
            f"{x.shape[0]} samples of x"
        )
    if apart is not None and apart in groups and len(groups) > 1:
        parts = dict(zip(groups, x.split(sizes), strict=True))
        found: dict[str, DiscriminatorOutput] = {}
        for names in ([name for name in groups if name != apart], [apart]):
            samples = torch.cat([parts[name] for name in names])
            rows = {name: groups[name] for name in names}
            found |= discriminate_groups(discriminator, samples, t, c, rows)
        return {name: found[name] for name in groups}
    logits, features = discriminator(x, t, c, rows=torch.cat([*groups.values()]))
    of_groups = [feature.split(sizes) for feature in features]
    return {
        name: DiscriminatorOutput(part, [feature[i] for feature in of_groups])
        for i, (name, part) in enumerate(zip(groups, logits.split(sizes), strict=True))
    }


def paper_layers(depth: int) -> tuple[int, ...]:
    """Return the paper's head positions scaled to a depth, counted from 1, without repeats."""
    return tuple(sorted({max(1, round(depth * fraction)) for fraction in _PAPER_DEPTHS}))


def create_discriminator(
    backbone: DiffusionTransformer,
    *,
    head: str = "attention",
    layers: Sequence[int] | None = None,
    copy: bool = True,
) -> Discriminator:
    """Build a `Discriminator` over a backbone, on its device; see there for other arguments.

    Args:
        copy: use a copy, and leave the backbone unchanged. False takes the backbone itself, which
            saves memory: it then loses the layers that no head reads.
    """
    device = next(backbone.parameters()).device
    own = deepcopy(backbone) if copy else backbone
    return Discriminator(own, head=head, layers=layers).to(device)


@HEADS.register("attention")
class AttentionHead(nn.Module):
    """Cross-attention-only block: one learnable query attends to all visual tokens.

    APT Sec. 3.3. Tokens (B, L, D) to features (B, D). The keys have no bias: softmax is invariant
    to it, so it would never train.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = max(1, hidden_size // _HEAD_DIM)
        if hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden size {hidden_size} is not divisible by the {self.num_heads} attention "
                "heads of the discriminator; change the backbone's hidden_size"
            )
        self.query = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)
        self.norm = nn.RMSNorm(hidden_size, eps=_NORM_EPS)
        self.to_query = nn.Linear(hidden_size, hidden_size)
        self.to_key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int, int],
        sequence: SequenceGroup | None = None,
    ) -> Tensor:
        """Return features (B, D) of tokens (B, L, D); the grid is not used.

        With `sequence`, the tokens are this rank's, but the features are those of all tokens.
        """
        attended = query_pooling(
            tokens,
            self.to_query(self.query),
            self.to_key.weight,
            self.to_value.weight,
            self.to_value.bias,
            num_heads=self.num_heads,
            norm_weight=self.norm.weight,
            eps=_NORM_EPS,
            out_dtype=self.query.dtype,
            sequence=sequence,
        )
        return self.query + self.out(attended)


@HEADS.register("conv3d")
class Conv3DHead(nn.Module):
    """Tokens on their (T, H, W) grid through a residual 3D convolution, averaged over positions.

    It sees local patches, while the attention head sees the whole. Tokens (B, L, D) to (B, D).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(hidden_size // 4, 1)
        self.norm = nn.RMSNorm(hidden_size, eps=_NORM_EPS)
        self.reduce = nn.Linear(hidden_size, width)
        self.conv = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return features (B, D) of tokens (B, L, D) with L = T H W."""
        t, h, w = grid
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        volume = rearrange(self.reduce(tokens), "b (t h w) d -> b d t h w", t=t, h=h, w=w)
        hidden = F.silu(volume + self.conv(F.silu(volume)))
        return self.out(hidden.mean(dim=(2, 3, 4)))
