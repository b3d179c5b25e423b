"""Ops whose call is more than passing on their inputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from apt.bench.inputs import Inputs


def cross_attention(inputs: Inputs) -> Tensor:
    """What `query_pooling` replaces: norm, keys and values of all tokens, attention of a query."""
    x, h = inputs["x"], inputs["num_heads"]
    normed = F.rms_norm(x, x.shape[-1:], inputs["norm_weight"], 1e-6)
    k = F.linear(normed, inputs["key_weight"])
    v = F.linear(normed, inputs["value_weight"], inputs["value_bias"])
    q = inputs["query"].expand(x.shape[0], 1, -1)
    q, k, v = (values.unflatten(-1, (h, -1)).transpose(1, 2) for values in (q, k, v))
    pooled = F.scaled_dot_product_attention(q, k, v)
    return pooled.transpose(1, 2).flatten(1)
