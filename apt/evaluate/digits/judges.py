"""Independent judges, to show that conclusions do not depend on one classifier."""

from __future__ import annotations

from dataclasses import replace

from apt.evaluate.digits.classifier import ClassifierConfig

FRAMES, BLURRED = "whole frames", "blurred"

DESCRIPTIONS = {
    FRAMES: "another network (residual, on whole frames, without a cut-out of the digit), trained "
    "with another recipe (SGD with momentum, label smoothing, other clips)",
    BLURRED: "the main judge's network, trained and used only on clips blurred by a Gaussian of "
    "1.5 pixels, so that it cannot see fine detail",
}


def independent_judges(main: ClassifierConfig) -> dict[str, ClassifierConfig]:
    """Return the configs of the other judges for a main one, by name."""
    return {
        FRAMES: replace(
            main,
            network="frames",
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            # It sees more that does not matter, so it learns more slowly.
            steps=3 * main.steps // 2,
            seed=main.seed + 1,
        ),
        BLURRED: replace(main, blur=1.5, seed=main.seed + 2),
    }
