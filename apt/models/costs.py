"""What one forward pass of an MMDiT moves and computes, layer by layer, and its floor in time.

Shapes: B samples, L visual tokens, S text tokens, D hidden size, R rows of conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from apt.errors import InputError
from apt.kernels.costs import (
    OpCost,
    attention_cost,
    elementwise_cost,
    linear_cost,
    modulated_norm_cost,
    qk_norm_rope_cost,
    residual_modulated_norm_cost,
)
from apt.kernels.roofline import Rates
from apt.models.mmdit import MMDiTConfig


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The three kinds of work in a block.

    Attributes:
        linear: matrix products.
        attention: softmax attention.
        elementwise: everything else as `apt.kernels` fuses it, one pass for an op.
        elementwise_fused: the same if GELU, the gated add after the MLP and the layout of v cost
            no pass of their own: what is left to fuse.
    """

    linear: OpCost = field(default_factory=OpCost)
    attention: OpCost = field(default_factory=OpCost)
    elementwise: OpCost = field(default_factory=OpCost)
    elementwise_fused: OpCost = field(default_factory=OpCost)

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            elementwise=self.elementwise + other.elementwise,
            elementwise_fused=self.elementwise_fused + other.elementwise_fused,
        )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of one forward pass at given rates, one kind of work after the other.

    Attributes:
        linear, attention: rooflines of matrix products and attention.
        elementwise, elementwise_fused: traffic, as in `LayerCost`.
    """

    linear: float
    attention: float
    elementwise: float
    elementwise_fused: float

    @property
    def matmul(self) -> float:
        """Matrix products and attention alone: the floor of any implementation in this type."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        """With every op of `apt.kernels` at full bandwidth, nothing overlapped."""
        return self.matmul + self.elementwise

    @property
    def total_fused(self) -> float:
        """With all that can be fused."""
        return self.matmul + self.elementwise_fused


@dataclass(frozen=True, kw_only=True)
class DiTCost:
    """One forward pass.

    Attributes:
        batch, visual_tokens, text_tokens: B, L and S.
        layers: one cost for each block.
        ends: embeddings, modulation that all blocks share, and the output layer.
    """

    batch: int
    visual_tokens: int
    text_tokens: int
    layers: tuple[LayerCost, ...]
    ends: LayerCost

    @property
    def total(self) -> LayerCost:
        return sum(self.layers, self.ends)

    @property
    def flops(self) -> int:
        """Of matrix products and attention: what a "TFLOP" of a model means."""
        return self.total.linear.flops + self.total.attention.flops

    def floor(self, rates: Rates) -> Floor:
        """How fast a machine of these rates could be."""
        total = self.total
        parts = [*self.layers, self.ends]
        return Floor(
            linear=sum(rates.seconds(part.linear) for part in parts),
            attention=sum(rates.attention_seconds(part.attention) for part in parts),
            elementwise=rates.seconds(total.elementwise),
            elementwise_fused=rates.seconds(total.elementwise_fused),
        )


def dit_cost(
    config: MMDiTConfig,
    batch: int,
    latent_shape: tuple[int, int, int],
    *,
    text_tokens: int = 256,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> DiTCost:
    """The cost of `MMDiT.forward` without a mask.

    Args:
        config: of the model.
        batch: B.
        latent_shape: (T, H, W) of the latents, multiples of the patch.
        text_tokens: S; 0 counts visual tokens alone. The paper gives none; 256 is usual.
        num_rows: R rows of timesteps and text; None: R = B.
        dtype: of weights and activations.

    Raises:
        InputError: latents that the patch does not divide, or counts that make no sense.
    """
    if batch < 1 or text_tokens < 0 or (num_rows is not None and num_rows < 1):
        raise InputError(
            f"batch and num_rows must be at least 1 and text_tokens at least 0, got {batch}, "
            f"{num_rows}, {text_tokens}"
        )
    length = 1
    for size, patch in zip(latent_shape, config.patch_size, strict=True):
        if size < patch or size % patch:
            raise InputError(
                f"latents {latent_shape} are no multiple of the patch {config.patch_size}"
            )
        length *= size // patch
    counter = _Counter(config, batch, length, text_tokens, num_rows or batch, dtype)
    return DiTCost(
        batch=batch,
        visual_tokens=length,
        text_tokens=text_tokens,
        layers=tuple(counter.layer(number) for number in range(config.depth)),
        ends=counter.ends(),
    )


@dataclass(frozen=True)
class _Counter:
    config: MMDiTConfig
    batch: int
    length: int
    text: int
    rows: int
    dtype: torch.dtype

    def linear(self, tokens: int, inputs: int, outputs: int) -> OpCost:
        if not tokens:
            return OpCost()
        return linear_cost(tokens, inputs, outputs, dtype=self.dtype)

    def layer(self, number: int) -> LayerCost:
        last = number == self.config.depth - 1
        dual = self.config.num_dual_blocks is None or number < self.config.num_dual_blocks
        cost = self.attention(queries=self.length + (0 if last else self.text))
        cost += self.stream(self.length, output=True, projected=3, normed=2, rope=True)
        if self.text:
            # Behind the last block nothing reads text: weights that it shares make its q all the
            # same, but only k is normalised
            cost += self.stream(
                self.text, output=not last, projected=2 if last and dual else 3,
                normed=1 if last else 2, rope=False,
            )  # fmt: skip
        if self.config.modulation == "block":
            d = self.config.hidden_size
            cost += LayerCost(linear=(2 if dual else 1) * self.linear(self.rows, d, 6 * d))
        return cost

    def attention(self, queries: int) -> LayerCost:
        heads = self.config.num_heads
        return LayerCost(
            attention=attention_cost(
                self.batch,
                queries,
                self.length + self.text,
                heads,
                self.config.hidden_size // heads,
                dtype=self.dtype,
            )
        )

    def stream(
        self, length: int, *, output: bool, projected: int, normed: int, rope: bool
    ) -> LayerCost:
        """One modality in a block; q, k and v, as far as `projected` and `normed` say."""
        d, heads = self.config.hidden_size, self.config.num_heads
        width = int(d * self.config.mlp_ratio)
        tokens = self.batch * length
        linear = self.linear(tokens, d, projected * d)
        norm = modulated_norm_cost(self.batch, length, d, num_rows=self.rows, dtype=self.dtype)
        qk = {
            copied: qk_norm_rope_cost(
                self.batch,
                length,
                heads,
                d // heads,
                num_tensors=normed,
                copied=copied,
                rope=rope,
                dtype=self.dtype,
            )
            for copied in (0, 1)
        }
        if not output:
            return LayerCost(
                linear=linear, elementwise=norm + qk[1], elementwise_fused=norm + qk[0]
            )
        linear += self.linear(tokens, d, d) + self.linear(tokens, d, width)
        linear += self.linear(tokens, width, d)
        boundary = residual_modulated_norm_cost(
            self.batch, length, d, num_rows=self.rows, dtype=self.dtype
        )
        # tanh as one of about 8 operations; x + gate * h
        gelu = elementwise_cost(
            tokens * width, tokens * width, 8 * tokens * width, dtype=self.dtype
        )
        gated_add = elementwise_cost(
            2 * tokens * d + self.rows * d, tokens * d, 2 * tokens * d, dtype=self.dtype
        )
        return LayerCost(
            linear=linear,
            elementwise=norm + qk[1] + boundary + gelu + gated_add,
            # The gated add and the next norm are one boundary
            elementwise_fused=2 * boundary + qk[0],
        )

    def ends(self) -> LayerCost:
        config, d = self.config, self.config.hidden_size
        t, h, w = config.patch_size
        patch = config.in_channels * t * h * w
        tokens = self.batch * self.length
        linear = self.linear(tokens, patch, d) + self.linear(tokens, d, patch)
        linear += self.linear(self.rows * self.text, config.text_dim, d)
        linear += self.linear(self.rows, 256, d) + self.linear(self.rows, d, d)
        if config.pooled_dim:
            linear += self.linear(self.rows, config.pooled_dim, d) + self.linear(self.rows, d, d)
        if config.modulation == "shared":
            linear += self.linear(self.rows, d, 6 * d)
        linear += self.linear(self.rows, d, 2 * d)
        norm = modulated_norm_cost(self.batch, self.length, d, num_rows=self.rows, dtype=self.dtype)
        # The boundary before it belongs to the last block once all is fused
        return LayerCost(linear=linear, elementwise=norm, elementwise_fused=OpCost())
