"""Arrays on many devices: what makes every method accept every sharding.

JAX has two kinds of mesh axes. Along `Auto` axes the compiler chooses shardings; along
`Explicit` axes, the default of `jax.make_mesh`, the sharding is part of an array's type
and many functions refuse an array whose sharding they cannot propagate. Everything here
works on both, and does nothing where there is no mesh.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxmerge.lazy import is_lazy
from jaxmerge.tree import Params, first_match, named_leaves, rebuild

AnyMesh = Mesh | AbstractMesh


def of(x: Any) -> NamedSharding | None:
    """The sharding of a concrete array, or a lazy one, over a mesh; None for others."""
    if is_lazy(x):
        return x.sharding
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return x.sharding if isinstance(x.sharding, NamedSharding) else None
    return None


def mesh_of(*arrays: Any) -> AnyMesh | None:
    """The mesh that arrays or tracers live on, else the one set by `jax.set_mesh`.

    Returns:
        The mesh of the first array that has one, concrete for concrete arrays and
        abstract for tracers; None where there is no mesh at all.
    """
    for x in arrays:
        placed = of(x) or jax.typeof(x).sharding
        if not placed.mesh.empty:
            return placed.mesh
    context = jax.sharding.get_abstract_mesh()
    return None if context.empty else context


def mesh_only_if(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Leaves the mesh that a caller has set with `jax.set_mesh`, or sets none.

    What is computed beside a mesh would else have a type that says it lies on it.
    """
    nothing = Mesh(np.empty((), object), ())
    return contextlib.nullcontext() if wanted else jax.set_mesh(nothing)


