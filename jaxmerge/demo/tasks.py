"""The demo's data: six classification tasks on real scans of handwritten digits.

Every task shows the same 8 x 8 scans (`sklearn.datasets.load_digits`, no download) and
asks something else about them, or shows them turned or as negatives. An image belongs
to the same split in every task, so no task trains on what another one is tested on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sklearn import datasets

TRAIN_FRACTION = 0.5
VALIDATION_FRACTION = 0.2


class Task(NamedTuple):
    """A question about a digit.

    Attributes:
        name: short name, used in tables and file names.
        classes: number of answers.
        description: the question in a few words.
        label: maps digits, integers (n,), to answers in `0 .. classes - 1`.
        view: maps images (n, 8, 8) to what the model sees, of the same shape.
    """

    name: str
    classes: int
    description: str
    label: Callable[[np.ndarray], np.ndarray]
    view: Callable[[np.ndarray], np.ndarray]


class Labelled(NamedTuple):
    """Images, float32 (n, 8, 8) in [0, 1], with their labels, int32 (n,)."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """Disjoint sets of images: to train on, to choose coefficients on, to report on."""

    train: Labelled
    validation: Labelled
    test: Labelled


def identity(array: np.ndarray) -> np.ndarray:
    """Returns the array as it is."""
    return array


def quarter_turn(images: np.ndarray) -> np.ndarray:
    """Turns images (..., 8, 8) by 90 degrees, counter-clockwise."""
    return np.rot90(images, axes=(-2, -1))


def negative(images: np.ndarray) -> np.ndarray:
    """Swaps dark and bright in images with values in [0, 1]."""
    return 1.0 - images


def is_odd(digits: np.ndarray) -> np.ndarray:
    """Labels odd digits 1, even digits 0."""
    return digits % 2


def has_loop(digits: np.ndarray) -> np.ndarray:
    """Labels digits drawn with a closed loop (0, 6, 8, 9) 1, the others 0."""
    return np.isin(digits, (0, 6, 8, 9))


def is_large(digits: np.ndarray) -> np.ndarray:
    """Labels digits from 5 to 9 with 1, those below with 0."""
    return digits >= 5


TASKS = (
    Task("digits", 10, "which digit is it?", identity, identity),
    Task("odd", 2, "is the digit odd?", is_odd, identity),
    Task("loop", 2, "does the digit have a closed loop?", has_loop, identity),
    Task("large", 2, "is the digit 5 or more?", is_large, identity),
    Task("turned", 10, "which digit, turned by 90 degrees?", identity, quarter_turn),
    Task("negative", 10, "which digit, dark and bright swapped?", identity, negative),
)


def load_digits(seed: int = 0) -> Splits:
    """Loads the 1797 scans with the digits as labels, split by image.

    Args:
        seed: fixes which images are in which split.

    Returns:
        Half of the images to train on, a fifth for validation, the rest for the test.
    """
    pixels, digits = datasets.load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    ends = np.cumsum([TRAIN_FRACTION, VALIDATION_FRACTION]) * len(images)
    parts = np.split(order, ends.astype(int))
    return Splits(*(Labelled(images[i], digits[i].astype(np.int32)) for i in parts))


def task_data(task: Task, digits: Splits) -> Splits:
    """Shows and labels the images of `digits` as the task asks, split by split."""
    return Splits(
        *(
            Labelled(
                np.ascontiguousarray(task.view(part.images)),
                task.label(part.labels).astype(np.int32),
            )
            for part in digits
        )
    )
