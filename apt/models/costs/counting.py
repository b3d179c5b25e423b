"""What the counters of all networks are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apt.kernels.costs import (
    Norm,
    OpCost,
    attention_cost,
    elementwise_cost,
    linear_cost,
    modulated_norm_cost,
    qk_norm_rope_cost,
    residual_modulated_norm_cost,
)
from apt.models.costs.forward import LayerCost


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a forward pass is given.

    Attributes:
        batch: B samples.
        latent_shape: (T, H, W) of the latents.
        text_tokens: S of the text encoder.
        rows: R rows of timesteps and text.
        dtype: of weights and activations.
    """

    batch: int
    latent_shape: tuple[int, int, int]
    text_tokens: int
    rows: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Costs of the ops that transformers over tokens (B, L, D) share, by length.

    Attributes:
        sizes: of the pass.
        width, heads: D and H.
        norm: of tokens.
    """

    sizes: Sizes
    width: int
    heads: int
    norm: Norm

    def linear(self, tokens: int, inputs: int, outputs: int) -> OpCost:
        """A projection; without tokens there is none."""
        if not tokens:
            return OpCost()
        return linear_cost(tokens, inputs, outputs, dtype=self.sizes.dtype)

    def attention(self, queries: int, keys: int) -> OpCost:
        """Of every sample's `queries` tokens over `keys` tokens."""
        heads = self.heads
        return attention_cost(
            self.sizes.batch, queries, keys, heads, self.width // heads, dtype=self.sizes.dtype
        )

    def modulated_norm(self, length: int) -> OpCost:
        """Before attention."""
        return modulated_norm_cost(
            self.sizes.batch, length, self.width, num_rows=self.sizes.rows, norm=self.norm,
            dtype=self.sizes.dtype,
        )  # fmt: skip

    def boundary(self, length: int, *, affine: bool = False) -> OpCost:
        """Gated residual, norm (with weight and bias if `affine`) and modulation in one pass."""
        return residual_modulated_norm_cost(
            self.sizes.batch, length, self.width, num_rows=self.sizes.rows, norm=self.norm,
            weight=affine, bias=affine, dtype=self.sizes.dtype,
        )  # fmt: skip

    def head_norms(
        self, batch: int, length: int, *, tensors: int, rope: bool, across_heads: bool = False,
        copied: int = 0,
    ) -> OpCost:  # fmt: skip
        """Norm of `tensors` of q and k of `batch` rows of tokens, their rotation if `rope`."""
        heads = self.heads
        return qk_norm_rope_cost(
            batch, length, heads, self.width // heads, num_tensors=tensors, rope=rope,
            across_heads=across_heads, copied=copied, dtype=self.sizes.dtype,
        )  # fmt: skip

    def copies(self, tokens: int) -> OpCost:
        """Tokens of D channels read and written as they are."""
        values = tokens * self.width
        return elementwise_cost(values, values, 0, dtype=self.sizes.dtype)

    def gated_add(self, length: int) -> OpCost:
        """x + gate * h, a gate for each row."""
        values = self.sizes.batch * length * self.width
        gates = self.sizes.rows * self.width
        return elementwise_cost(2 * values + gates, values, 2 * values, dtype=self.sizes.dtype)

    def mlp(self, length: int, hidden: int) -> LayerCost:
        """Two layers with a tanh-GELU between them, fused into the first at best."""
        tokens = self.sizes.batch * length
        values = tokens * hidden
        return LayerCost(
            linear=self.linear(tokens, self.width, hidden)
            + self.linear(tokens, hidden, self.width),
            # tanh as one of about 8 operations
            elementwise=elementwise_cost(values, values, 8 * values, dtype=self.sizes.dtype),
        )

    def ends(
        self, length: int, *, patch: int, text: int, text_dim: int, embedded: Sequence[int]
    ) -> LayerCost:
        """Patches in and out, text in, two layers for each vector of a row, and the last norm.

        Args:
            length: L.
            patch: values of a patch.
            text, text_dim: tokens of a row, and their channels.
            embedded: sizes of the vectors, such as 256 for the sinusoids of a timestep.
        """
        rows, d = self.sizes.rows, self.width
        tokens = self.sizes.batch * length
        products = self.linear(tokens, patch, d) + self.linear(tokens, d, patch)
        products += self.linear(rows * text, text_dim, d)
        for size in embedded:
            products += self.linear(rows, size, d) + self.linear(rows, d, d)
        # The boundary before the last norm belongs to the last block once all is fused
        return LayerCost(
            linear=products, elementwise=self.modulated_norm(length), elementwise_fused=OpCost()
        )
