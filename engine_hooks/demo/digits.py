"""The data, scikit-learn's handwritten digits, and a judge that reads what the engine drew.

1,797 images of 8×8 pixels with 17 grey levels (0 to 16), written by 43 people: a real data set that
comes with a package. The judge is a support vector machine trained on two thirds of it; how well it
reads the other third is part of its report, so that its verdict on drawn digits can be weighed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SIDE = 8
LEVELS = 16.0
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Pixels = npt.NDArray[np.float32]


def load() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """All images, shape (1797, 8, 8), scaled to -1 (paper) … 1 (ink), and the digit each shows."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / (LEVELS / 2) - 1).astype(np.float32), bunch.target.astype(np.int64)


class Judge:
    """Reads digits. `skill` is the share of real digits it never saw that it reads correctly."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = load()
        order = np.random.default_rng(0).permutation(len(images))
        seen, unseen = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
        flat = images.reshape(len(images), -1)
        self.samples = len(images)
        self._classifier: Any = SVC(C=10.0, gamma=0.05).fit(flat[seen], labels[seen])
        self.skill = float(self._classifier.score(flat[unseen], labels[unseen]))

    def share_read(self, images: Pixels, asked: npt.NDArray[np.int64]) -> float:
        """The share of `images`, shape (n, 8, 8), that show the digit that was asked for."""
        return float((self._classifier.predict(images.reshape(len(images), -1)) == asked).mean())
