"""What statistics know of models leaf by leaf: checked, and laid out as matrices."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxmerge.leafwise import ABSENT, check_models
from jaxmerge.matrices import MatrixAxes
from jaxmerge.options import Leaf, PerModel, choice, per_model
from jaxmerge.statistics.types import Site, Statistics
from jaxmerge.tree import Params, is_float, named_leaves

Metric = Literal["gram", "kronecker", "fisher", "fisher_block", "identity"]

_KINDS: dict[str, tuple[str, ...]] = {
    "gram": ("gram",),
    "kronecker": ("gram", "output_gradient"),
    "fisher": ("fisher",),
    "fisher_block": ("fisher_block",),
    "identity": (),
}


class Evidence(NamedTuple):
    """What is known of one task at one leaf, in matrices (*stack, m, n).

    Attributes:
        inputs: a sum of outer products, (*stack, inputs, inputs), or None.
        outputs: the same for the gradients of outputs, or None.
        samples: how many products were summed, (*stack, 1, 1).
        weight: the weight of the task, (*stack, 1, 1).
    """

    inputs: Array | None
    outputs: Array | None
    samples: Array
    weight: Array


class Problem(NamedTuple):
    """The leaves that a metric covers, as `merge_matrices` takes them.

    Attributes:
        models: the leaves of each model, by path.
        fishers: what curves each entry, like `models`; none for other metrics.
        axes: which axes are inputs and which are outputs, by path.
        evidence: by path, that of each task.
    """

    models: list[dict[str, Any]]
    fishers: list[dict[str, Any]]
    axes: dict[str, MatrixAxes]
    evidence: dict[str, list[Evidence]]


def pose(
    method: str,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    metric: Metric,
    weights: PerModel,
    warns: bool = True,
) -> Problem:
    """Finds what a metric covers; `warns` of second moments of too few samples.

    Raises:
        ValueError: models that are not alike, statistics that do not fit them or lack
            what the metric needs, or invalid weights; the message starts with `method`.
    """
    choice(method, "metric", metric, get_args(Metric))
    check_models(method, ABSENT, models)
    check_statistics(method, models, statistics, _KINDS[metric])
    axes, evidence = {}, {}
    sites = {site.path: site for site in statistics[0].sites}
    for path, leaf in named_leaves(models[0]).items():
        if not is_float(leaf) or not all(_covers(s, path, metric) for s in statistics):
            continue
        at = axes[path] = _axes(sites[path], metric)
        of_leaf = Leaf(method, path, np.shape(leaf), len(models))
        stack = tuple(of_leaf.shape[axis] for axis in at.stack)
        of_tasks = per_model(of_leaf, "weights", weights)
        evidence[path] = [
            _evidence(known, path, metric, stack, weight)
            for known, weight in zip(statistics, of_tasks, strict=True)
        ]
    if warns:
        warn_of_few_samples(method, evidence, metric)
    leaves = [named_leaves(jax.tree.map(_array, model)) for model in models]
    fishers = [s.fisher for s in statistics] if metric == "fisher" else []
    return Problem(_only(axes, leaves), _only(axes, fishers), axes, evidence)


def _array(leaf: Any) -> Any:
    """A leaf with a dtype, which Python floats have not."""
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf, jnp.result_type(leaf))


def _only(paths: Any, trees: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{path: tree[path] for path in paths} for tree in trees]


def check_statistics(
    method: str,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    kinds: Sequence[str],
) -> None:
    """Checks that there are statistics of every model, and of the kinds asked for.

    A model may be a part of the one that its statistics are of.

    Args:
        method: the caller's name, for messages.
        models: trees of arrays.
        statistics: those of each model.
        kinds: the fields that must not be empty.

    Raises:
        ValueError: something is missing, or belongs to another model.
    """
    if isinstance(statistics, Statistics) or not isinstance(statistics, Sequence):
        raise ValueError(
            f"{method}: statistics is a {type(statistics).__name__}; give a list with "
            "the Statistics of each model, in the order of the models."
        )
    if len(statistics) != len(models):
        raise ValueError(
            f"{method}: there are {len(statistics)} statistics for {len(models)} "
            "models; give those of each model, in the order of the models."
        )
    for i, (model, known) in enumerate(zip(models, statistics, strict=True)):
        what = f"{method}: statistics[{i}]"
        check_known(what, known, f"models[{i}]", model, kinds)
        if (known.axes, known.inputs) != (statistics[0].axes, statistics[0].inputs):
            raise ValueError(
                f"{what} was collected from a function that uses the leaves otherwise "
                "than that of statistics[0]; collect both from one function."
            )


def check_known(
    what: str, known: Any, name: str, model: Params, kinds: Sequence[str]
) -> None:
    """Checks one model's statistics; messages start with `what`.

    Raises:
        ValueError: as `check_statistics`.
    """
    if not isinstance(known, Statistics):
        raise ValueError(
            f"{what} is a {type(known).__name__}; collect Statistics with "
            "jaxmerge.collect."
        )
    if problems := list(_mismatches(model, known)):
        raise ValueError(
            f"{what} is of another model than {name}: {'; '.join(problems)}. Collect "
            "it again, of the model that is merged."
        )
    if missing := [kind for kind in kinds if not getattr(known, kind)]:
        too_large = [one for one in known.unknown if one.primitive in missing]
        remedy = f"; collect it with what={tuple(kinds)}."
        if too_large:
            remedy = f": of leaf {too_large[0].path!r}, {too_large[0].reason}."
        raise ValueError(f"{what} has no {' and no '.join(missing)}{remedy}")


def _mismatches(model: Params, statistics: Statistics) -> Iterator[str]:
    sites = {site.path: site for site in statistics.sites}
    for path, leaf in named_leaves(model).items():
        if not is_float(leaf):
            continue
        if path not in sites:
            yield f"it knows no leaf {path!r}"
            continue
        # Without x64, float64 of NumPy is float32 to all that computes.
        dtypes = jnp.result_type(leaf), jax.dtypes.canonicalize_dtype(sites[path].dtype)
        shapes = np.shape(leaf), sites[path].shape
        if dtypes[0] != dtypes[1] or shapes[0] != shapes[1]:
            yield (
                f"leaf {path!r} is {dtypes[0]}{shapes[0]}, it knows one that is "
                f"{dtypes[1]}{shapes[1]}"
            )


def _covers(statistics: Statistics, path: str, metric: Metric) -> bool:
    if metric in ("gram", "kronecker"):
        known = statistics.inputs.get(path) in statistics.gram
        return known and (metric == "gram" or path in statistics.output_gradient)
    return metric == "identity" or path in getattr(statistics, metric)


def _axes(site: Site, metric: Metric) -> MatrixAxes:
    if site.axes is not None and metric != "fisher_block":
        return site.axes
    rest = tuple(i for i in range(len(site.shape)) if i not in site.stack)
    if metric == "fisher_block":
        return MatrixAxes(site.stack, rest, ())
    return MatrixAxes(site.stack, rest[:-1], rest[-1:])


def _evidence(
    statistics: Statistics,
    path: str,
    metric: Metric,
    stack: tuple[int, ...],
    weight: Any,
) -> Evidence:
    inputs = outputs = None
    samples = statistics.examples
    if metric in ("gram", "kronecker"):
        name = statistics.inputs[path]
        inputs, samples = statistics.gram[name], statistics.tokens[name]
    if metric == "kronecker":
        outputs = statistics.output_gradient[path]
    if metric == "fisher_block":
        inputs = statistics.fisher_block[path]
    return Evidence(inputs, outputs, by_layer(samples, stack), by_layer(weight, stack))


def by_layer(x: Any, stack: tuple[int, ...]) -> Array:
    """One number, or one per layer, as matrices (*stack, 1, 1)."""
    x = jnp.asarray(movable(x), jnp.float32)
    return jnp.broadcast_to(x[..., None, None], (*stack, 1, 1))


def movable(x: Any) -> Any:
    """A small array that goes together with arrays on any devices."""
    return x if isinstance(x, Tracer) else np.asarray(x)


def warn_of_few_samples(
    method: str, evidence: dict[str, list[Evidence]], metric: Metric
) -> None:
    """Warns of moments that have more rows than samples, of all tasks together."""
    unit, of_rows = "tokens", {"inputs": "inputs", "outputs": "outputs"}
    if metric == "fisher_block":
        unit, of_rows = "examples", {"inputs": "entries"}
    few = []
    for path, tasks in evidence.items():
        counts = [task.samples for task in tasks]
        for name, called in of_rows.items():
            moments = getattr(tasks[0], name)
            if moments is None or any(isinstance(n, Tracer) for n in counts):
                continue
            rows = np.shape(moments)[-1]
            samples = np.min(sum(np.asarray(n) for n in counts), initial=rows)
            if samples < rows:
                few.append(f"{samples:g} for the {rows} {called} of {path!r}")
    if few:
        more = f" ({len(few) - 1} more have too few)" if few[1:] else ""
        warn(
            f"{method}: the second moments are of too few {unit}, in all tasks "
            f"together {few[0]}{more}. In directions without data, merged leaves stay "
            "where they start; collect statistics of more data."
        )


def warn(message: str) -> None:
    """Warns of the line from which the library was called."""
    frame, level = inspect.currentframe(), 1
    ours = ("jaxmerge", "jax")
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
