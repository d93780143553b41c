"""What a merge did, as it is written next to the weights."""

import datetime
import math
import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

import numpy as np

import jaxmerge
from jaxmerge.checkpoints import Checkpoint
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods

T = TypeVar("T")

_BLOCK = 8192  # Entries that are in float64 at a time: small enough for the cache.


class LeafReport(NamedTuple):
    """What became of a leaf.

    Attributes:
        treatment: "merged", "copied: integer", "taken: base", "taken: first" or
            "skipped"; where a method merges matrices alone, "no matrix: " and the
            policy for other leaves, such as "no matrix: average".
        dtype_in: the dtype it has in the base (without one: in the first model).
        dtype_out: the dtype it was written in; None if skipped.
        base_norm: Euclidean norm in the base; None if not merged, or without a base.
        task_vector_norm: Euclidean norm of what was written minus the base.
    """

    treatment: str
    dtype_in: str
    dtype_out: str | None = None
    base_norm: float | None = None
    task_vector_norm: float | None = None


def merge_report(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint],
    leaves: Mapping[str, LeafReport],
    digests: Mapping[Any, Mapping[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """All there is to say about a merge, ready for JSON.

    Args:
        recipe: what was asked for; its text is None if it was built in Python.
        base: the checkpoint of the start.
        models: the checkpoints of the models by name.
        leaves: what became of each leaf.
        digests: path of a checkpoint -> file name -> SHA-256.
        seconds: how long it took.
    """

    def source(checkpoint: Checkpoint) -> dict[str, Any]:
        path = checkpoint.path
        return {"path": str(path.resolve()), "sha256": dict(digests[str(path)])}

    return {
        "recipe": recipe.text or None,
        **describe(recipe),
        "base": None if base is None else source(base),
        "models": [{"name": name, **source(model)} for name, model in models.items()],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "jaxmerge": jaxmerge.__version__,
            **{package: version(package) for package in ("jax", "jaxlib", "numpy")},
            "python": platform.python_version(),
        },
        "totals": {
            "treatments": dict(Counter(leaf.treatment for leaf in leaves.values())),
            "base_norm": _joint(leaf.base_norm for leaf in leaves.values()),
            "task_vector_norm": _joint(
                leaf.task_vector_norm for leaf in leaves.values()
            ),
            "seconds": round(seconds, 3),
        },
        "leaves": {name: leaf._asdict() for name, leaf in leaves.items()},
    }


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, apart from checkpoints, with all defaults; ready for JSON."""
    defaults = methods()[recipe.method].options
    options = {n: p.default for n, p in defaults.items()} | dict(recipe.options)
    return {
        "method": recipe.method,
        "options": {name: _plain(value) for name, value in options.items()},
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "take": dict(recipe.take),
        "max_shard_bytes": recipe.max_shard_bytes,
    }


def sum_of_squares(array: np.ndarray, minus: np.ndarray | None = None) -> float:
    """The sum of the squares of `array`, or of `array - minus`, in float64.

    Example:
        >>> sum_of_squares(np.array([3.0, 5.0]), minus=np.array([0.0, 1.0]))
        25.0
    """
    flat, total = array.reshape(-1), 0.0
    other = None if minus is None else minus.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float64)
        if other is not None:
            block -= other[start : start + _BLOCK]
        total += float(block @ block)
    return total


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Runs `function` in a thread that does not keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _joint(norms: Iterable[float | None]) -> float | None:
    """The norm of all leaves together, from the norms of each."""
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


def _plain(option: Any) -> Any:
    if isinstance(option, Mapping):
        return {key: _plain(value) for key, value in option.items()}
    if isinstance(option, list | tuple):
        return [_plain(value) for value in option]
    return option.tolist() if hasattr(option, "tolist") else option
