"""What a merge did, as it is written next to the weights."""

import datetime
import math
import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml

import jaxmerge
from jaxmerge.checkpoints import REPORT_NAME, Checkpoint
from jaxmerge.planning import Part, Plan

T = TypeVar("T")

_BLOCK = 1 << 16  # Entries that are summed at a time: small enough for the cache.
HASHES = 2
"""How many checkpoints are hashed at a time, beside a merge."""


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
    plan: Plan,
    leaves: Mapping[str, LeafReport],
    digests: Mapping[str, Mapping[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """All there is to say about a merge, ready for JSON.

    Args:
        plan: what was asked for; its text is empty if it was built in Python.
        leaves: what became of each leaf.
        digests: path of a checkpoint -> file name -> BLAKE3.
        seconds: how long it took.
    """
    return {
        "recipe": plan.text or None,
        "directory": str(Path.cwd()),
        "parts": [describe(part) for part in plan.parts],
        "format": plan.format,
        "max_shard_bytes": plan.max_shard_bytes,
        "blake3": {path: dict(files) for path, files in digests.items()},
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


def describe(part: Part) -> dict[str, Any]:
    """What is merged in a part, and how, with all defaults; ready for JSON."""
    recipe, inputs = part.recipe, part.inputs
    options = {n: p.default for n, p in part.method.options.items()}
    return {
        "method": recipe.method,
        "options": {
            name: _plain(value) for name, value in {**options, **recipe.options}.items()
        },
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "take": dict(recipe.take),
        "base": None if inputs.base is None else str(inputs.base.path.resolve()),
        "models": {name: str(m.path.resolve()) for name, m in inputs.models.items()},
    }


def model_card(plan: Plan) -> str:
    """What a README says about a merged model: from what, how, and how to do it again.

    Its head is metadata that model hubs read.
    """
    models = {}
    for part in plan.parts:
        for label, checkpoint in part.inputs.labelled.items():
            models.setdefault(str(checkpoint.path), label.partition(" ")[0])
    names = dict.fromkeys(Path(path).name for path in models)
    methods = dict.fromkeys(part.recipe.method for part in plan.parts)
    recipe = plan.text or yaml.safe_dump(
        [describe(part) for part in plan.parts], sort_keys=False
    )
    head = {"base_model": list(names), "tags": ["merge", "jaxmerge"]}
    return _CARD.format(
        head=yaml.safe_dump(head, sort_keys=False).rstrip(),
        names=", ".join(f"`{name}`" for name in names),
        methods=", ".join(f"`{name}`" for name in methods),
        version=jaxmerge.__version__,
        recipe=recipe.rstrip(),
        report=REPORT_NAME,
    )


_CARD = """\
---
{head}
---
# A merge of {names}

Made with jaxmerge {version}, by {methods}:

```yaml
{recipe}
```

`{report}` has the hashes of all inputs and what became of each leaf. To make it again:

```
jaxmerge merge --from-report {report} again
```
"""


def sums_of_squares(base: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """Those of a base and of a task vector, (2,), in float64.

    Parts are summed in float32, unless they are in float64 or too large for that.

    Args:
        base: array of any shape and floating-point dtype.
        merged: array of the same shape.

    Example:
        >>> sums_of_squares(np.array([3.0, 4.0]), np.array([3.0, 6.0])).tolist()
        [25.0, 4.0]
    """
    dtype = np.result_type(base, merged, np.float32)
    with np.errstate(over="ignore"):
        sums = _sums_of_squares(base, merged, dtype)
    return sums if np.isfinite(sums).all() else _sums_of_squares(base, merged, float)


def _sums_of_squares(base: np.ndarray, merged: np.ndarray, dtype: Any) -> np.ndarray:
    base, merged = base.reshape(-1), merged.reshape(-1)
    sums = np.zeros(2)
    for start in range(0, base.size, _BLOCK):
        of_base = base[start : start + _BLOCK].astype(dtype)
        sums[0] += of_base @ of_base
        delta = merged[start : start + _BLOCK].astype(dtype)
        delta -= of_base
        sums[1] += delta @ delta
    return sums


def hash_all(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """The BLAKE3 of all files of checkpoints, by key and name."""
    with ThreadPoolExecutor(HASHES) as pool:
        digests = pool.map(lambda each: each.digest(), checkpoints.values())
        return dict(zip(checkpoints, digests, strict=True))


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
