"""Feature matching in the discriminator's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError
from apt.losses.checks import at_least_fp32, check_number, check_same_shape
from apt.losses.names import LOSSES


@LOSSES.register("feature_matching")
@dataclass(frozen=True)
class FeatureMatching:
    """weight * mean over layers of mean |features_fake - features_real|, for the generator.

    SeedVR2. It compares generated sample i with real sample i, so it suits paired tasks
    (restoration, a regression target). In text-to-video, where G(z, c) need not be x, its optimum
    is the median of the features, which is blurry: keep the weight small.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("FeatureMatching", "weight", self.weight)

    def __call__(self, features_fake: Sequence[Tensor], features_real: Sequence[Tensor]) -> Tensor:
        """Return the weighted distance, a scalar; real features are targets and get no gradients.

        Args:
            features_fake: one tensor (B, ...) per layer, with the graph to G.
            features_real: tensors of the same shapes.

        Raises:
            InputError: for no layers, different numbers of layers, or shapes that differ.
        """
        if not features_fake or len(features_fake) != len(features_real):
            raise InputError(
                "feature matching needs the same number of layers of both, at least one; "
                f"got {len(features_fake)} and {len(features_real)}"
            )
        distances = []
        for layer, (fake, real) in enumerate(zip(features_fake, features_real, strict=True)):
            name = f"features_fake[{layer}]", f"features_real[{layer}]"
            check_same_shape(name[0], fake, name[1], real)
            target = at_least_fp32(name[1], real).detach()
            distances.append(F.l1_loss(at_least_fp32(name[0], fake), target))
        return self.weight * torch.stack(distances).mean()
