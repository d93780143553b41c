"""A small vision transformer, and a frozen linear head for each task.

Every weight is a matrix that multiplies what it is given, convolutions of the stem
included: methods for matrices apply to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmerge.demo.model import Block, Head

from .data import Task

SHOTS = 10
LOGIT_SPREAD = 4.0

Params = Mapping[str, Any]


class Encoder(nn.Module):
    """Maps images (batch, 32, 32, 3) in uint8 to features (batch, width)."""

    width: int
    blocks: int
    heads: int = 4
    stem: int = 48

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        grid = nn.Dense(self.stem, name="stem_in")(patches(standardise(images), 5, 3))
        grid = nn.gelu(nn.LayerNorm(name="stem_norm")(grid))
        grid = nn.Dense(self.width, name="stem_out")(patches(grid, 4, 2))
        tokens = grid.reshape(len(images), -1, self.width)
        shape = (1, *tokens.shape[1:])
        normal = nn.initializers.normal(0.02)
        tokens = tokens + self.param("position_embedding", normal, shape)
        for index in range(self.blocks):
            tokens = Block(self.heads, name=f"block_{index}")(tokens)
        return nn.LayerNorm(name="final_norm")(tokens).mean(axis=1)


class Network(NamedTuple):
    """An encoder's size; two of equal sizes are the same to the compiler."""

    width: int
    blocks: int

    def init(self, seed: int) -> Params:
        """Random float32 parameters, a nested dict."""
        images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
        return jax.jit(self._encoder.init)(jax.random.key(seed), images)["params"]

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        """The features (batch, width) of images (batch, 32, 32, 3) in uint8."""
        return self._encoder.apply({"params": params}, images)  # pyright: ignore

    def logits(self, params: Params, batch: tuple[jax.Array, Head]) -> jax.Array:
        """The scores (batch, classes) of images that bring their head along.

        Heads have an axis that counts images, or none if it is one head for all.
        """
        images, head = batch
        features = self.features(params, images)
        if head.kernel.ndim == 2:
            return features @ head.kernel + head.bias[None]
        return jnp.einsum("nw,nwc->nc", features, head.kernel) + head.bias

    @property
    def _encoder(self) -> Encoder:
        return Encoder(self.width, self.blocks)


def standardise(images: jax.Array) -> jax.Array:
    """Images of mean 0 and spread 1, except for those that are almost of one colour."""
    pixels = images.astype(jnp.float32)
    axes = tuple(range(1, pixels.ndim))
    mean = pixels.mean(axes, keepdims=True)
    return (pixels - mean) / jnp.maximum(pixels.std(axes, keepdims=True), 8.0)


def patches(grid: jax.Array, size: int, stride: int) -> jax.Array:
    """Cuts a grid (batch, n, n, c) into squares (batch, m, m, size * size * c)."""
    last = grid.shape[1] - size + 1
    return jnp.concatenate(
        [
            grid[:, i : i + last : stride, j : j + last : stride]
            for i in range(size)
            for j in range(size)
        ],
        axis=-1,
    )


def make_head(network: Network, start: Params, task: Task, outputs: int) -> Head:
    """A frozen head from `SHOTS` images of each class: their mean features.

    A class's column points from the mean of all classes to its own, as the text
    embeddings of CLIP name classes; it is not trained. The backbone has to do the work,
    and the start is well below what it can learn.

    Args:
        network: the encoder.
        start: its pretrained parameters.
        task: from whose training images the head is made.
        outputs: of the head; those that no class has are never the largest.
    """
    features = jax.jit(network.features)
    rng = np.random.default_rng(0)
    shown = np.stack(
        [
            rng.choice(np.flatnonzero(task.train.labels == label), SHOTS)
            for label in range(task.classes)
        ]
    )
    of_images = np.concatenate([features(start, task.train.images[i]) for i in shown])
    prototypes = of_images.reshape(task.classes, SHOTS, -1).mean(axis=1)
    centre = prototypes.mean(axis=0)
    columns = prototypes - centre
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    columns *= LOGIT_SPREAD / np.std((of_images - centre) @ columns.T)
    unused = outputs - task.classes
    return Head(
        kernel=jnp.pad(jnp.asarray(columns.T), ((0, 0), (0, unused))),
        bias=jnp.pad(
            jnp.asarray(-(columns @ centre)), (0, unused), constant_values=-1e9
        ),
    )
