"""The cost of one forward pass: its blocks, its ends, and the least time that it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from apt.kernels.costs import OpCost
from apt.kernels.roofline import Rates


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The three kinds of work in a block.

    Attributes:
        linear: matrix products, and the convolution that turns patches into tokens.
        attention: softmax attention.
        elementwise: everything else as the models run it with `apt.kernels`, one pass per op.
        elementwise_fused: the same if everything that can be fused is: GELU, gated adds, copies and
            the layout of q, k and v take no pass of their own.
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
        linear, attention: roofline times of matrix products and attention.
        elementwise, elementwise_fused: memory traffic, as in `LayerCost`.
    """

    linear: float
    attention: float
    elementwise: float
    elementwise_fused: float

    @property
    def matmul(self) -> float:
        """Matrix products and attention only: the floor of any implementation in this dtype."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        """With every op of `apt.kernels` at full bandwidth and no overlap."""
        return self.matmul + self.elementwise

    @property
    def total_fused(self) -> float:
        """With everything fused that can be."""
        return self.matmul + self.elementwise_fused


@dataclass(frozen=True, kw_only=True)
class DiTCost:
    """One forward pass.

    Attributes:
        batch, visual_tokens, text_tokens: B, L and S.
        head_dim: channels of an attention head, on which the rate of attention depends.
        layers: one cost for each block.
        ends: embeddings, the modulation that all blocks share, and the output layer.
    """

    batch: int
    visual_tokens: int
    text_tokens: int
    head_dim: int
    layers: tuple[LayerCost, ...]
    ends: LayerCost

    @property
    def total(self) -> LayerCost:
        return sum(self.layers, self.ends)

    @property
    def flops(self) -> int:
        """FLOPs of matrix products and attention, which is what a model's "TFLOPs" usually mean."""
        return self.total.linear.flops + self.total.attention.flops

    def floor(self, rates: Rates) -> Floor:
        """Return the least time that a machine with these rates needs."""
        total = self.total
        parts = [*self.layers, self.ends]
        return Floor(
            linear=sum(rates.seconds(part.linear) for part in parts),
            attention=sum(rates.attention_seconds(part.attention) for part in parts),
            elementwise=rates.seconds(total.elementwise),
            elementwise_fused=rates.seconds(total.elementwise_fused),
        )
