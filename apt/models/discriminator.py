"""The discriminator: a diffusion backbone with heads on its hidden tokens (APT Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt.errors import ConfigError, InputError
from apt.kernels import perturbed_batch
from apt.models.conditions import TextCondition
from apt.models.protocols import Backbone
from apt.models.registry import HEADS

# Blocks 16, 26 and 36 of the paper's 36, counted from 1.
_PAPER_DEPTHS = (16 / 36, 26 / 36, 1.0)


class DiscriminatorOutput(NamedTuple):
    """Logits (B,) fp32, and the features (B, D) fp32 of each head."""

    logits: Tensor
    features: list[Tensor]


class PairOutput(NamedTuple):
    """What D says of real samples (B), of their perturbed copies (P), and of generated ones (F)."""

    real: DiscriminatorOutput
    perturbed: DiscriminatorOutput
    fake: DiscriminatorOutput


class Discriminator(nn.Module):
    """D(x, t, c): one fp32 logit per sample, for clean latents x.

    Head features are concatenated, normalised and projected. Heads, norm and projection run in
    fp32 whatever autocast says: at |logit| = 2 one bf16 ulp is 0.016, as large as the difference
    that the approximated R1 squares. Tokens reach a head in the backbone's type, autocast off, and
    the head widens them: the attention head on the way, without a copy of all tokens in fp32.

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
            features = [head(tokens, grid) for head, tokens in pairs]
            logits = self.project(self.norm(torch.cat(features, dim=-1)))[:, 0]
        return DiscriminatorOutput(logits, features)

    def forward_groups(
        self, x: Tensor, t: Tensor, c: TextCondition, groups: Mapping[str, Tensor]
    ) -> dict[str, DiscriminatorOutput]:
        """Judge several groups of samples in one pass, as if in one call each.

        All groups share what depends on `t` and `c` alone, by index: the timestep embedding, the
        pooled text, the modulation of every block and the first projection of the text are computed
        once for each of the R rows, and the rotary tables once. What cannot be shared are the text
        tokens in the blocks: attention mixes the sample into them, so each sample has its own from
        the first block on. A sharded D gathers its weights once for all groups.

        Args:
            x: latents (B, C, T, H, W), the groups one after the other.
            t: (R,) in [0, 1].
            c: R rows.
            groups: for each group, in the order of x, the rows (n,) int64 of its samples; may be
                empty.

        Returns:
            For each group its logits (n,) and features (n, D).

        Raises:
            InputError: groups whose sizes do not add up to B.
        """
        sizes = [len(rows) for rows in groups.values()]
        if sum(sizes) != x.shape[0]:
            raise InputError(
                f"groups {dict(zip(groups, sizes, strict=True))} must add up to the "
                f"{x.shape[0]} samples of x"
            )
        logits, features = self(x, t, c, rows=torch.cat([*groups.values()]))
        of_groups = zip(*(feature.split(sizes) for feature in features), strict=True)
        parts = zip(groups, logits.split(sizes), of_groups, strict=True)
        return {name: DiscriminatorOutput(part, [*of_group]) for name, part, of_group in parts}

    def forward_pair(
        self,
        x_real: Tensor,
        x_fake: Tensor,
        t: Tensor,
        c: TextCondition,
        *,
        sigma: float,
        seed: int,
        step: int,
        offset: int,
        num_perturbed: int | None = None,
    ) -> PairOutput:
        """All that the approximated R1 needs (APT Eqs. 9-10), in one pass: see `forward_groups`.

            output = discriminator.forward_pair(x_real, x_fake, t, c, sigma=0.1, seed=0, step=step,
                                                offset=rank * len(x_real))
            penalty = (output.real.logits - output.perturbed.logits).square().mean()

        Args:
            x_real: latents (B, C, T, H, W).
            x_fake: (F, C, T, H, W), F at most B.
            t: (B,) in [0, 1]; sample i of every group has row i.
            c: B rows.
            sigma, seed, step, offset, num_perturbed: of `apt.kernels.perturbed_batch`.

        Raises:
            InputError: more generated samples than rows, and what `perturbed_batch` raises.
        """
        num_real, num_fake = x_real.shape[0], x_fake.shape[0]
        if num_fake > num_real:
            raise InputError(
                f"forward_pair: {num_fake} generated samples for the rows of {num_real} real ones; "
                "use forward_groups to say which row each has"
            )
        x = perturbed_batch(
            x_real,
            x_fake,
            sigma,
            seed=seed,
            step=step,
            offset=offset,
            num_perturbed=num_perturbed,
        )
        rows = torch.arange(num_real, device=x.device)
        perturbed = rows[: x.shape[0] - num_real - num_fake]
        groups = {"real": rows, "perturbed": perturbed, "fake": rows[:num_fake]}
        return PairOutput(**self.forward_groups(x, t, c, groups))

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