def auto(fn: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Lets the compiler choose the shardings inside `fn`, on whatever mesh it runs.

    Args:
        fn: a function of pytrees of arrays. What it closes over keeps its own type, so
            arrays on an `Explicit` mesh must come in as arguments.
        like: a pytree with the structure of the result, or a prefix of it, and of the
            ranks of its leaves. The result gets its shardings along `Explicit` axes;
            along `Auto` axes, `keep` pins them.

    Returns:
        `fn` itself in effect, if no axis of the mesh is `Explicit`.
    """

    def run(*args: Any) -> Any:
        mesh = mesh_of(*jax.tree.leaves((like, args)))
        if mesh is None or not mesh.explicit_axes:
            return fn(*args)
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), like
        )
        return jax.sharding.auto_axes(fn, out_sharding=shardings)(*args)

    return run


def keep(x: Array, sharding: Any) -> Array:
    """Gives `x`, inside `jax.jit`, the sharding of a concrete array.

    Args:
        x: an array or tracer.
        sharding: a `NamedSharding`. None and shardings without a mesh change nothing.
    """
    if not isinstance(sharding, NamedSharding):
        return x
    mesh = mesh_of(x) or sharding.mesh
    if mesh.explicit_axes:
        spec = _only(mesh.explicit_axes, sharding.spec)
        x = jax.reshard(x, NamedSharding(mesh, spec))
    if mesh.auto_axes:
        spec = _only(mesh.auto_axes, sharding.spec)
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return x


def join(x: Any, like: Any) -> Any:
    """Brings `x` to the devices of `like`, so that one computation can take both.

    Arrays that are already on the mesh of `like` keep their own sharding, and so do
    tracers. Others take the sharding of `like`, or are copied to all its devices if
    they have another shape.
    """
    if isinstance(x, Tracer) or isinstance(like, Tracer):
        return x
    if not isinstance(like, jax.Array) or not like.committed:
        return x
    if isinstance(x, jax.Array):
        x_mesh, mesh = (s and s.mesh for s in (of(x), of(like)))
        if x_mesh == mesh and x.devices() == like.devices():
            return x
    target = like.sharding
    if np.shape(x) != like.shape and isinstance(target, NamedSharding):
        target = NamedSharding(target.mesh, PartitionSpec())
    return jax.device_put(x, target)


def place(
    params: Params, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None
) -> Params:
    """Puts a pytree of arrays on a mesh, each leaf sharded by the first rule it fits.

    Args:
        params: a pytree of arrays.
        mesh: a concrete mesh of any shape.
        rules: from regular expressions, which must match a whole leaf path such as
            "layers/3/mlp/up/kernel", to `PartitionSpec`s. None replicates all leaves.

    Returns:
        A pytree like `params`.

    Raises:
        ValueError: as `shardings`.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": {"kernel": np.ones((4, 8)), "bias": np.ones(8)}}
        >>> rules = {".*/kernel": P(None, "model"), ".*": P()}
        >>> place(params, mesh, rules)["up"]["kernel"].sharding.spec
        P(None, 'model')
    """
    return jax.device_put(params, shardings(params, mesh, rules))


def shardings(
    params: Params, mesh: AnyMesh, rules: Mapping[str, PartitionSpec] | None = None
) -> Params:
    """The shardings that `place` gives, from shapes alone.

    Returns:
        A pytree of `NamedSharding`s with the structure of `params`.

    Raises:
        ValueError: lists every leaf that no rule matches or that its rule does not fit:
            more entries than the leaf has axes, a mesh axis that does not exist, or an
            axis that the mesh does not divide.
    """
    rules = {".*": PartitionSpec()} if rules is None else rules
    for pattern, spec in rules.items():
        if not isinstance(spec, PartitionSpec):
            raise ValueError(f"the rule {pattern!r} is {spec!r}, not a PartitionSpec.")
    specs, problems = {}, []
    for path, leaf in named_leaves(params).items():
        try:
            specs[path] = first_match(rules, path)
        except KeyError:
            problems.append(
                f"no rule matches leaf {path!r}; end the rules with '.*': "
                "PartitionSpec() to replicate all other leaves"
            )
        else:
            problems += _misfits(path, np.shape(leaf), specs[path], mesh)
    if problems:
        raise ValueError("shardings: " + ";\n".join(problems) + ".")
    return rebuild(params, {p: NamedSharding(mesh, spec) for p, spec in specs.items()})


def spread_evenly(shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """A sharding that cuts an array into equal parts, along its longest axes.

    A mesh axis that divides no axis of the array holds copies.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
        >>> spread_evenly((6, 64), mesh)
        P(None, ('data', 'model'))
    """
    names: list[list[str]] = [[] for _ in shape]
    left = list(shape)
    for name, size in mesh.shape.items():
        fitting = [axis for axis, n in enumerate(left) if n and n % size == 0]
        if fitting:
            axis = max(fitting, key=lambda axis: left[axis])
            names[axis].append(name)
            left[axis] //= size
    return PartitionSpec(*(tuple(entry) or None for entry in names))


def _misfits(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh
) -> Iterable[str]:
    said = f"leaf {path!r} of shape {shape} cannot be sharded as {spec}"
    if len(spec) > len(shape):
        yield f"{said}: it has {len(shape)} axes; shorten it, or add a rule before"
    named = [name for entry in spec for name in axes_in(entry)]
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        yield f"{said}: it names {twice} twice; a mesh axis cuts one axis of a leaf"
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        missing = [name for name in axes_in(entry) if name not in mesh.shape]
        if missing:
            yield f"{said}: the mesh has axes {mesh.axis_names}, not {missing}"
            continue
        devices = math.prod(mesh.shape[name] for name in axes_in(entry))
        if size % devices:
            yield (
                f"{said}: axis {axis} of size {size} is not divisible by the {devices} "
                f"devices of mesh axis {entry!r}; shard another axis, or None"
            )


class Spread(NamedTuple):
    """How a stack of matrices moves to whole matrices on single devices, and back.

    Attributes:
        mesh: the mesh that the layers are spread over.
        shape: the shape of the stack, (*stack, m, n).
        spec: how the stack is sharded.
        path: how the stack, as (layers, m, n), is sharded from step to step. Each step
            moves one mesh axis to the layers, which is an all-to-all; a jump to the
            end would make every device hold every layer.
    """

    mesh: AnyMesh
    shape: tuple[int, ...]
    spec: PartitionSpec
    path: tuple[PartitionSpec, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        return self.shape[:-2]

    @property
    def shards(self) -> tuple[int, ...]:
        """The number of shards that each leading axis is cut into."""
        specs = self.spec[: len(self.stack)]
        return tuple(math.prod(self.mesh.shape[a] for a in axes_in(s)) for s in specs)

    @property
    def per_shard(self) -> tuple[int, ...]:
        """The sizes of the leading axes within a shard."""
        return tuple(n // k for n, k in zip(self.stack, self.shards, strict=True))

    @property
    def whole(self) -> PartitionSpec:
        """The sharding of the layers when every matrix is whole on one device."""
        return PartitionSpec(self.path[-1][0])

    def spec_of_result(self, shape: tuple[int, ...]) -> PartitionSpec:
        """The sharding of a result (*stack, ...) that has come back.

        That of the stack for a result of its shape. Others stay spread, if all devices
        have equally many layers, or else are sharded along their leading axes alone.
        """
        if shape == self.shape:
            return self.spec
        if len(self.stack) == 1 and self.stack[0] % self.mesh.size == 0:
            return self.whole
        return PartitionSpec(*self.spec[: len(self.stack)])


def plan_spread(stack: Any, mesh: AnyMesh, spec: PartitionSpec | None = None) -> Spread:
    """Plans how the layers of a stack of matrices (*stack, m, n) spread over a mesh.

    Args:
        stack: an array or a tracer.
        mesh: where it lies.
        spec: how, where a tracer does not tell, with one entry per axis.
    """
    spec = _known_spec(stack, mesh, spec)
    axes = [list(axes_in(entry)) for entry in spec]
    layers = [name for entry in axes[:-2] for name in entry]
    rows, columns = axes[-2:]

    def current() -> PartitionSpec:
        return PartitionSpec(
            *(tuple(names) or None for names in (layers, rows, columns))
        )

    path = [current()]
    # Axes that hold copies move first: that is a local slice, and less to send later.
    used = {name for entry in axes for name in entry}
    layers += [name for name in mesh.axis_names if name not in used]
    path.append(current())
    for names in (rows, columns):
        while names:
            layers.append(names.pop())
            path.append(current())
    return Spread(mesh, np.shape(stack), spec, tuple(dict.fromkeys(path)))


def _known_spec(stack: Any, mesh: AnyMesh, told: PartitionSpec | None) -> PartitionSpec:
    """The sharding of a stack, one entry per axis."""
    if isinstance(stack, Tracer) and mesh.auto_axes:
        return told or _usual_spec(stack.shape, mesh)
    spec = (of(stack) or jax.typeof(stack).sharding).spec
    return PartitionSpec(*spec, *[None] * (stack.ndim - len(spec)))


def _usual_spec(shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """A guess where a tracer does not tell: how it is sharded along `Auto` axes.

    Spread over all devices, and one all-to-all away from most shardings in use, so that
    the stack is never gathered on its way.
    """
    names: list[list[str]] = [[] for _ in shape]

    def divides(name: str, axis: int) -> bool:
        return shape[axis] % math.prod(mesh.shape[n] for n in [*names[axis], name]) == 0

    for i, name in enumerate(mesh.axis_names):
        axes = (0, -2, -1) if i == 0 else (-1, -2, 0)
        # A stack that is cut into more shards than layers would have empty ones.
        largest = max((-2, -1), key=lambda axis: shape[axis])
        fitting = (axis for axis in axes if divides(name, axis))
        names[next(fitting, largest)].append(name)
    return PartitionSpec(*(tuple(entry) or None for entry in names))


def spread(stack: Array, plan: Spread) -> Array:
    """Brings (*stack, m, n) to (layers, m, n), every matrix whole on one device.

    The number of layers is padded, with copies, to a multiple of the devices. Layers
    are padded within each shard of the stack, and so change their order, because that
    costs no communication.
    """
    n, matrix = len(plan.stack), stack.shape[-2:]
    shards, per_shard = math.prod(plan.shards), math.prod(plan.per_shard)
    cut = [k for pair in zip(plan.shards, plan.per_shard, strict=True) for k in pair]
    order = (*range(0, 2 * n, 2), *range(1, 2 * n, 2), 2 * n, 2 * n + 1)
    blocks = stack.reshape(*cut, *matrix).transpose(order)
    blocks = blocks.reshape(shards, per_shard, *matrix)
    padding = -per_shard % (plan.mesh.size // shards)
    blocks = jnp.pad(blocks, ((0, 0), (0, padding), (0, 0), (0, 0)), mode="edge")
    layers = blocks.reshape(shards * (per_shard + padding), *matrix)
    for spec in plan.path:
        layers = keep(layers, NamedSharding(plan.mesh, spec))
    return layers


def unspread(layers: Array, plan: Spread) -> Array:
    """Brings results (layers, ...) back to (*stack, ...), undoing `spread`."""
    n, result = len(plan.stack), layers.shape[1:]
    if result == plan.shape[-2:]:
        for spec in reversed(plan.path):
            layers = keep(layers, NamedSharding(plan.mesh, spec))
    shards, per_shard = math.prod(plan.shards), math.prod(plan.per_shard)
    blocks = layers.reshape(shards, len(layers) // shards, *result)[:, :per_shard]
    blocks = blocks.reshape(*plan.shards, *plan.per_shard, *result)
    order = [axis for i in range(n) for axis in (i, n + i)]
    stack = blocks.transpose(*order, *range(2 * n, blocks.ndim))
    stack = stack.reshape(*plan.stack, *result)
    return keep(stack, NamedSharding(plan.mesh, plan.spec_of_result(stack.shape)))


def axes_in(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _only(axes: Iterable[str], spec: PartitionSpec) -> PartitionSpec:
    """The part of `spec` that speaks of `axes`."""
    kept = (tuple(n for n in axes_in(entry) if n in axes) or None for entry in spec)
    return PartitionSpec(*kept)
