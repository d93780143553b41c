"""Which leaf is which linear map: found by the names of leaves, never by their rank.

A rank does not tell. A bias of stacked layers has two axes, the query kernel of an
attention layer has one input axis and two output axes, and its output kernel has two
and one. Patterns spell out every axis of a leaf with one letter:

- `i`, an input, contracted with the activations that come in;
- `o`, an output;
- `e`, indexed: a row per token or position is looked up, not contracted.

A `*` repeats the letter before it any number of times, also none. PyTorch's linear
layer is "oi", a convolution kernel (height, width, in, out) "i*o", an embedding "eo",
a bias "o". Leading axes that stack layers or experts are declared apart.

Where names do not tell, the model does: `jaxmerge.statistics.trace` finds the axes of
all weights of a function, and what it finds may stand in the place of patterns.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.options import Leaf, choice, without_effect
from jaxmerge.tree import Params, first_match, named_leaves


class MatrixAxes(NamedTuple):
    """How the axes of a leaf make it a stack of matrices (*stack, inputs, outputs).

    Attributes:
        stack: axes of independent layers.
        inputs: axes contracted with the input, flattened in this order.
        outputs: axes of the output, flattened in this order.

    Axes along which rows are looked up, as in embeddings, are in none of the three.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf is a linear map (or a stack of them)."""
        return bool(self.inputs and self.outputs)


MatrixRules = Mapping[str, str | MatrixAxes]
"""From regular expressions, which must match a whole leaf path, to axis patterns, of
which the first match wins; and before that, from paths as they are to `MatrixAxes`,
which also say what that leaf stacks."""


def _named(names: str) -> str:
    """Matches paths that end in `names`, boxed (`nnx.State`, `nn.Partitioned`) too."""
    return rf"(.*[/.])?({names})([/.]value)?"


_VECTORS = {_named(r"bias|scale|\w+_bias"): "o*"}

FLAX: Mapping[str, str] = {
    _named(r"(query|key|value)[/.]kernel"): "ioo",
    _named(r"out[/.]kernel"): "iio",
    _named(r"\w*([Cc]onv|[Pp]atch)\w*([/.]\w+)?[/.]kernel"): "i*o",
    _named(r"kernel|lora_a|lora_b"): "io",
    _named(r"embedding"): "eo",
    _named(r"\w*pos(ition)?_?emb\w*|cls|cls_token|mask_token"): "e*o",
    **_VECTORS,
}
"""Leaves of linen and nnx modules."""

HUGGING_FACE: Mapping[str, str] = {
    # GPT-2's Conv1D stores (in, out). Models that took its names for nn.Linear, such as
    # GPT-BigCode, store (out, in) and need a rule of their own.
    _named(r"(c_attn|q_attn|c_fc|c_proj)[/.]weight"): "io",
    _named(r"(lm_head|embed_out)[/.]weight"): "oi",
    _named(r"(\w*embeddings?|embed|embed_\w+|\w+_embed)[/.]weight"): "eo",
    _named(r"(wte|wpe|shared|relative_attention_bias)[/.]weight"): "eo",
    _named(r"relative_position_bias_table"): "eo",
    _named(r"\w*position_embeddings?|pos_embed|cls_token|mask_token"): "e*o",
    _named(r".*([Cc]onv|[Pp]atch|downsampl).*[/.]weight"): "oi*",
    _named(r"weight|\w+_weight"): "oi",
    **_VECTORS,
}
"""Parameters of PyTorch models, as transformers, PEFT and timm name them."""

DEFAULT: Mapping[str, str] = {**FLAX, **HUGGING_FACE}


def matrix_axes(
    params: Params,
    rules: MatrixRules | None = None,
    stack_axes: int | Mapping[str, int] = 0,
    *,
    preset: Mapping[str, str] = DEFAULT,
) -> dict[str, MatrixAxes]:
    """Finds the linear maps among the leaves of a pytree.

    Args:
        params: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
        rules: from regular expressions, which must match a whole leaf path, to axis
            patterns. The first match wins, before any preset. And before that, from
            paths as they are to `MatrixAxes`: `trace(apply, params, batch).axes`.
        stack_axes: how many leading axes of a leaf stack layers (`nn.scan`) or experts;
            a number, or rules from paths to numbers. Patterns describe the other axes;
            `MatrixAxes` in `rules` know their own.
        preset: rules for the leaves that `rules` leave open. One whose pattern does not
            fit the number of axes gives way to the next. `FLAX`, `HUGGING_FACE`, or
            both (the default).

    Returns:
        The axes of each leaf, by path. A leaf with at most one axis beside stacked
        layers is never a matrix and needs no rule.

    Raises:
        ValueError: a leaf that no rule fits, or a rule that does not fit its leaf.

    Example:
        >>> params = {"query": {"kernel": np.ones((8, 2, 4)), "bias": np.ones((2, 4))}}
        >>> axes = matrix_axes(params)
        >>> axes["query/kernel"]
        MatrixAxes(stack=(), inputs=(0,), outputs=(1, 2))
        >>> axes["query/bias"].is_matrix
        False
    """
    return {
        path: leaf_axes(path, np.shape(leaf), rules, stack_axes, preset=preset)
        for path, leaf in named_leaves(params).items()
    }


def leaf_axes(
    path: str,
    shape: tuple[int, ...],
    rules: MatrixRules | None = None,
    stack_axes: int | Mapping[str, int] = 0,
    *,
    preset: Mapping[str, str] = DEFAULT,
) -> MatrixAxes:
    """The axes of one leaf; arguments and errors as in `matrix_axes`."""
    rule = _rule(path, rules or {})
    if isinstance(rule, MatrixAxes):
        return _checked(path, shape, rule)
    stacked = _stacked(path, shape, stack_axes)
    rank = len(shape) - stacked
    pattern = _preset_pattern(preset, path, rank) if rule is None else rule
    if pattern is None:
        raise ValueError(
            f"No rule says which axes of leaf {path!r} of shape {shape} are inputs "
            f"and which are outputs. {_remedy(path, rank, stacked)}"
        )
    letters = _letters(pattern, rank)
    if letters is None:
        raise ValueError(
            f"The pattern {pattern!r} for leaf {path!r} of shape {shape} does not have "
            f"one letter i, o or e for each of {rank} axes. "
            f"{_remedy(path, rank, stacked)}"
        )
    axes = [(axis, letter) for axis, letter in enumerate(letters, start=stacked)]
    return MatrixAxes(
        stack=tuple(range(stacked)),
        inputs=tuple(axis for axis, letter in axes if letter == "i"),
        outputs=tuple(axis for axis, letter in axes if letter == "o"),
    )


def row_axes(
    rules: MatrixRules | None = None,
) -> Callable[[Leaf], tuple[int, ...]]:
    """Finds the axes that number the rows of a leaf.

    Args:
        rules: from leaf paths to axis patterns or axes, before the presets.

    Returns:
        A function from a leaf to its output axes, for a linear map, or to the axes
        that it is looked up by, for an embedding. Other leaves have none. Axes of
        layers that `rules` alone know of are among them.
    """

    def rows(leaf: Leaf) -> tuple[int, ...]:
        try:
            axes = leaf_axes(leaf.path, leaf.shape, rules, len(leaf.units))
        except ValueError as error:
            raise ValueError(
                f"{leaf.method}: {error} Such rules are the option `matrices`; "
                "scope='leaf' needs none."
            ) from None
        if axes.is_matrix:
            if not set(leaf.units) <= set(axes.stack):
                raise ValueError(
                    f"{leaf.method}: stack_axes is {len(leaf.units)} for leaf "
                    f"{leaf.path!r}, but its rule in `matrices` is {axes}; leave out "
                    "stack_axes for this leaf."
                )
            stack = (axis for axis in axes.stack if axis not in leaf.units)
            return (*stack, *axes.outputs)
        in_use = (*axes.stack, *axes.inputs, *axes.outputs)
        return tuple(axis for axis in range(len(leaf.shape)) if axis not in in_use)

    return rows


def rows_by_scope(
    method: str, scope: str, rules: MatrixRules | None
) -> Callable[[Leaf], tuple[int, ...]] | None:
    """What `row_axes` gives for `scope="row"`; None for `scope="leaf"`.

    Raises:
        ValueError: another scope, or rules that have no effect.
    """
    choice(method, "scope", scope, ("leaf", "row"))
    if scope == "row":
        return row_axes(rules)
    without_effect(method, "matrices", rules, None, "scope='row'")
    return None


def to_matrix(leaf: Array, axes: MatrixAxes) -> Array:
    """Lays a leaf out as (*stack, inputs, outputs), each of the two flattened.

    One without outputs becomes a matrix of one output.

    Raises:
        ValueError: `axes` do not make a matrix of the leaf.

    Example:
        >>> kernel = jnp.ones((8, 2, 4))
        >>> to_matrix(kernel, MatrixAxes(stack=(), inputs=(0,), outputs=(1, 2))).shape
        (8, 8)
    """
    order = _order(np.shape(leaf), axes)
    return jnp.transpose(leaf, order).reshape(matrix_shape(leaf.shape, axes))


def matrix_shape(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, ...]:
    """The shape that `to_matrix` gives a leaf of `shape`."""
    stack, inputs, outputs = ([shape[axis] for axis in group] for group in axes)
    return (*stack, math.prod(inputs), math.prod(outputs))


def from_matrix(matrix: Array, shape: tuple[int, ...], axes: MatrixAxes) -> Array:
    """Brings (*stack, inputs, outputs) back to a leaf of `shape`; undoes `to_matrix`.

    Raises:
        ValueError: as `to_matrix`.
    """
    order = _order(shape, axes)
    leaf = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(leaf, [order.index(axis) for axis in range(len(order))])


def output_parts(
    method: str,
    path: str,
    outputs: int,
    fused: Mapping[str, int | Sequence[int]] | None,
) -> tuple[int, ...]:
    """The numbers of outputs of the matrices that are fused in a leaf.

    Args:
        method: the caller's name, for messages.
        path: the leaf's path.
        outputs: its number of outputs.
        fused: from paths to the number of equal parts, or to the sizes of all parts,
            in the order of the outputs. Leaves without a rule are one matrix.

    Raises:
        ValueError: parts that do not add up to the outputs.

    Example:
        >>> rules = {".*in_proj_weight": 3, ".*qkv_proj.weight": [64, 16, 16]}
        >>> output_parts("sftm", "attn.in_proj_weight", 96, rules)
        (32, 32, 32)
        >>> output_parts("sftm", "attn.qkv_proj.weight", 96, rules)
        (64, 16, 16)
    """
    try:
        parts = first_match(fused or {}, path)
    except KeyError:
        return (outputs,)
    if isinstance(parts, int) and parts > 0 and outputs % parts == 0:
        return (outputs // parts,) * parts
    sizes = parts if isinstance(parts, list | tuple) else ()
    if all(isinstance(n, int) and n > 0 for n in sizes) and sum(sizes) == outputs:
        return tuple(sizes)
    raise ValueError(
        f"{method}: fused is {parts!r} for leaf {path!r} with {outputs} outputs; give "
        "a number of equal parts that divides them, or a list of sizes that sum to "
        "them."
    )


def _order(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, ...]:
    order = (*axes.stack, *axes.inputs, *axes.outputs)
    if sorted(order) != list(range(len(shape))):
        raise ValueError(
            f"{axes} do not make a leaf of shape {shape} a matrix: every axis must be "
            "in one of the three."
        )
    return order


def _rule(path: str, rules: MatrixRules) -> str | MatrixAxes | None:
    axes = rules.get(path)
    if isinstance(axes, MatrixAxes):
        return axes
    patterns = {key: rule for key, rule in rules.items() if isinstance(rule, str)}
    try:
        return first_match(patterns, path)
    except KeyError:
        return None


def _checked(path: str, shape: tuple[int, ...], axes: MatrixAxes) -> MatrixAxes:
    in_use = sorted((*axes.stack, *axes.inputs, *axes.outputs))
    every = list(range(len(shape)))
    if in_use != every and (axes.is_matrix or not set(in_use) <= set(every)):
        raise ValueError(
            f"The rule for leaf {path!r} of shape {shape} is {axes}, which must have "
            f"each of its {len(shape)} axes once; trace the model that is merged."
        )
    return axes


def _stacked(
    path: str, shape: tuple[int, ...], stack_axes: int | Mapping[str, int]
) -> int:
    if isinstance(stack_axes, Mapping):
        try:
            stack_axes = first_match(stack_axes, path)
        except KeyError:
            raise ValueError(
                f"No rule of stack_axes matches leaf {path!r}; end them with '.*': 0 "
                "for all leaves that stack no layers."
            ) from None
    if not 0 <= stack_axes <= len(shape):
        raise ValueError(
            f"stack_axes is {stack_axes} for leaf {path!r} of shape {shape}; it must "
            f"be in [0, {len(shape)}]. Where leaves differ, give rules such as "
            "{'layers/.*': 1, '.*': 0}."
        )
    return int(stack_axes)


def _preset_pattern(preset: Mapping[str, str], path: str, rank: int) -> str | None:
    if rank < 2:
        return "o" * rank
    for regex, pattern in preset.items():
        if re.fullmatch(regex, path) and _letters(pattern, rank):
            return pattern
    return None


def _letters(pattern: str, rank: int) -> str | None:
    """One letter per axis, or None where the pattern does not fit `rank` axes."""
    if not re.fullmatch(r"[ioe]*(?:[ioe]\*)?[ioe]*", pattern):
        return None
    before, star, after = pattern.partition("*")
    if star:
        repeats = rank - len(before) - len(after) + 1
        return before[:-1] + before[-1] * repeats + after if repeats >= 0 else None
    return pattern if len(pattern) == rank else None


def _remedy(path: str, rank: int, stacked: int) -> str:
    stack = f" (after {stacked} stacked)" if stacked else ""
    example = "i" * (rank - 1) + "o"
    return (
        f"Give a rule such as {{{re.escape(path)!r}: {example!r}}} with one letter per "
        f"axis{stack}: i for input, o for output, e for rows that are looked up; and "
        "declare leading axes that stack layers in stack_axes."
    )
