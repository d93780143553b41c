"""Trains the demo's models: the shared start, then a head and a model for each task.

Everything is deterministic for a seed, and one compiled function of many steps serves
all six fine-tunings: their arrays have the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import model
from .model import MAX_CLASSES, Head, Params
from .tasks import Labelled, negative, quarter_turn

Progress = Callable[[float, float], None]
Loss = Callable[[Any, jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiment.

    Attributes:
        pretrain_steps: optimiser steps of the pretraining.
        pretrain_rate: its peak learning rate, for Adam.
        hidden_fraction: fraction of each image that pretraining hides.
        noise: standard deviation of the noise on pretraining images, whose pixels lie
            in [0, 1].
        examples_per_class: training images behind each prototype of a head.
        head_scale: length of a head's columns.
        fine_tune_steps: optimiser steps of each fine-tuning.
        fine_tune_rate: its peak learning rate, for SGD with momentum 0.9.
        batch: images per step.
        steps_per_call: steps between two reports of progress.
    """

    pretrain_steps: int = 2500
    pretrain_rate: float = 2e-3
    hidden_fraction: float = 0.4
    noise: float = 0.1
    # Few examples make a poor head: the start scores low and the backbone has to learn.
    examples_per_class: int = 4
    # Short columns keep the loss, and so the gradient, alive for the whole training.
    head_scale: float = 2.0
    fine_tune_steps: int = 300
    # Small enough to stay near the start, where the changes of several models add up.
    fine_tune_rate: float = 5e-3
    batch: int = 64
    steps_per_call: int = 50


SETTINGS = Settings()


def pretrain(
    images: np.ndarray,
    *,
    seed: int,
    steps: int = SETTINGS.pretrain_steps,
    progress: Progress | None = None,
) -> Params:
    """Trains an encoder, without labels, to restore damaged images from its features.

    Each image is also shown in its four quarter turns and as a negative; random squares
    are hidden and noise is added. A linear decoder, dropped afterwards, has to draw the
    undamaged image from the pooled features.

    Args:
        images: float32 (n, 8, 8) in [0, 1]; training images only.
        seed: fixes initial values, batches and damage.
        steps: number of optimiser steps.
        progress: called now and then with the fraction done and the recent loss.

    Returns:
        The encoder's parameters.
    """
    encoder = model.init(seed)
    pixels = images.shape[1] * images.shape[2]
    decoder = {
        "kernel": jnp.zeros((model.ENCODER.width, pixels)),
        "bias": jnp.full((pixels,), 0.5, jnp.float32),
    }
    trained = _minimise(
        _restoration_loss,
        {"encoder": encoder, "decoder": decoder},
        jnp.asarray(_turns_and_negatives(images)),
        optimiser=_pretrain_optimiser(steps),
        seed=seed,
        steps=steps,
        progress=progress,
    )
    return trained["encoder"]


def make_head(params: Params, data: Labelled, classes: int) -> Head:
    """Builds a frozen head from a few labelled images: one prototype per class.

    A class's column points from the mean of the prototypes to its own, the mean
    feature of its first examples, as the text embeddings of CLIP name classes.

    Args:
        params: the encoder whose features are used, the shared start.
        data: the task's training images and labels.
        classes: number of classes, at most `MAX_CLASSES`; other outputs are never
            the largest.

    Returns:
        The head.
    """
    count = SETTINGS.examples_per_class
    chosen = [np.flatnonzero(data.labels == label)[:count] for label in range(classes)]
    images = jnp.asarray(data.images)
    prototypes = jnp.stack(
        [model.features(params, images[i]).mean(axis=0) for i in chosen]
    )
    centre = prototypes.mean(axis=0, keepdims=True)
    columns = prototypes - centre
    columns *= SETTINGS.head_scale / jnp.linalg.norm(columns, axis=1, keepdims=True)
    unused = MAX_CLASSES - classes
    return Head(
        kernel=jnp.pad(columns.T, ((0, 0), (0, unused))),
        bias=jnp.pad(-(columns @ centre[0]), (0, unused), constant_values=-1e9),
    )


