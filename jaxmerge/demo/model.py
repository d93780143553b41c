"""The demo's model: a small vision transformer, and a linear head per task.

Heads belong to their tasks: they stay frozen and are never merged. All heads have
`MAX_CLASSES` outputs, so that one compiled function serves every task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

MAX_CLASSES = 10
IMAGE_SIZE = 8
PATCH = (2, 4)

Params = Mapping[str, Any]


class Head(NamedTuple):
    """A linear classifier: `kernel` (width, MAX_CLASSES), `bias` (MAX_CLASSES,)."""

    kernel: jax.Array
    bias: jax.Array


class Block(nn.Module):
    """A pre-norm transformer block on tokens (batch, tokens, width)."""

    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        normed = nn.LayerNorm(name="attention_norm")(tokens)
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        tokens = tokens + attention(normed)
        normed = nn.LayerNorm(name="mlp_norm")(tokens)
        hidden = nn.gelu(nn.Dense(4 * width, name="mlp_in")(normed))
        return tokens + nn.Dense(width, name="mlp_out")(hidden)


class Encoder(nn.Module):
    """Maps images (batch, 8, 8) in [0, 1] to features (batch, width)."""

    width: int = 64
    blocks: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patches = 2.0 * split_patches(images) - 1.0
        tokens = nn.Dense(self.width, name="patch_embedding")(patches)
        shape = (1, *tokens.shape[1:])
        position = self.param("position_embedding", nn.initializers.normal(0.1), shape)
        tokens = tokens + position
        for index in range(self.blocks):
            tokens = Block(self.heads, name=f"block_{index}")(tokens)
        return nn.LayerNorm(name="final_norm")(tokens.mean(axis=1))


ENCODER = Encoder()


def split_patches(images: jax.Array) -> jax.Array:
    """Cuts images (batch, 8, 8) into patches (batch, 8, 8): tokens, then pixels."""
    height, width = PATCH
    rows, columns = IMAGE_SIZE // height, IMAGE_SIZE // width
    grid = images.reshape(-1, rows, height, columns, width)
    return grid.transpose(0, 1, 3, 2, 4).reshape(-1, rows * columns, height * width)


def init(seed: int) -> Params:
    """Returns random float32 parameters of the encoder, a nested dict."""
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE))
    return jax.jit(ENCODER.init)(jax.random.key(seed), images)["params"]


@jax.jit
def features(params: Params, images: jax.Array) -> jax.Array:
    """Returns the features (batch, width) of images (batch, 8, 8) in [0, 1]."""
    return ENCODER.apply({"params": params}, images)  # pyright: ignore


def logits(params: Params, head: Head, images: jax.Array) -> jax.Array:
    """Returns the scores (batch, MAX_CLASSES) that a head gives to images."""
    return features(params, images) @ head.kernel + head.bias[None]
