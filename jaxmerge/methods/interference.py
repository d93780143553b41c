"""Merging with the least interference between tasks: WUDI-Merging.

Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model
Merging via Task Vectors", ICML 2025, arXiv:2503.08099.
Wei et al., "Closed-Form Spectral Regularization for Multi-Task Model Merging",
arXiv:2606.07289.

Embeddings are looked up, not multiplied: here they count as other leaves, unless a rule
in `matrices` says otherwise, such as `{".*embedding": "io"}`.

Merged leaves can be differentiated by all numbers that may be traced. By the models
they can where Adam meets no entry without a slope, and where the eigenvalues that the
closed form needs differ.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.linalg import matmul
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import Fused, Others, merge_matrices
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.options import PerLeaf, choice, number, whole_number, without_effect
from jaxmerge.registry import register
from jaxmerge.tree import Params

Solver = Literal["adam", "closed_form"]


@register(
    paper="Cheng et al., Whoever Started the Interference Should End It, ICML 2025",
    link="https://arxiv.org/abs/2503.08099",
    identity={"others": "average"},
    gathers=True,
)
def wudi(
    base: Params,
    models: Sequence[Params],
    *,
    solver: Solver = "adam",
    steps: int = 300,
    learning_rate: float = 1e-5,
    time: float = math.inf,
    scale: PerLeaf = 1.0,
    others: Others = "base",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Moves the sum of task matrices towards least interference (WUDI-Merging).

    The rows of a task matrix $\Delta_t$ (outputs, inputs) lie in the space of the
    inputs that the task was trained on. What the merged $M$ does to those, beyond what
    the task asks for, is the interference
    $L(M) = \sum_t \lVert (M - \Delta_t) \Delta_t^\top \rVert^2 / \lVert \Delta_t
    \rVert^2$. It is reduced from $M_0 = \sum_t \Delta_t$ on: by steps of Adam, as in
    the authors' code, or in closed form along the gradient flow. With
    $C = \sum_t \Delta_t^\top \Delta_t / \lVert \Delta_t \rVert^2 = Q \Lambda Q^\top$,
    $B = \sum_t \Delta_t \Delta_t^\top \Delta_t / \lVert \Delta_t \rVert^2$ and
    $\dot M = B - M C$,

    $$M(t) = M_0 + (B - M_0 C)\, Q\, \frac{1 - e^{-t\Lambda}}{\Lambda}\, Q^\top.$$

    The exact minimum, at $t = \infty$, is known to merge worse than hundreds of steps
    of Adam, which stop before noise in directions of small eigenvalues is fitted; a
    finite $t$ does the same in closed form (arXiv:2606.07289; the truncation of that
    paper is left out). Eigenvalues of at most 1e-5 times the largest count as zero, and
    nothing moves in their directions.

    The closed form is equivariant to the scale of task matrices. Adam is not: its steps
    have about the length of the learning rate, whatever the entries. 300 steps of 1e-5
    suit entries of up to about 1e-3; larger ones do not get far from their sum.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`. A task matrix that is
            zero counts for nothing.
        solver: `"adam"` (the authors), or `"closed_form"`, which costs one
            decomposition into eigenvectors per matrix.
        steps: how many steps Adam takes, a whole number. It cannot be traced.
        learning_rate: of Adam, in the units of the parameters. May be traced. The
            authors also use 2e-5, for RoBERTa.
        time: how long the closed form follows the gradient flow, from 0, which leaves
            the sum, to infinity, the exact minimum. It has no units: the eigenvalues
            of C add up to the number of models. May be traced.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors use 1.
        others: what becomes of leaves that are no matrices: `"average"` or
            `"task_arithmetic"` of their task vectors, or `"base"` (the authors).
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is merged on its own. (The authors
            take queries, keys and values as one matrix.)

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, one that the
            solver has no use for, or a leaf of which no rule says which axes are inputs
            and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> spectra = [2.0, 0], [4.0, 0], [0, 5.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(wudi(base, models, solver="closed_form")["kernel"])
        [[3. 0.]
         [0. 5.]]
    """
    choice("wudi", "solver", solver, ("adam", "closed_form"))
    if solver == "adam":
        without_effect("wudi", "time", time, math.inf, "solver='closed_form'")
    else:
        without_effect("wudi", "steps", steps, 300, "solver='adam'")
        without_effect("wudi", "learning_rate", learning_rate, 1e-5, "solver='adam'")
    if not (isinstance(time, float) and time == math.inf):
        time = number("wudi", "time", time, "[0, inf)")
    return merge_matrices(
        _reduce_interference,
        base,
        models,
        method="wudi",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={
            "learning_rate": number("wudi", "learning_rate", learning_rate, "[0, inf)"),
            "time": time,
        },
        solver=solver,
        steps=whole_number("wudi", "steps", steps, least=0),
    )[0]


def _reduce_interference(
    deltas: Sequence[Array],
    *,
    learning_rate: Array,
    time: Array,
    solver: Solver,
    steps: int,
) -> tuple[Array, tuple[()]]:
    total: Array = sum(deltas)  # type: ignore
    units = [safe_divide(delta, norm(delta)) for delta in deltas]
    gram: Array = sum(matmul(unit.T, unit) for unit in units)  # type: ignore
    # M0 C - B without what cancels: of a single task Adam would follow the rounding.
    excess: Array = sum(  # type: ignore
        matmul(matmul(total - delta, unit.T), unit)
        for delta, unit in zip(deltas, units, strict=True)
    )
    if solver == "adam":
        return total + _descend(gram, excess, learning_rate, steps), ()
    return total + _flow(gram, excess, time), ()


def _descend(gram: Array, excess: Array, learning_rate: Array, steps: int) -> Array:
    """Where Adam gets from zero, down the gradient 2 (X `gram` + `excess`)."""
    import optax  # Commands that only look at methods must not wait for it.

    adam = optax.adam(learning_rate)

    def step(_, state):
        x, moments = state
        update, moments = adam.update(2 * (matmul(x, gram) + excess), moments)
        return optax.apply_updates(x, update), moments

    start = jnp.zeros_like(excess)
    return jax.lax.fori_loop(0, steps, step, (start, adam.init(start)))[0]


def _flow(gram: Array, excess: Array, time: Array, rtol: float = 1e-5) -> Array:
    """Where dX/dt = -(X `gram` + `excess`) gets from zero by `time`.

    Eigenvalues of at most `rtol` times the largest are rounding errors of zero, and
    nothing moves in their directions.
    """
    values, q = jnp.linalg.eigh(gram)
    # Infinity times zero is undefined, in the slope of the exponential too.
    time = jnp.minimum(time, jnp.finfo(values.dtype).max)
    known = values > rtol * values[-1]
    divisor = jnp.where(known, values, 1)
    reached = jnp.where(known, -jnp.expm1(-time * divisor) / divisor, 0)
    return -matmul(matmul(excess, q) * reached[None], q.T)
