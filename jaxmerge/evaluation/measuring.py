"""Metrics of a model on labelled data, task by task.

All metrics come from one forward pass, which is compiled once: batches with too few
examples are filled up, and what fills them up does not count.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.tree import Params

Apply = Callable[[Params, Any], Any]
"""A model's forward pass, from parameters and inputs to outputs."""

PerExample = Callable[[Any, Any], Array]
"""From outputs and labels to one number for each example, or several to be averaged."""

Metric = str | PerExample


def accuracy(outputs: Array, labels: Array) -> Array:
    """Whether the largest of the `outputs` (..., classes) is at `labels` (...).

    Example:
        >>> accuracy(jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    return (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)


def cross_entropy(outputs: Array, labels: Array) -> Array:
    """Minus the log-probability of `labels` (...) under logits (..., classes).

    In float32, whatever the dtype of `outputs`.

    Example:
        >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])))
        [1.3862944]
    """
    log_probabilities = jax.nn.log_softmax(outputs.astype(jnp.float32))
    at_labels = jnp.asarray(labels)[..., None]
    return -jnp.take_along_axis(log_probabilities, at_labels, axis=-1)[..., 0]


METRICS: Mapping[str, PerExample] = {
    "accuracy": accuracy,
    "cross_entropy": cross_entropy,
}
"""The metrics that have a name."""


def evaluate(
    apply: Apply | Mapping[str, Apply],
    params: Params,
    batches: Any,
    metric: Metric | Sequence[Metric] = ("accuracy", "cross_entropy"),
) -> Any:
    """The mean of metrics over all examples, for each task.

    Args:
        apply: `apply(params, inputs)` runs the model, in the mode in which it is used.
            Tasks with heads of their own have a function each: a mapping from the names
            of tasks. The same function objects are compiled once, for all calls.
        params: a pytree of arrays, on any devices.
        batches: pairs of inputs and labels, pytrees of arrays whose first axis counts
            examples: one pair, a tuple, or a list or other iterable of them, which is
            gone through once. Or a mapping from the names of tasks to such. A batch
            smaller than the largest one before is filled up, and so not compiled again.
        metric: `"accuracy"`, `"cross_entropy"`, or a function of outputs and labels
            that returns a number for each example, (n,); further axes are averaged. Or
            a list of such.

    Returns:
        A float32 scalar on the device, for a list of metrics a dict of them by name
        (functions by theirs); for several tasks a dict of that by task. Every example
        counts equally, whatever the sizes of batches. It can be traced: as a score to
        `sweep` over, for example.

    Raises:
        ValueError: unknown metrics, no batches, batches that are no pairs or come in a
            tuple, tasks without a function, leaves of a batch that count examples
            differently, or a metric of another shape.

    Example:
        >>> apply = lambda params, x: x @ params["w"]
        >>> x, y = np.float32([[1, 0], [0, 1], [1, 1]]), np.array([0, 1, 1])
        >>> batches = [(x[:2], y[:2]), (x[2:], y[2:])]
        >>> found = evaluate(apply, {"w": np.diag([2.0, 1.0])}, batches, "accuracy")
        >>> round(found.item(), 3)
        0.667
    """
    alone = isinstance(metric, str) or callable(metric)
    metrics = _named([metric] if alone else metric)  # type: ignore[list-item]
    found = {}
    for task, (run, pairs) in pairs_by_task("evaluate", apply, batches).items():
        means = _means(task, run, params, pairs, tuple(metrics.values()))
        found[task] = means[0] if alone else dict(zip(metrics, means, strict=True))
    return found if isinstance(batches, Mapping) else found[""]


def by_task(
    method: str, apply: Apply | Mapping[str, Apply], batches: Any
) -> dict[str, tuple[Apply, Iterable[Any]]]:
    """The function and the batches of every task; one without a name is called "".

    Args:
        method: the caller's name, for messages.
        apply: a function, or one for each task.
        batches: a batch, an array or a tuple of such, or an iterable of batches; or
            either by task, where a batch may be a dict as well. A dict is always taken
            for tasks, so that a batch that is one, alone, comes in a list.

    Raises:
        ValueError: no tasks, or tasks without a function.
    """
    tasks = _named_tasks(batches)
    if not tasks:
        raise ValueError(
            f"{method}: there are no tasks; give batches for at least one."
        )
    if isinstance(apply, Mapping):
        if missing := [task for task in tasks if task not in apply]:
            raise ValueError(
                f"{method}: apply has no function for {', '.join(map(repr, missing))}; "
                f"there are {', '.join(map(repr, apply))}."
            )
        functions = {task: apply[task] for task in tasks}
    else:
        functions = dict.fromkeys(tasks, apply)
    return {
        task: (functions[task], [given] if _is_batch(given) else given)
        for task, given in tasks.items()
    }


def pairs_by_task(
    method: str, apply: Apply | Mapping[str, Apply], batches: Any
) -> dict[str, tuple[Apply, Iterator[tuple[Any, Any]]]]:
    """As `by_task`, where a batch is a pair of inputs and labels.

    Raises:
        ValueError: as `by_task`, or pairs in a tuple; later, in its turn, a batch that
            is no pair.
    """
    for task, given in _named_tasks(batches).items():
        if isinstance(given, tuple) and _are_pairs(given):
            raise ValueError(
                f"{_label(method, task)}: batches are a tuple of pairs; put several "
                "batches, or one whose inputs and labels are pairs, into a list."
            )
    return {
        task: (run, _pairs(_label(method, task), given))
        for task, (run, given) in by_task(method, apply, batches).items()
    }


def _pairs(label: str, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for i, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"{label}: batch {i} is no pair of inputs and labels; give (inputs, "
                "labels), and several such in a list."
            )
        yield batch[0], batch[1]


def _are_pairs(batch: tuple[Any, ...]) -> bool:
    """Whether what should be inputs and labels are pairs, all of the same kind."""
    if not all(isinstance(part, tuple | list) and len(part) == 2 for part in batch):
        return False
    kinds = [
        jax.tree.map(lambda x: (np.shape(x)[1:], jnp.result_type(x)), tuple(part))
        for part in batch
    ]
    return bool(kinds) and all(kind == kinds[0] for kind in kinds)


def _named_tasks(batches: Any) -> Mapping[str, Any]:
    return batches if isinstance(batches, Mapping) else {"": batches}


def _label(method: str, task: str) -> str:
    return f"{method}: task {task!r}" if task else method


def _is_batch(given: Any) -> bool:
    """Whether this is one batch: an array, or what belongs together."""
    return isinstance(given, tuple | Mapping) or hasattr(given, "shape")


def _named(metric: Sequence[Metric]) -> dict[str, PerExample]:
    metrics = {}
    for given in metric:
        if isinstance(given, str) and given not in METRICS:
            raise ValueError(
                f"evaluate: unknown metric {given!r}; there are "
                f"{', '.join(METRICS)}, and functions of outputs and labels."
            )
        name = given if isinstance(given, str) else getattr(given, "__name__", "metric")
        if name in metrics:
            raise ValueError(f"evaluate: two metrics are called {name!r}; rename one.")
        metrics[name] = METRICS[given] if isinstance(given, str) else given
    if not metrics:
        raise ValueError("evaluate: needs at least one metric.")
    return metrics


def _means(
    task: str,
    apply: Apply,
    params: Params,
    pairs: Iterator[tuple[Any, Any]],
    metrics: tuple[PerExample, ...],
) -> list[Array]:
    where = _label("evaluate", task)
    totals = [jnp.zeros(())] * len(metrics)
    examples, size = 0, 0
    for i, batch in enumerate(pairs):
        counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(counts) != 1 or counts == {()}:
            raise ValueError(
                f"{where}: batch {i} has leaves whose first axes are of sizes "
                f"{sorted(counts)}; the first axis must count the same examples."
            )
        ((count,),) = counts
        size = max(size, count)
        filled = jax.tree.map(functools.partial(_fill, size=size), batch)
        if count:
            totals = _add(params, filled, count, totals, apply=apply, metrics=metrics)
            examples += count
    if not examples:
        raise ValueError(f"{where}: there are no examples.")
    return [total / examples for total in totals]


def _fill(x: Any, size: int) -> Any:
    """Repeats the last example until there are `size`."""
    if len(x) in (0, size):
        return x
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.concatenate([x, xp.repeat(x[-1:], size - len(x), axis=0)])


@functools.partial(jax.jit, static_argnames=("apply", "metrics"))
def _add(
    params: Params,
    batch: tuple[Any, Any],
    count: int,
    totals: list[Array],
    *,
    apply: Apply,
    metrics: tuple[PerExample, ...],
) -> list[Array]:
    """Adds to each total what the first `count` examples of a batch have."""

    def add(
        params: Params, batch: tuple[Any, Any], count: Array, totals: list[Array]
    ) -> list[Array]:
        inputs, labels = batch
        outputs = apply(params, inputs)
        size = len(jax.tree.leaves(batch)[0])
        added = []
        for total, metric in zip(totals, metrics, strict=True):
            values = per_example("evaluate", metric(outputs, labels), size)
            counted = jnp.where(jnp.arange(size) < count, values, 0)
            added.append(total + jnp.sum(counted))
        return added

    return sharding.auto(add, like=totals)(params, batch, count, totals)


def per_example(method: str, values: Any, size: int) -> Array:
    """One float32 number for each of `size` examples: means over further axes.

    Raises:
        ValueError: the first axis does not count examples.
    """
    values = jnp.asarray(values, jnp.float32)
    if values.shape[:1] != (size,):
        raise ValueError(
            f"{method}: a metric returns an array of shape {values.shape} for {size} "
            "examples; let it return one number for each."
        )
    return values.reshape(size, -1).mean(axis=1)
