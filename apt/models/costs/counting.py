"""Building blocks of the counters of all networks."""

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
    """Sizes of the inputs of a forward pass.

    Attributes:
        batch: B samples.
        latent_shape: (T, H, W) of the latents.
        text_tokens: S tokens from the text encoder.
        rows: R rows of timesteps and text.
        dtype: dtype of weights and activations.
    """

    batch: int
    latent_shape: tuple[int, int, int]
    text_tokens: int
    rows: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Counts the ops that transformers over tokens (B, L, D) share, given the number of tokens.

    Attributes:
        sizes: sizes of the pass.
        width, heads: D and H.
        norm: norm of the tokens.
    """

    sizes: Sizes
    width: int
    heads: int
    norm: Norm

    def linear(self, tokens: int, inputs: int, outputs: int) -> OpCost:
        """Count a projection of `tokens` tokens, which may be 0."""
        if not tokens:
            return OpCost()
        return linear_cost(tokens, inputs, outputs, dtype=self.sizes.dtype)

    def attention(self, queries: int, keys: int) -> OpCost:
        """Count attention of each sample's `queries` tokens over `keys` tokens."""
        heads = self.heads
        return attention_cost(
            self.sizes.batch, queries, keys, heads, self.width // heads, dtype=self.sizes.dtype
        )

    def modulated_norm(self, length: int) -> OpCost:
        """Count the modulated norm before attention."""
        return modulated_norm_cost(
            self.sizes.batch, length, self.width, num_rows=self.sizes.rows, norm=self.norm,
            dtype=self.sizes.dtype,
        )  # fmt: skip

    def boundary(self, length: int, *, affine: bool = False) -> OpCost:
        """Count gated residual, norm (affine or not) and modulation as one fused op."""
        return residual_modulated_norm_cost(
            self.sizes.batch, length, self.width, num_rows=self.sizes.rows, norm=self.norm,
            weight=affine, bias=affine, dtype=self.sizes.dtype,
        )  # fmt: skip

    def head_norms(
        self, batch: int, length: int, *, tensors: int, rope: bool, across_heads: bool = False,
        copied: int = 0,
    ) -> OpCost:  # fmt: skip
        """Count the norm of one or both of q and k over `batch` rows of tokens, and rotation."""
        heads = self.heads
        return qk_norm_rope_cost(
            batch, length, heads, self.width // heads, num_tensors=tensors, rope=rope,
            across_heads=across_heads, copied=copied, dtype=self.sizes.dtype,
        )  # fmt: skip

    def copies(self, tokens: int) -> OpCost:
        """Count copies of tokens of D channels."""
        values = tokens * self.width
        return elementwise_cost(values, values, 0, dtype=self.sizes.dtype)

    def gated_add(self, length: int) -> OpCost:
        """Count x + gate * h, with one gate per row."""
        values = self.sizes.batch * length * self.width
        gates = self.sizes.rows * self.width
        return elementwise_cost(2 * values + gates, values, 2 * values, dtype=self.sizes.dtype)

    def mlp(self, length: int, hidden: int) -> LayerCost:
        """Count two layers with a tanh-GELU between them, which the first can fuse."""
        tokens = self.sizes.batch * length
        values = tokens * hidden
        return LayerCost(
            linear=self.linear(tokens, self.width, hidden)
            + self.linear(tokens, hidden, self.width),
            # about 8 operations, of which tanh is one
            elementwise=elementwise_cost(values, values, 8 * values, dtype=self.sizes.dtype),
        )

    def ends(
        self, length: int, *, patch: int, text: int, text_dim: int, embedded: Sequence[int]
    ) -> LayerCost:
        """Count the projections of patches and text, the embeddings of vectors, and the last norm.

        Args:
            length: L.
            patch: values per patch.
            text, text_dim: text tokens per row, and their channels.
            embedded: sizes of each row's vectors, such as 256 for the sinusoids of a timestep; each
                is embedded by two layers.
        """
        rows, d = self.sizes.rows, self.width
        tokens = self.sizes.batch * length
        products = self.linear(tokens, patch, d) + self.linear(tokens, d, patch)
        products += self.linear(rows * text, text_dim, d)
        for size in embedded:
            products += self.linear(rows, size, d) + self.linear(rows, d, d)
        # If everything is fused, the last norm is part of the last block's gated add.
        return LayerCost(
            linear=products, elementwise=self.modulated_norm(length), elementwise_fused=OpCost()
        )
