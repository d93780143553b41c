"""The images: tasks to fine-tune on, and the broad set to pretrain on.

All are 32 by 32 pixels, in uint8; grey ones get three equal channels, so that one
compiled function serves all sets.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

LAYOUT = """\
needs images as NumPy archives of uint8 arrays:
  {data}/images/NAME.npz    each a task: x_train, y_train, x_val, y_val, x_test, y_test
  {data}/pretrain/NAME.npz  parts of the broad set: x_train, y_train, x_val, y_val
with x of shape (n, 32, 32) or (n, 32, 32, 3) and y the classes, from 0. Ours are cut
from Tiny-ImageNet, CIFAR-10, Omniglot and CMATERdb for the broad set; tasks are MNIST,
Fashion-MNIST, Kannada-MNIST, GTSRB, PneumoniaMNIST, Quick, Draw!, CIFAR-10 and a set
of brain scans. Say where they are with --data."""


OWN = ("indic", "tinyimagenet")
"""The parts of the broad set that show what a model has forgotten of it."""


class Labelled(NamedTuple):
    """Images (n, 32, 32, 3), uint8, and their classes (n,), int32."""

    images: np.ndarray
    labels: np.ndarray

    def some(self, count: int) -> "Labelled":
        """The same random `count` of them each time, or all if there are no more."""
        order = np.random.default_rng(0).permutation(len(self.labels))[:count]
        return Labelled(self.images[order], self.labels[order])


class Task(NamedTuple):
    """What a model is fine-tuned on, how its coefficients are chosen, and its test."""

    name: str
    classes: int
    train: Labelled
    validation: Labelled
    test: Labelled


class Broad(NamedTuple):
    """The broad set, all parts in one list of classes.

    Attributes:
        train: the images and classes.
        photographs: which images may be mirrored, (n,), as letters may not.
        validation: of each part, by name, with the same list of classes.
        classes: how many there are.
    """

    train: Labelled
    photographs: np.ndarray
    validation: dict[str, Labelled]
    classes: int


def load_tasks(directory: Path) -> list[Task]:
    """All tasks there are, by name.

    Raises:
        SystemExit: there are none.
    """
    return [_task(path) for path in _archives(directory, "images")]


def load_own(directory: Path) -> list[Task]:
    """Parts of the broad set as tasks, whose validation images are the test."""
    paths = _archives(directory, "pretrain")
    return [_task(path, test="val") for path in paths if path.stem in OWN]


def load_broad(directory: Path) -> Broad:
    """The broad set.

    Raises:
        SystemExit: there is none.
    """
    parts, photographs, validation, classes = [], [], {}, 0
    for path in _archives(directory, "pretrain"):
        arrays = np.load(path)
        train = _labelled(arrays, "train", classes)
        parts.append(train)
        coloured = arrays["x_train"].ndim == 4
        photographs.append(np.full(len(train.labels), coloured))
        validation[path.stem] = _labelled(arrays, "val", classes)
        classes = int(train.labels.max()) + 1
    train = Labelled(*map(np.concatenate, zip(*parts, strict=True)))
    return Broad(train, np.concatenate(photographs), validation, classes)


def describe(directory: Path) -> str:
    """How many training images each set has, and its licence, in one paragraph."""
    said = []
    for kind in ("pretrain", "images"):
        for path in _archives(directory, kind):
            about = path.with_suffix(".json")
            known = json.loads(about.read_text()) if about.exists() else {}
            count = len(np.load(path)["y_train"])
            licence = known.get("licence", "licence not stated")
            said.append(f"{path.stem} ({count} training images; {licence})")
    return "; ".join(said)


def _archives(directory: Path, kind: str) -> list[Path]:
    found = sorted((directory / kind).glob("*.npz"))
    if not found:
        layout = LAYOUT.format(data=directory)
        raise SystemExit(f"no images in {directory / kind}: this benchmark {layout}")
    return found


def _task(path: Path, test: str = "test") -> Task:
    arrays = np.load(path)
    splits = [_labelled(arrays, split, 0) for split in ("train", "val", test)]
    return Task(path.stem, int(splits[0].labels.max()) + 1, *splits)


def _labelled(arrays: np.lib.npyio.NpzFile, split: str, first_class: int) -> Labelled:
    images = arrays[f"x_{split}"]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    return Labelled(images, arrays[f"y_{split}"].astype(np.int32) + first_class)
