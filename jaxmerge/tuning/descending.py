"""Coefficients by gradient: of labelled examples' loss, or of predictions' entropy.

Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv:2310.02575.

A merge is differentiable in its coefficients. What it does before they come in, such as
trimming or factorising task vectors, is computed once for all steps. Merges with loops
whose length depends on values have derivatives in the direction of coefficients only;
then it takes one merge for each coefficient and step.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxmerge import sharding
from jaxmerge.evaluation.measuring import (
    Apply,
    PerExample,
    by_task,
    cross_entropy,
    pairs_by_task,
    per_example,
)
from jaxmerge.leafwise import check_models, merge_leaves
from jaxmerge.methods.arithmetic import task_arithmetic
from jaxmerge.options import Leaf, choice, number, per_model, whole_number
from jaxmerge.tree import Params, is_float, named_leaves, rebuild
from jaxmerge.tuning.hoisting import Hoisted, hoist

Method = Callable[..., Params]
"""`method(base, models, *, ...)`, with the coefficients among its options."""

Granularity = Literal["task", "layer"]
Bounds = tuple[float, float]
AdaBounds = Bounds | Literal["paper"] | None
Rules = dict[str, Any]

TASK_VECTORS = "task vectors"
"""Stands for the option of methods that have none: task vectors are scaled."""


class Learned(NamedTuple):
    """What learning coefficients led to.

    Attributes:
        params: the merge with them.
        coefficients: rules from leaf paths to what was learned, in float32: (models,)
            or, where the option is one number for all models, a scalar. One rule for
            all leaves, or one for each. `method(base, models, **{option:
            coefficients})` is `params` again, unless `option` is "task vectors".
        losses: the mean over tasks of the loss on each one's batch before each step,
            (steps,), in float64.
        option: the option that they are of, or "task vectors" where these were scaled
            before the method saw them, for which there is no such call.
    """

    params: Params
    coefficients: Rules
    losses: np.ndarray
    option: str


def adamerging(
    apply: Apply | Mapping[str, Apply],
    base: Params,
    models: Sequence[Params],
    inputs: Any,
    *,
    granularity: Granularity = "task",
    method: Method = task_arithmetic,
    option: str | None = None,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    bounds: AdaBounds = "paper",
) -> Learned:
    r"""Learns coefficients that make predictions on unlabelled inputs most certain.

    Minimises $\frac{1}{T} \sum_{k=1}^T \mathrm{mean}_x H(\mathrm{softmax}
    f_\theta(x))$ over the $T$ tasks with Adam (the paper: their sum; Adam's steps
    hardly depend on which), where $\theta = \theta_0 + \sum_k \lambda_k \tau_k$
    (task-wise, equation 5) or $\theta^l = \theta_0^l + \sum_k \lambda_k^l \tau_k^l$
    (layer-wise, equation 6; a layer is a leaf, as in the authors' code). On top of
    another method, as in AdaMerging++: `method=functools.partial(jaxmerge.ties,
    vote="mass", aggregate="sum")`.

    Args:
        apply: `apply(params, inputs)` returns logits (examples, ..., classes). Tasks
            with heads of their own have a function each, by name.
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_k$, pytrees with the structure and shapes of `base`.
        inputs: by task, a batch of inputs, any pytree of arrays, or a list of batches,
            which steps take in turn; or those of a single task. A dict is always taken
            for tasks: the batch of a single task, if it is one, goes into a list.
            Batches of one shape are compiled once. The authors take 16 test images of
            each task twice per step; to know how a merge generalises, take other inputs
            than those of the test.
        granularity: one coefficient for each `"task"`, or for each task and `"layer"`.
        method: `method(base, models, *, ...)`, any registered method of that signature,
            or a function that calls one, as in `lambda base, models, weights:
            jaxmerge.average(models, weights=weights)`.
        option: of the method, what is learned. By default `weights`, one for each
            model; or else `scale`, one for all; where it has neither, or both are fixed
            by `functools.partial`, task vectors are scaled before the method sees them.
            `"task vectors"` chooses that for any method.
        steps: how many; 500 in the paper.
        learning_rate: of Adam; 0.001 in the paper, with betas 0.9 and 0.999.
        initial: of all coefficients; 0.3 in the paper.
        bounds: the interval that coefficients are kept in after each step; None for
            none. `"paper"` is (0, 1), where the authors' code keeps the weights of task
            vectors, but none for `scale`, which the paper does not learn and which is
            often best above 1.

    Returns:
        Parameters like `base`, in its dtypes and shardings, coefficients and losses.
        Those of the last step: there is no stopping rule in the paper either.

    Raises:
        ValueError: no models or inputs, trees that are not alike, an invalid option, or
            a loss that is not finite.

    Example:
        >>> base, model = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([4.0, 4]))}
        >>> apply = lambda params, x: x @ params["w"]
        >>> found = adamerging(apply, base, [model], jnp.eye(2), learning_rate=0.1)
        >>> found.coefficients[".*"].tolist()
        [1.0]
    """

    def loss(outputs: Array, batch: Any) -> Array:
        return _entropy(outputs)

    return _learn(
        "adamerging",
        by_task("adamerging", apply, inputs),
        loss,
        base,
        models,
        granularity=granularity,
        method=method,
        option=option,
        steps=steps,
        learning_rate=learning_rate,
        initial=initial,
        bounds=bounds,
    )


def few_shot_coefficients(
    apply: Apply | Mapping[str, Apply],
    base: Params,
    models: Sequence[Params],
    examples: Any,
    *,
    loss: PerExample = cross_entropy,
    granularity: Granularity = "task",
    method: Method = task_arithmetic,
    option: str | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    initial: float = 0.3,
    bounds: Bounds | None = None,
) -> Learned:
    r"""Learns coefficients that fit a handful of labelled examples.

    Minimises $\frac{1}{T} \sum_{k=1}^T \mathrm{mean}_{(x, y)} \ell(f_\theta(x), y)$
    over the $T$ tasks with Adam, by gradient through the merge.

    Args:
        apply: `apply(params, inputs)` returns outputs. Tasks with heads of their own
            have a function each, by name.
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_k$, pytrees with the structure and shapes of `base`.
        examples: by task, a pair of inputs and labels, or a list of such batches, which
            steps take in turn; or those of a single task. Never test data.
        loss: $\ell$, from outputs and labels to a number for each example.
        granularity: as in `adamerging`, and so are `method` and `option`.
        steps: how many.
        learning_rate: of Adam.
        initial: of all coefficients.
        bounds: the interval that coefficients are kept in; None for no bounds.

    Returns:
        As `adamerging`. Many coefficients, as with `granularity="layer"`, fit few
        examples better than they generalise.

    Raises:
        ValueError: no models or examples, trees that are not alike, an invalid option,
            or a loss that is not finite.

    Example:
        >>> base, model = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> apply = lambda params, x: x * params["w"][None]
        >>> square = lambda outputs, labels: (outputs - labels) ** 2
        >>> examples = (jnp.ones((1, 2)), jnp.full((1, 2), 0.8))
        >>> found = few_shot_coefficients(
        ...     apply, base, [model], examples, loss=square, learning_rate=0.1
        ... )
        >>> print(found.coefficients[".*"].round(2))
        [0.8]
    """
    tasks = pairs_by_task("few_shot_coefficients", apply, examples)
    return _learn(
        "few_shot_coefficients",
        {
            task: (functools.partial(_on_inputs, run), pairs)
            for task, (run, pairs) in tasks.items()
        },
        lambda outputs, batch: loss(outputs, batch[1]),
        base,
        models,
        granularity=granularity,
        method=method,
        option=option,
        steps=steps,
        learning_rate=learning_rate,
        initial=initial,
        bounds=bounds,
    )


def _on_inputs(run: Apply, params: Params, batch: tuple[Any, Any]) -> Any:
    return run(params, batch[0])


class _Problem(NamedTuple):
    """What coefficients are, and what they do.

    Attributes:
        paths: the patterns of the rules, one for each row of coefficients.
        option: of the method, or `TASK_VECTORS`.
        each: whether it takes one number for each model.
        merge: from rules to parameters.
    """

    paths: list[str]
    option: str
    each: bool
    merge: Callable[[Rules], Params]

    def rules(self, coefficients: Any) -> Rules:
        """The option, from coefficients (rules, numbers)."""
        rows = coefficients if self.each else coefficients[:, 0]
        return dict(zip(self.paths, rows, strict=True))


def _learn(
    caller: str,
    tasks: Mapping[str, tuple[Apply, Iterable[Any]]],
    loss: PerExample,
    base: Params,
    models: Sequence[Params],
    *,
    granularity: Granularity,
    method: Method,
    option: str | None,
    steps: int,
    learning_rate: float,
    initial: float,
    bounds: AdaBounds,
) -> Learned:
    """Minimises the mean over tasks of `loss` on outputs and batches."""
    check_models(caller, base, models)
    choice(caller, "granularity", granularity, get_args(Granularity))
    whole_number(caller, "steps", steps, least=1)
    rate = number(caller, "learning_rate", learning_rate, "(0, inf)", static=True)
    initial = number(caller, "initial", initial, static=True)
    problem = _problem(caller, base, models, granularity, method, option)
    if isinstance(bounds, str):
        choice(caller, "bounds", bounds, ("paper",))
        bounds = None if problem.option == "scale" else (0.0, 1.0)
    if bounds is not None and not bounds[0] <= initial <= bounds[1]:
        raise ValueError(
            f"{caller}: initial is {initial:g}, outside of bounds {bounds}; choose it "
            "between them."
        )
    batches = {task: list(given) for task, (_, given) in tasks.items()}
    if empty := [task for task, given in batches.items() if not given]:
        raise ValueError(f"{caller}: task {empty[0]!r} has no batches.")
    numbers = len(models) if problem.each else 1
    start = jnp.full((len(problem.paths), numbers), initial, jnp.float32)
    merged = hoist(lambda c: _floats(problem.merge(problem.rules(c)), base), start)

    def mean_loss(floats: Mapping[str, Array], batches: Mapping[str, Any]) -> Array:
        params = rebuild(base, named_leaves(base) | dict(floats))
        total = jnp.zeros(())
        for task, (run, _) in tasks.items():
            of_task = functools.partial(_task_loss, caller, run, loss)
            total += sharding.auto(of_task, like=total)(params, batches[task])
        return total / len(tasks)

    step = _step(merged, start, mean_loss, optax.adam(rate), bounds)
    coefficients, state, losses = start, optax.adam(rate).init(start), []
    for i in range(steps):
        batch = {task: given[i % len(given)] for task, given in batches.items()}
        value, coefficients, state = step(coefficients, state, batch)
        losses.append(value)
    course = np.array(jax.device_get(losses), float)
    if not np.isfinite(course).all():
        raise ValueError(
            f"{caller}: the loss is {course[~np.isfinite(course)][0]} at step "
            f"{int(np.argmin(np.isfinite(course)))}; check the batches, or take a "
            "smaller learning_rate."
        )
    rules = problem.rules(np.asarray(coefficients))
    return Learned(problem.merge(rules), rules, course, problem.option)


def _problem(
    caller: str,
    base: Params,
    models: Sequence[Params],
    granularity: Granularity,
    method: Method,
    option: str | None,
) -> _Problem:
    fixed = method.keywords if isinstance(method, functools.partial) else {}
    signature = inspect.signature(method).parameters
    accepted = [name for name in signature if name not in fixed]
    if next(iter(accepted), "") == "models":
        raise ValueError(
            f"{caller}: method takes no base; wrap it, as in lambda base, models, "
            "weights: jaxmerge.average(models, weights=weights)."
        )
    if option is None:
        known = (name for name in ("weights", "scale") if name in accepted)
        option = next(known, TASK_VECTORS)
    elif option in fixed:
        raise ValueError(
            f"{caller}: method has {option} fixed by functools.partial; leave it out "
            "there, or learn another option."
        )
    elif option != TASK_VECTORS and option not in accepted:
        raise ValueError(
            f"{caller}: method has no option {option!r}; there are "
            f"{', '.join(accepted[2:]) or 'none'}, and {TASK_VECTORS!r}."
        )
    paths = [".*"]
    if granularity == "layer":
        leaves = named_leaves(base).items()
        paths = [re.escape(path) for path, leaf in leaves if is_float(leaf)]

    def merge(rules: Rules) -> Params:
        if option == TASK_VECTORS:
            return method(base, _scale_all(caller, base, models, rules))
        return method(base, models, **{option: rules})

    return _Problem(paths, option, option in ("weights", TASK_VECTORS), merge)


def _scale_all(
    caller: str, base: Params, models: Sequence[Params], rules: Rules
) -> list[Params]:
    """The models, each with its task vector scaled."""

    def scaled(i: int) -> Params:
        def options(leaf: Leaf) -> dict[str, Any]:
            of_all = leaf._replace(models=len(models))
            return {"factor": per_model(of_all, TASK_VECTORS, rules)[i]}

        return merge_leaves(_scale, [models[i]], options, method=caller, base=base)

    return [scaled(i) for i in range(len(models))]


def _scale(deltas: Sequence[Array], *, factor: Array) -> Array:
    return factor * deltas[0]


def _floats(params: Params, base: Params) -> dict[str, Array]:
    """The leaves that a merge changes, by path."""
    leaves = named_leaves(params)
    return {path: leaves[path] for path, x in named_leaves(base).items() if is_float(x)}


def _step(
    merged: Hoisted,
    start: Array,
    mean_loss: Callable[[Mapping[str, Array], Any], Array],
    optimiser: optax.GradientTransformation,
    bounds: Bounds | None,
) -> Callable[..., Any]:
    """One step of the optimiser, from coefficients to the loss there and new ones."""
    pull_back = _backwards if _is_reversible(merged, start) else _forwards

    @jax.jit
    def step(
        values: list[Array], coefficients: Array, state: Any, batches: Any
    ) -> tuple[Array, Array, Any]:
        run = functools.partial(merged.run, values)
        value, slope = jax.value_and_grad(mean_loss)(run(coefficients), batches)
        slope = pull_back(run, coefficients, slope)
        update, state = optimiser.update(slope, state, coefficients)
        moved = jnp.asarray(optax.apply_updates(coefficients, update))
        if bounds is not None:
            moved = jnp.clip(moved, *bounds)
        return value, moved, state

    return functools.partial(step, merged.values)


def _is_reversible(merged: Hoisted, start: Array) -> bool:
    """Whether JAX can differentiate a merge from parameters back to coefficients."""

    def total(coefficients: Array) -> Array:
        leaves = merged.run(merged.values, coefficients).values()
        return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))

    try:
        jax.eval_shape(jax.grad(total), start)
    except (NotImplementedError, ValueError):
        return False  # There is a loop in it whose length depends on values, say.
    return True


def _backwards(
    run: Callable[[Array], dict[str, Array]],
    coefficients: Array,
    slope: dict[str, Array],
) -> Array:
    """The slope along coefficients of what has `slope` along merged leaves."""
    _, pull = jax.vjp(run, coefficients)
    return pull(slope)[0]


def _forwards(
    run: Callable[[Array], dict[str, Array]],
    coefficients: Array,
    slope: dict[str, Array],
) -> Array:
    """As `_backwards`, one coefficient after the other."""

    def along(direction: Array) -> Array:
        _, moved = jax.jvp(run, (coefficients,), (direction,))
        products = (jnp.sum(slope[path] * moved[path]) for path in slope)
        return sum(products, jnp.zeros(()))

    directions = jnp.eye(coefficients.size).reshape(-1, *coefficients.shape)
    return jax.lax.map(along, directions).reshape(coefficients.shape)


def _task_loss(
    caller: str, run: Apply, loss: PerExample, params: Params, batch: Any
) -> Array:
    size = len(jax.tree.leaves(batch)[0])
    return per_example(caller, loss(run(params, batch), batch), size).mean()


def _entropy(logits: Array) -> Array:
    """The entropy of the distribution over the last axis, in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
