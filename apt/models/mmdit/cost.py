"""The cost of `MMDiT.forward`."""

from __future__ import annotations

import math

from apt.models.costs import counts
from apt.models.costs.counting import Counter, Sizes
from apt.models.costs.forward import DiTCost, LayerCost
from apt.models.mmdit.model import MMDiTConfig


@counts(MMDiTConfig)
def mmdit_cost(config: MMDiTConfig, sizes: Sizes) -> DiTCost:
    """Count a forward pass. Raises InputError for latents that are not multiples of the patch."""
    length = math.prod(config.token_grid(sizes.latent_shape))
    counter = Counter(sizes=sizes, width=config.hidden_size, heads=config.num_heads, norm="rms")
    return DiTCost(
        batch=sizes.batch,
        visual_tokens=length,
        text_tokens=sizes.text_tokens,
        head_dim=counter.width // counter.heads,
        layers=tuple(_layer(counter, config, length, number) for number in range(config.depth)),
        ends=_ends(counter, config, length),
    )


def _layer(counter: Counter, config: MMDiTConfig, length: int, number: int) -> LayerCost:
    sizes, d = counter.sizes, config.hidden_size
    text, last = sizes.text_tokens, number == config.depth - 1
    dual = config.num_dual_blocks is None or number < config.num_dual_blocks
    queries = length + (0 if last else text)
    cost = LayerCost(attention=counter.attention(queries, length + text))
    mlp = int(d * config.mlp_ratio)
    cost += _stream(counter, length, mlp=mlp, projected=3, normed=2, rope=True)
    if text:
        # The text output of the last block is unused. Shared weights still compute its q, but only
        # k is normalised.
        cost += _stream(
            counter, text, mlp=None if last else mlp, projected=2 if last and dual else 3,
            normed=1 if last else 2, rope=False,
        )  # fmt: skip
    if config.modulation == "block":
        streams = 2 if dual else 1
        cost += LayerCost(linear=streams * counter.linear(sizes.rows, d, 6 * d))
    return cost


def _stream(
    counter: Counter, length: int, *, mlp: int | None, projected: int, normed: int, rope: bool
) -> LayerCost:
    """Count one modality in a block, which projects and normalises as many of q, k and v as given.

    Without an MLP, nothing follows attention.
    """
    batch, d = counter.sizes.batch, counter.width
    tokens = batch * length
    norm = counter.modulated_norm(length)
    qk = {
        copied: counter.head_norms(batch, length, tensors=normed, rope=rope, copied=copied)
        for copied in (0, 1)
    }
    linear = counter.linear(tokens, d, projected * d)
    if mlp is None:
        return LayerCost(linear=linear, elementwise=norm + qk[1], elementwise_fused=norm + qk[0])
    boundary = counter.boundary(length)
    return counter.mlp(length, mlp) + LayerCost(
        linear=linear + counter.linear(tokens, d, d),
        elementwise=norm + qk[1] + boundary + counter.gated_add(length),
        # The gated add and the next norm are one fused op.
        elementwise_fused=2 * boundary + qk[0],
    )


def _ends(counter: Counter, config: MMDiTConfig, length: int) -> LayerCost:
    rows, d = counter.sizes.rows, config.hidden_size
    modulation = counter.linear(rows, d, 2 * d)
    if config.modulation == "shared":
        modulation += counter.linear(rows, d, 6 * d)
    return LayerCost(linear=modulation) + counter.ends(
        length,
        patch=config.in_channels * math.prod(config.patch_size),
        text=counter.sizes.text_tokens,
        text_dim=config.text_dim,
        embedded=(256, config.pooled_dim) if config.pooled_dim else (256,),
    )
