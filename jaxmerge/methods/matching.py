"""Merges that keep what each model does on its own data: a linear system per leaf.

Tam et al., "Merging by Matching Models in Task Parameter Subspaces", TMLR 2024,
arXiv:2312.04339.
Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR
2023, arXiv:2212.09849.

Merged leaves can be differentiated forwards alone: the number of steps depends on the
values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import ABSENT, Kernel, check_trees
from jaxmerge.linalg import SolveInfo
from jaxmerge.matrixwise import map_task_matrices, merge_matrices, plan_matrices
from jaxmerge.methods.curvature import (
    Normalize,
    Precondition,
    Stop,
    curvatures,
    solve,
    solve_fully,
    warn_of_indefinite,
)
from jaxmerge.methods.evidence import Evidence, Metric, Problem, pose
from jaxmerge.methods.fisher import merge_weighted
from jaxmerge.options import PerModel, choice, number, whole_number, without_effect
from jaxmerge.registry import register
from jaxmerge.statistics.types import Statistics
from jaxmerge.tree import Params, named_leaves, rebuild

Others = Literal["average", "diagonal"]


@register(
    paper="Tam et al., Matching Models in Task Parameter Subspaces, TMLR 2024",
    link="https://arxiv.org/abs/2312.04339",
    gathers=True,
)
def mats(
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    metric: Metric = "gram",
    weights: PerModel = 1.0,
    init: Any = "average",
    steps: int = 100,
    stop: Stop = "relative",
    rtol: float = 1e-5,
    precondition: Precondition = "none",
    shrinkage: float = 1.0,
    ridge: float = 0.0,
    normalize: Normalize = "count",
    others: Others = "average",
    info: bool = False,
) -> Any:
    r"""Matches models where their data lie, by a few steps of conjugate gradients.

    Takes steps from $\theta_0$, the `init`, towards the solution of $\sum_t w_t C_t
    \theta = \sum_t w_t C_t \theta_t$, leaf by leaf. Early steps settle the directions
    of largest curvature; what they have not reached stays as in `init`.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        statistics: of each model, with what `metric` needs.
        metric: the curvature $C_t$. For weights, with $A_t$ the mean of $x x^T$ over
            their inputs and $G_t$ that of $g g^T$ over the gradients of their outputs:
            `"gram"`, $A_t$ alone (RegMean's objective), or `"kronecker"`, the product
            of both (K-FAC). For all leaves: `"fisher"`, the diagonal of the Fisher
            information, or `"identity"`. For small vectors: `"fisher_block"`, the whole
            of it.
        weights: $w_t$, dimensionless. May be traced.
        init: where the steps start: `"average"`, `"regmean"` at its defaults, or a
            pytree like the models; the authors take task arithmetic at 0.3.
        steps: the most steps. The authors take 100, and 10 for vectors.
        stop: when a leaf is done. What is left of its equations is $r = \sum_t w_t C_t
            (\theta_t - \theta)$. `"relative"`: when $\|r\|$ is at most `rtol` times
            $\sum_t \|w_t C_t (\theta_t - \theta_0)\|$. `"steps"`: after `steps`.
            `"published"`, as in the authors' runs: when $\|r\|$ is at most `rtol` times
            $\|\sum_t w_t C_t \theta_t\|$, or without a step if it is at most `rtol` at
            `init`, whatever the scale of gradients.
        rtol: as `stop` says, dimensionless.
        precondition: what is used as a rough inverse of $\sum_t w_t C_t$: that of its
            diagonal (`"jacobi"`) or, for second moments, of the sums of the factors
            (`"kronecker"`). Fewer steps solve the system, but other directions come
            first. For `"kronecker"` of factors that are singular, as with few samples
            and below a softmax, set `ridge` to 1e-4.
        shrinkage: what off-diagonal entries of $A_t$ and $G_t$ are multiplied by.
        ridge: how much of its own diagonal is added to the left side, dimensionless,
            which holds leaves at `init`.
        normalize: how tasks compare: `"count"` takes means over tokens (examples for
            Fisher information), `"trace"` curvatures of mean one, and `"none"` lets
            a task weigh in by its amount of data.
        others: what becomes of leaves that `metric` has no statistics of: the
            `"average"`, as the authors do, or, with `"diagonal"`, one where each entry
            weighs by how much it was used, as rows of embeddings by how often they were
            looked up (but not by how much these entries matter to the loss). With
            `metric="gram"`, look-ups count in tied embeddings too, beside their $A_t$.
        info: whether to return, besides the merged tree, a `SolveInfo` per leaf.

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32. With `info`, also a dict from paths to `SolveInfo`, with a leading axis
        for stacked layers, and residuals as `stop="relative"` measures them. Warns of
        second moments with more rows than tokens (for `"fisher_block"`, examples) in
        all tasks together, however alike these are, and of systems without a minimum.

    Raises:
        ValueError: no models, trees that are not alike, statistics that do not belong
            to them or lack what `metric` needs, or an invalid option.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> models = [{"kernel": jnp.eye(2)}, {"kernel": 3 * jnp.eye(2)}]
        >>> data = [[jnp.diag(jnp.array([2.0, 1.0]))], [jnp.eye(2)]]
        >>> known = [collect(apply, *both) for both in zip(models, data)]
        >>> merged, info = mats(models, known, info=True)
        >>> print(merged["kernel"].round(4), info["kernel"].steps)
        [[1.4 0. ]
         [0.  2. ]] 1
    """
    choice("mats", "stop", stop, get_args(Stop))
    choice("mats", "precondition", precondition, get_args(Precondition))
    by_name = isinstance(init, str)
    if by_name:
        choice("mats", "init", init, ("average", "regmean"))
    if stop == "steps":
        without_effect("mats", "rtol", rtol, 1e-5, "stop='relative'")
    if metric == "identity":
        needs = "a metric of data"
        without_effect("mats", "others", others, "average", needs)
        if not by_name or init == "average":
            without_effect("mats", "normalize", normalize, "count", needs)
    if metric in ("fisher", "identity"):
        needs = "a metric of second moments"
        without_effect("mats", "shrinkage", shrinkage, 1.0, needs)
        if precondition == "kronecker":
            raise ValueError(
                f"mats: precondition='kronecker' needs {needs}, not {metric!r}, whose "
                "diagonal is all there is; set precondition='jacobi'."
            )
    start = None if by_name else init
    if by_name and init == "regmean":
        start, _ = match(
            solve_fully,
            "mats",
            models,
            statistics,
            metric="gram",
            weights=weights,
            normalize=normalize,
            others="average",
            numbers={"shrinkage": 0.9, "ridge": 1e-4},
            warns=metric not in ("gram", "kronecker"),
        )
    merged, told = match(
        solve,
        "mats",
        models,
        statistics,
        metric=metric,
        weights=weights,
        normalize=normalize,
        others=others,
        start=start,
        numbers={
            "rtol": number("mats", "rtol", rtol, "[0, inf)"),
            "shrinkage": number("mats", "shrinkage", shrinkage, "[0, 1]"),
            "ridge": number("mats", "ridge", ridge, "[0, inf)"),
            "steps": whole_number("mats", "steps", steps, least=0),
        },
        started=start is not None,
        stop=stop,
        precondition=precondition,
    )
    return (merged, told) if info else merged


@register(
    paper="Jin et al., Dataless Knowledge Fusion (RegMean), ICLR 2023",
    link="https://arxiv.org/abs/2212.09849",
    gathers=True,
)
def regmean(
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    weights: PerModel = 1.0,
    shrinkage: float = 0.9,
    ridge: float = 1e-4,
    normalize: Normalize = "count",
    others: Others = "average",
    info: bool = False,
) -> Any:
    r"""Merges weights so that their outputs on all tasks' inputs change least.

    $W = \arg\min \sum_t w_t \mathrm{E} \|W x - W_t x\|^2 = \left(\sum_t w_t W_t A_t
    \right) \left(\sum_t w_t A_t\right)^{-1}$, with $A_t$ the mean of $x x^\top$ over
    the inputs $x$ that model $t$ gives the weight on its data.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        statistics: of each model, with `gram`.
        weights: $w_t$, dimensionless. May be traced.
        shrinkage: what off-diagonal entries of $A_t$ are multiplied by, in [0, 1]; 0
            averages each input's weights by its power. Authors' values lie between 0.1
            and 1, most of them at 0.9 and 0.95.
        ridge: how much of its own diagonal is added to $\sum_t w_t A_t$, which holds
            directions that no task has data in at the average. Below $10^{-5}$, these
            fill with rounding errors.
        normalize: how tasks compare: `"count"` takes means over tokens, `"trace"`
            $A_t$ of mean diagonal one, and `"none"` sums over tokens.
        others: what becomes of leaves that have no $A_t$: the `"average"`, as the
            authors do, or, with `"diagonal"`, one where each entry weighs by how much
            it was used, as rows of embeddings by how often they were looked up: for
            these, the same objective. In tied embeddings, which have $A_t$ too, the
            objective is then the sum of both.
        info: whether to return, besides the merged tree, a `SolveInfo` per leaf.

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32. With `info`, also a dict from paths to `SolveInfo`, with a leading axis
        for stacked layers: the inverse is a few steps of conjugate gradients, after a
        factorisation, that make up for what float32 loses in it. Warns as `mats`.

    Raises:
        ValueError: no models, trees that are not alike, statistics that do not belong
            to them or have no `gram`, or an invalid option.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> models = [{"kernel": jnp.eye(2)}, {"kernel": 3 * jnp.eye(2)}]
        >>> data = [[jnp.diag(jnp.array([2.0, 1.0]))], [jnp.eye(2)]]
        >>> known = [collect(apply, *both) for both in zip(models, data)]
        >>> print(regmean(models, known, ridge=0.0)["kernel"].round(4))
        [[1.4 0. ]
         [0.  2. ]]
    """
    merged, told = match(
        solve_fully,
        "regmean",
        models,
        statistics,
        metric="gram",
        weights=weights,
        normalize=normalize,
        others=others,
        numbers={
            "shrinkage": number("regmean", "shrinkage", shrinkage, "[0, 1]"),
            "ridge": number("regmean", "ridge", ridge, "[0, inf)"),
        },
    )
    return (merged, told) if info else merged


def matching_objective(
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    params: Params,
    *,
    metric: Metric = "gram",
    weights: PerModel = 1.0,
    normalize: Normalize = "count",
) -> dict[str, Array]:
    r"""How far `params` are from the models where the models' data lie.

    $\sum_t w_t (\theta - \theta_t)^\top C_t (\theta - \theta_t)$: what `mats` makes
    small. With `metric="gram"` that is the mean squared change of the outputs of a
    weight on each task's inputs, summed over tasks and outputs.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        statistics: of each model, with what `metric` needs.
        params: a pytree like the models, such as a merge of them.
        metric: as for `mats`.
        weights: as for `mats`.
        normalize: as for `mats`.

    Returns:
        By path, for the leaves that `metric` has statistics of, a number, or an array
        of one per stacked layer.

    Raises:
        ValueError: as `mats`.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> models = [{"kernel": jnp.eye(2)}, {"kernel": 3 * jnp.eye(2)}]
        >>> known = [collect(apply, model, [jnp.eye(2)]) for model in models]
        >>> average = {"kernel": 2 * jnp.eye(2)}
        >>> for params in (models[0], average):
        ...     print(matching_objective(models, known, params)["kernel"])
        4.0
        2.0
    """
    method = "matching_objective"
    choice(method, "normalize", normalize, get_args(Normalize))
    problem = pose(method, models, statistics, metric, weights, warns=False)
    params = _covered(method, problem, models, "params", params)
    plan = plan_matrices(
        ABSENT,
        [*problem.models, params, *problem.fishers],
        method=method,
        axes=problem.axes,
        beside=problem.evidence,
    )
    values = map_task_matrices(_distance, plan, normalize=normalize)
    return {path: value for path, (value,) in values.items()}


def _distance(
    matrices: Sequence[Array], *, beside: Sequence[Evidence], normalize: Normalize
) -> Array:
    tasks = len(beside)
    deltas = [matrices[tasks] - matrix for matrix in matrices[:tasks]]
    beside = jax.tree.map(lambda x: x.astype(deltas[0].dtype), beside)
    of_tasks = curvatures(beside, matrices[tasks + 1 :], normalize)
    pairs = zip(of_tasks, deltas, strict=True)
    return sum((jnp.sum(delta * c(delta)) for c, delta in pairs), jnp.zeros(()))


def _covered(
    method: str, problem: Problem, models: Sequence[Params], name: str, tree: Params
) -> dict[str, Any]:
    """The leaves of a further tree that the problem covers."""
    check_trees(method, {"models[0]": models[0], name: tree})
    leaves = named_leaves(tree)
    return {path: leaves[path] for path in problem.axes}


def match(
    kernel: Kernel,
    method: str,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    metric: Metric,
    weights: PerModel,
    normalize: Normalize,
    others: Others,
    numbers: Mapping[str, Any],
    start: Params | None = None,
    warns: bool = True,
    **choices: Any,
) -> tuple[Params, dict[str, SolveInfo]]:
    """Solves the systems of the leaves that `metric` covers; others by policy.

    Args:
        kernel: one of `solve` and what is made of it.
        method: the caller's name, for messages.
        models: as for `mats`, and so are the options up to `others`.
        statistics: of each model.
        numbers: arguments of `kernel` that may be traced.
        start: a tree like the models to start at, if not at the average.
        warns: whether to warn of few samples and of systems without a minimum.
        choices: arguments of `kernel` that are compiled in.

    Returns:
        A tree like the first model, and by path how it went.
    """
    choice(method, "normalize", normalize, get_args(Normalize))
    choice(method, "others", others, get_args(Others))
    problem = pose(method, models, statistics, metric, weights, warns)
    starts = [] if start is None else [_covered(method, problem, models, "init", start)]
    used = [known.diagonal if others == "diagonal" else {} for known in statistics]
    tied = {p for p in problem.axes if metric == "gram" and all(p in x for x in used)}
    merged, told = {}, {}
    plain = problem.axes.keys() - tied
    for paths, entries in ((tied, used), (plain, problem.fishers)):
        trees = [*problem.models, *starts, *entries]
        matched, how = merge_matrices(
            kernel,
            ABSENT,
            [{path: tree[path] for path in sorted(paths)} for tree in trees],
            method=method,
            axes=problem.axes,
            beside=problem.evidence,
            numbers=numbers,
            normalize=normalize,
            **choices,
        )
        merged, told = merged | matched, told | how
    if warns:
        warn_of_indefinite(method, told)
    leaves = [named_leaves(model) for model in models]
    rest = merge_weighted(
        method,
        [{p: leaf for p, leaf in tree.items() if p not in merged} for tree in leaves],
        statistics,
        used,
        weights=weights,
        normalize=normalize,
    )
    return rebuild(models[0], {**merged, **rest}), told
