"""Independent judges: a conclusion that holds for one classifier alone would be worth little."""

from __future__ import annotations

from dataclasses import replace

from apt.evaluate.digits.classifier import ClassifierConfig

FRAMES, BLURRED = "whole frames", "blurred"

DESCRIPTIONS = {
    FRAMES: "another network (residual, over whole frames, which sees no cut-out digit), trained "
    "by another recipe (SGD with momentum, smoothed labels, other clips)",
    BLURRED: "the main judge's network, trained on and shown nothing but clips blurred by a "
    "Gaussian of 1.5 pixels, so that it cannot see fine detail",
}


def independent_judges(main: ClassifierConfig) -> dict[str, ClassifierConfig]:
    """The other judges that go with a main one, by name."""
    return {
        FRAMES: replace(
            main,
            network="frames",
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            # It looks at more that does not matter.
            steps=3 * main.steps // 2,
            seed=main.seed + 1,
        ),
        BLURRED: replace(main, blur=1.5, seed=main.seed + 2),
    }