def fine_tune(
    params: Params,
    head: Head,
    data: Labelled,
    *,
    seed: int,
    steps: int = SETTINGS.fine_tune_steps,
    progress: Progress | None = None,
) -> Params:
    """Fine-tunes the encoder on one task by cross-entropy; the head stays as it is.

    Args:
        params: the shared start.
        head: the task's head.
        data: the task's training images and labels.
        seed: fixes the batches.
        steps: number of optimiser steps.
        progress: called now and then with the fraction done and the recent loss.

    Returns:
        The fine-tuned parameters.
    """
    return _minimise(
        _classification_loss,
        params,
        (head, jnp.asarray(data.images), jnp.asarray(data.labels)),
        optimiser=_fine_tune_optimiser(steps),
        seed=seed,
        steps=steps,
        progress=progress,
    )


@jax.jit
def accuracy(
    params: Params, head: Head, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Returns the fraction of images classified right, a float32 scalar.

    Args:
        params: the encoder's parameters; `jax.vmap` over a stack of them works.
        head: the task's head.
        images: float32 (n, 8, 8) in [0, 1].
        labels: int32 (n,).
    """
    predicted = model.logits(params, head, images).argmax(axis=-1)
    return (predicted == labels).mean(dtype=jnp.float32)


def _minimise(
    loss: Loss,
    params: Any,
    data: Any,
    *,
    optimiser: optax.GradientTransformation,
    seed: int,
    steps: int,
    progress: Progress | None,
) -> Any:
    state = (params, optimiser.init(params))
    keys = jax.random.split(jax.random.key(seed), steps)
    for start in range(0, steps, SETTINGS.steps_per_call):
        some_keys = keys[start : start + SETTINGS.steps_per_call]
        state, losses = _advance(state, some_keys, data, loss=loss, optimiser=optimiser)
        if progress is not None:
            progress((start + len(some_keys)) / steps, float(losses.mean()))
    return state[0]


@partial(jax.jit, static_argnames=("loss", "optimiser"))
def _advance(
    state: tuple[Any, optax.OptState],
    keys: jax.Array,
    data: Any,
    *,
    loss: Loss,
    optimiser: optax.GradientTransformation,
) -> tuple[tuple[Any, optax.OptState], jax.Array]:
    def step(state, key):
        params, memory = state
        value, gradient = jax.value_and_grad(loss)(params, key, data)
        update, memory = optimiser.update(gradient, memory, params)
        return (optax.apply_updates(params, update), memory), value

    return jax.lax.scan(step, state, keys)


# Cached, because `_advance` is compiled anew for every optimiser object.
@cache
def _pretrain_optimiser(steps: int) -> optax.GradientTransformation:
    return optax.adam(_schedule(SETTINGS.pretrain_rate, steps))


@cache
def _fine_tune_optimiser(steps: int) -> optax.GradientTransformation:
    # Not Adam: it moves every parameter by about the same amount, which leaves nothing
    # for methods that keep only the largest changes, as TIES does.
    return optax.sgd(_schedule(SETTINGS.fine_tune_rate, steps), momentum=0.9)


def _schedule(peak: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)


def _restoration_loss(params: Any, key: jax.Array, images: jax.Array) -> jax.Array:
    batch_key, square_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.randint(batch_key, (SETTINGS.batch,), 0, len(images))
    whole = images[chosen]
    squares = jax.random.bernoulli(
        square_key, SETTINGS.hidden_fraction, (SETTINGS.batch, 4, 4)
    )
    hidden = squares.repeat(2, axis=1).repeat(2, axis=2)
    noisy = whole + SETTINGS.noise * jax.random.normal(noise_key, whole.shape)
    pooled = model.features(params["encoder"], jnp.where(hidden, 0.5, noisy))
    decoder = params["decoder"]
    restored = pooled @ decoder["kernel"] + decoder["bias"][None]
    return jnp.square(restored - whole.reshape(restored.shape)).mean()


def _classification_loss(
    params: Params, key: jax.Array, data: tuple[Head, jax.Array, jax.Array]
) -> jax.Array:
    head, images, labels = data
    chosen = jax.random.randint(key, (SETTINGS.batch,), 0, len(images))
    scores = model.logits(params, head, images[chosen])
    return optax.softmax_cross_entropy_with_integer_labels(
        scores, labels[chosen]
    ).mean()


def _turns_and_negatives(images: np.ndarray) -> np.ndarray:
    views = [images]
    for _ in range(3):
        views.append(quarter_turn(views[-1]))
    turned = np.concatenate(views)
    return np.concatenate([turned, negative(turned)])
