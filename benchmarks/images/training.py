"""Pretraining and fine-tuning, by steps that can be interrupted and resumed."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import checkpoints
from jaxmerge.demo.model import Head

from .data import Broad, Labelled
from .model import Network, Params

SHIFT = 3
SAVE_EVERY = 100


class Course(NamedTuple):
    """How to train.

    Attributes:
        steps: of Adam.
        batch: images per step.
        rate: of learning, at its peak.
        decay: of matrices.
        grey: which share of images loses its colour.
        epsilon: of Adam; gradients below it hardly move what they are of.
        frozen: a pattern of the names of what is not trained.
    """

    steps: int
    batch: int
    rate: float
    decay: float = 0.0
    grey: float = 0.0
    epsilon: float = 1e-8
    frozen: str = ""


class Settings(NamedTuple):
    """How models are made; part of the names of what is kept on disk."""

    network: Network = Network(width=128, blocks=3)
    pretraining: Course = Course(2500, 128, 2e-3, decay=0.05, grey=0.3)
    # Tasks are in each other's way where what comes before the blocks changes, or what
    # a task hardly depends on does.
    tuning: Course = Course(
        300, 64, 1e-3, epsilon=1e-3, frozen="stem_.*|position_embedding"
    )


class Batch(NamedTuple):
    """Images (n, 32, 32, 3), classes (n,), and which images may be mirrored, (n,)."""

    images: np.ndarray
    labels: np.ndarray
    photographs: np.ndarray


Draw = Callable[[np.random.Generator], Batch]
Loss = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
"""From what is trained, what is fixed, augmented images and classes to a number."""


def pretrain(settings: Settings, broad: Broad, place: Path) -> Params:
    """Trains an encoder to tell all classes of the broad set apart.

    Args:
        settings: the network and the length of the training.
        broad: the broad set.
        place: a file that keeps the state, now and then; training goes on from there.

    Returns:
        The encoder's parameters.
    """
    width = settings.network.width
    trained = {
        "encoder": settings.network.init(seed=0),
        "head": Head(jnp.zeros((width, broad.classes)), jnp.zeros(broad.classes)),
    }
    # Few images of many classes would hardly be seen beside many of few.
    counts = np.bincount(broad.train.labels)
    weights = 1 / np.sqrt(counts[broad.train.labels])
    edges = np.cumsum(weights) / weights.sum()

    def draw(rng: np.random.Generator) -> Batch:
        chosen = np.searchsorted(edges, rng.random(settings.pretraining.batch))
        chosen = np.minimum(chosen, len(edges) - 1)
        images, labels = (part[chosen] for part in broad.train)
        return Batch(images, labels, broad.photographs[chosen])

    loss = functools.partial(_broad_loss, settings.network)
    end = descend(loss, trained, None, draw, settings.pretraining, 0, place)
    for name, part in broad.validation.items():
        some = part.some(1000)
        logits = settings.network.logits(end["encoder"], (some.images, end["head"]))
        right = float((logits.argmax(axis=-1) == some.labels).mean())
        print(f"  {name}: {100 * right:.1f} % of validation images", flush=True)
    return end["encoder"]


def fine_tune(
    settings: Settings,
    start: Params,
    head: Head,
    train: Labelled,
    seed: int,
    place: Path,
) -> Params:
    """Fine-tunes the encoder on a task by cross-entropy; the head stays as it is.

    Args:
        settings: the network and the length of the training.
        start: the pretrained parameters.
        head: of the task.
        train: its images and classes.
        seed: of the batches and how their images are shifted.
        place: as in `pretrain`.
    """

    def draw(rng: np.random.Generator) -> Batch:
        chosen = rng.integers(len(train.labels), size=settings.tuning.batch)
        never = np.zeros(len(chosen), bool)
        return Batch(train.images[chosen], train.labels[chosen], never)

    loss = _task_loss_of(settings.network)
    return descend(loss, start, head, draw, settings.tuning, seed, place)


def descend(
    loss: Loss,
    params: Any,
    fixed: Any,
    draw: Draw,
    course: Course,
    seed: int,
    place: Path,
) -> Any:
    """Minimises a loss with Adam; goes on from a state in `place`, if there is one."""
    steps, optimiser = course.steps, _optimiser(course)
    # A copy, as each step takes the memory of the state before it.
    state = (jax.tree.map(jnp.copy, params), optimiser.init(params))
    done = 0
    if place.exists():
        done, state = _load_state(place, state)
    before = time.process_time()
    key = jax.random.key(seed)
    for step in range(done, steps):
        # Keyed by the step, so that it does not matter where training was interrupted.
        batch = draw(np.random.default_rng((seed, step)))
        step_key = jax.random.fold_in(key, step)
        state, value = _advance(state, fixed, batch, step_key, loss, course)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            seconds = time.process_time() - before
            print(
                f"  step {step + 1} of {steps}: loss {float(value):.3f}, "
                f"{seconds:.0f} s of processors",
                flush=True,
            )
            _save_state(place, step + 1, state)
    return state[0]


@functools.partial(jax.jit, static_argnames=("loss", "course"), donate_argnums=0)
def _advance(
    state: tuple[Any, optax.OptState],
    fixed: Any,
    batch: Batch,
    key: jax.Array,
    loss: Loss,
    course: Course,
) -> tuple[tuple[Any, optax.OptState], jax.Array]:
    params, memory = state
    images = _vary(batch, key, course.grey)
    value, gradient = jax.value_and_grad(loss)(params, fixed, images, batch.labels)
    update, memory = _optimiser(course).update(gradient, memory, params)
    return (optax.apply_updates(params, update), memory), value


def _vary(batch: Batch, key: jax.Array, grey: float) -> jax.Array:
    """Shifts images, mirrors photographs, and takes the colour of a share `grey`."""
    keys = jax.random.split(key, 3)
    count = len(batch.images)
    images = batch.images
    mirrored = jax.random.bernoulli(keys[0], shape=(count,)) & batch.photographs
    images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if grey:
        mean = images.mean(axis=-1, keepdims=True).astype(jnp.uint8)
        faded = jax.random.bernoulli(keys[1], grey, (count,))
        images = jnp.where(faded[:, None, None, None], mean, images)
    by = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    padded = jnp.pad(images, by, mode="edge")
    offsets = jax.random.randint(keys[2], (count, 2), 0, 2 * SHIFT + 1)

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*offset, 0), (32, 32, 3))

    return jax.vmap(cut)(padded, offsets)


def _broad_loss(
    network: Network, trained: Any, _: None, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = network.logits(trained["encoder"], (images, trained["head"]))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def _task_loss(
    network: Network, params: Params, head: Head, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = network.logits(params, (images, head))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Cached, because `_advance` is compiled anew for every function object.
@functools.cache
def _task_loss_of(network: Network) -> Loss:
    return functools.partial(_task_loss, network)


def _optimiser(course: Course) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, course.rate, max(course.steps // 20, 1), course.steps
    )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def parts(params: Any) -> Any:
        return {
            name: "frozen" if re.fullmatch(course.frozen, name) else "trained"
            for name in params
        }

    adam = optax.adamw(
        schedule, eps=course.epsilon, weight_decay=course.decay, mask=matrices
    )
    trained = optax.chain(optax.clip_by_global_norm(1.0), adam)
    return optax.multi_transform(
        {"trained": trained, "frozen": optax.set_to_zero()}, parts
    )


def _save_state(place: Path, done: int, state: Any) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part.npz")
    np.savez(part, np.array(done), *leaves)
    part.replace(place)


def _load_state(place: Path, like: Any) -> tuple[int, Any]:
    with np.load(place) as arrays:
        done, *leaves = (arrays[name] for name in arrays.files)
    state = jax.tree.unflatten(jax.tree.structure(like), map(jnp.asarray, leaves))
    return int(done), state


def kept(place: Path, name: str, train: Callable[[Path], Params]) -> Params:
    """Parameters as a checkpoint in `place`, trained if they are not there yet.

    Args:
        place: the directory.
        name: of the checkpoint.
        train: gets a file that keeps the state meanwhile.
    """
    path = place / name
    if not path.exists():
        print(f"training {name}", flush=True)
        state = place / f"{name}.npz"
        checkpoints.save(path, train(state))
        state.unlink(missing_ok=True)
    return jax.tree.map(jnp.asarray, checkpoints.load(path))
