"""A transformer in plain JAX, of the usual proportions, for benchmarks to run."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

HEADS = 4
SYMBOLS = 256


def parameters(key: Array, width: int, layers: int, length: int) -> Any:
    """Random weights, the two of the MLP between `width` and four times that."""
    shapes = {
        "query": (width, HEADS, width // HEADS),
        "key": (width, HEADS, width // HEADS),
        "value": (width, HEADS, width // HEADS),
        "out": (HEADS, width // HEADS, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def layer(key: Array) -> dict[str, Array]:
        keys = jax.random.split(key, len(shapes))
        weights = {
            name: jax.random.normal(k, shape)
            / (shape[0] if name != "out" else width) ** 0.5
            for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        return weights | {"norm": jnp.ones(width), "norm_mlp": jnp.ones(width)}

    first, *rest = jax.random.split(key, layers + 3)
    return {
        "embedding": jax.random.normal(first, (SYMBOLS, width)),
        "position": jax.random.normal(rest[0], (length, width)),
        "unembedding": jax.random.normal(rest[1], (width, SYMBOLS)) / width**0.5,
        "norm": jnp.ones(width),
        "layers": [layer(key) for key in rest[2:]],
    }


def transformer(params: Any, tokens: Array) -> Array:
    """Logits (examples, tokens, symbols) of what comes after each of `tokens`."""
    x = params["embedding"][tokens] + params["position"][None]
    for layer in params["layers"]:
        x += _attention(layer, _norm(x, layer["norm"]))
        hidden = jax.nn.gelu(_norm(x, layer["norm_mlp"]) @ layer["up"])
        x += hidden @ layer["down"]
    return _norm(x, params["norm"]) @ params["unembedding"]


def _attention(layer: dict[str, Array], x: Array) -> Array:
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, layer[name])
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    chances = jax.nn.softmax(jnp.where(past[None, None], scores, -jnp.inf))
    return jnp.einsum("bhts,bshk,hkd->btd", chances, v, layer["out"])


def _norm(x: Array, scale: Array) -> Array:
    return scale[None, None] * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
