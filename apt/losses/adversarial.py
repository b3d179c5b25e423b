"""Adversarial objectives: the losses of D and G, given logits (B,) in fp32.

Every `discriminator` and `generator` value is to be minimised. APT prints Eqs. 1-2 without their
minus signs, as quantities that D and G maximise; here the signs are restored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError
from apt.losses.checks import check_logits, check_same_shape
from apt.losses.names import LOSSES


class AdversarialObjective(ABC):
    """A pair of losses over logits.

    Attributes:
        needs_real: whether the generator's loss depends on logits of real samples. If not, the
            generator step can skip D's forward pass on real samples.
    """

    needs_real: ClassVar[bool]

    @abstractmethod
    def discriminator(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Return D's loss: a scalar, the mean over the batch.

        Args:
            logits_real: D(x, c), (B,), floating point; half precision is upcast.
            logits_fake: D(G(z, c), c), (B,); G's output detached.

        Raises:
            InputError: for other shapes or dtypes, or different batch sizes.
        """

    @abstractmethod
    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        """Return G's loss: a scalar, the mean over the batch.

        Args:
            logits_fake: D(G(z, c), c), (B,), with the graph through D to G.
            logits_real: D(x, c), (B,); required if `needs_real`, otherwise ignored.

        Raises:
            InputError: for other shapes or dtypes, or if required real logits are missing.
        """


class UnpairedObjective(AdversarialObjective):
    """An objective with separate terms for real and fake logits."""

    needs_real: ClassVar[bool] = False

    def discriminator(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        check_same_shape("logits_real", logits_real, "logits_fake", logits_fake)
        return self.real_term(logits_real) + self.fake_term(logits_fake)

    @abstractmethod
    def real_term(self, logits: Tensor) -> Tensor:
        """Return D's loss on samples that it should call real: logits (B,) -> scalar."""

    @abstractmethod
    def fake_term(self, logits: Tensor) -> Tensor:
        """Return D's loss on samples that it should call fake: logits (B,) -> scalar."""


@LOSSES.register("non_saturating")
@dataclass(frozen=True)
class NonSaturating(UnpairedObjective):
    """The paper's objective: softplus(-D(x)) + softplus(D(G(z))) for D, softplus(-D(G(z))) for G.

    APT Eqs. 1-2 with their minus signs; Goodfellow et al. 2014. softplus(a) = -log sigmoid(-a) is
    exact for large logits, unlike log(sigmoid(a) + eps).
    """

    def real_term(self, logits: Tensor) -> Tensor:
        return F.softplus(-check_logits("logits_real", logits)).mean()

    def fake_term(self, logits: Tensor) -> Tensor:
        return F.softplus(check_logits("logits_fake", logits)).mean()

    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        return F.softplus(-check_logits("logits_fake", logits_fake)).mean()


@LOSSES.register("hinge")
@dataclass(frozen=True)
class Hinge(UnpairedObjective):
    """Hinge: max(0, 1 - D(x)) + max(0, 1 + D(G(z))) for D, -D(G(z)) for G.

    Lim & Ye 2017; Tran et al. 2017. The generator's loss has no lower bound, by design.
    """

    def real_term(self, logits: Tensor) -> Tensor:
        return F.relu(1 - check_logits("logits_real", logits)).mean()

    def fake_term(self, logits: Tensor) -> Tensor:
        return F.relu(1 + check_logits("logits_fake", logits)).mean()

    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        return -check_logits("logits_fake", logits_fake).mean()


@LOSSES.register("least_squares")
@dataclass(frozen=True)
class LeastSquares(UnpairedObjective):
    """Least squares: ((D(x) - 1)^2 + D(G(z))^2) / 2 for D, (D(G(z)) - 1)^2 / 2 for G.

    Mao et al. 2017, Eq. 2 with targets 0 (fake) and 1 (real, and what G aims at).
    """

    def real_term(self, logits: Tensor) -> Tensor:
        return (check_logits("logits_real", logits) - 1).square().mean() / 2

    def fake_term(self, logits: Tensor) -> Tensor:
        return check_logits("logits_fake", logits).square().mean() / 2

    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        return (check_logits("logits_fake", logits_fake) - 1).square().mean() / 2


@LOSSES.register("relativistic")
@dataclass(frozen=True)
class Relativistic(AdversarialObjective):
    """Relativistic pairing: softplus(-(D(x) - D(G(z)))) for D, the pair swapped for G.

    RpGAN (Jolicoeur-Martineau 2018; Huang et al. 2024, "R3GAN"). Sample i of the real batch is
    compared with sample i of the generated batch, so both should have the same condition. Only
    differences count, so D's mean can drift; `logit_centring` prevents this.
    """

    needs_real: ClassVar[bool] = True

    def discriminator(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        return F.softplus(-_margin(logits_real, logits_fake)).mean()

    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        if logits_real is None:
            raise InputError(
                "the relativistic generator loss compares with real samples; pass logits_real"
            )
        return F.softplus(_margin(logits_real, logits_fake)).mean()


def _margin(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    check_same_shape("logits_real", logits_real, "logits_fake", logits_fake)
    return check_logits("logits_real", logits_real) - check_logits("logits_fake", logits_fake)
