"""Marks the calls of a model's submodules, so that they are found in its jaxpr.

A marked call is that of a jitted function whose name says what is called. Names survive
what JAX does to functions, so that the calls inside of jit, vmap, checkpoints and scans
are found as well. The modules of flax are marked as they are, wherever one of their
public methods is called; parts of plain functions are where they were declared with
`submodule`.
"""

import contextlib
import contextvars
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from jaxmerge.jaxprs import Equation
from jaxmerge.tree import Params, named_leaves, rebuild

_listening = contextvars.ContextVar("listening", default=False)


def submodule(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Declares a part of a plain function of parameters to be a submodule.

    Modules of flax, linen or nnx, need no such declaration.

    Args:
        name: what the submodule is called, as a rule the path of its parameters in the
            tree of the model, such as "block_3/attention".
        fn: `fn(params, *args, **kwargs)`.

    Returns:
        A function that does what `fn` does.

    Example:
        >>> def model(params, x):
        ...     up = submodule("up", lambda p, x: jax.numpy.tanh(x @ p["kernel"]))
        ...     return up(params["up"], x) @ params["head"]
    """

    def call(params: Params, *args: Any, **kwargs: Any) -> Any:
        if not _listening.get():
            return fn(params, *args, **kwargs)
        return _mark(lambda own: (fn(own, *args, **kwargs), ()), params, name)[0]

    return call


class Mark(NamedTuple):
    """What the name of a marked call says.

    Attributes:
        name: the submodule's name, or None where its parameters tell it.
        depths: for each of its parameters, which are the last operands, how many keys
            lead to it within the submodule.
        outputs: how many of the results are the submodule's; the others are its state.
    """

    name: str | None
    depths: Sequence[int]
    outputs: int


_PREFIX = "jaxmerge submodule "


def _mark(
    run: Callable[[Params], tuple[Any, Any]], params: Params, name: str | None = None
) -> tuple[Any, Any]:
    """`run(params)`, outputs and state, as a marked call."""
    leaves = named_leaves(params)
    # Modules of equinox have functions among their leaves.
    arrays = {
        path: leaf
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.Array | np.ndarray)
    }

    def of_arrays(*values: Array) -> tuple[Any, Any]:
        own = leaves | dict(zip(arrays, values, strict=True))
        return run(rebuild(params, own))

    closed, results = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays.values())
    depths = [len(keys(path)) for path in arrays]
    mark = Mark(name, depths, len(jax.tree.leaves(results[0])))

    def call(*values: Array) -> list[Array]:
        return core.jaxpr_as_fun(closed)(*values)

    call.__name__ = _PREFIX + json.dumps(mark)
    flat = jax.jit(call)(*arrays.values())
    return jax.tree.unflatten(jax.tree.structure(results), flat)


def keys(path: str) -> list[str]:
    """The keys of a path, without that which unboxes the variable of a module."""
    return path.removesuffix("/value").split("/")


def mark_of(eqn: Equation) -> Mark | None:
    """What is marked with an equation, if it is a marked call."""
    name = str(eqn.params.get("name"))
    found = name.startswith(_PREFIX)
    return Mark(*json.loads(name.removeprefix(_PREFIX))) if found else None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Meanwhile, marks the calls of submodules that are traced."""
    token = _listening.set(True)
    # What was jitted and traced before is not run again, unless the context differs.
    context = set_xla_metadata(jaxmerge="listening")
    try:
        with context, linen.intercept_methods(_linen_interceptor()), _nnx_patched():
            yield
    finally:
        _listening.reset(token)


def _linen_interceptor() -> Callable[..., Any]:
    marking = False

    def intercept(next_fun, args, kwargs, context) -> Any:
        nonlocal marking
        module, method = context.module, context.method_name
        if not _is_entry(method) or module.scope is None:
            return next_fun(*args, **kwargs)
        if marking:  # This is the call that `run` makes of the module itself.
            marking = False
            return next_fun(*args, **kwargs)
        variables = module.variables
        if module.is_initializing() or not jax.tree.leaves(variables.get("params")):
            return next_fun(*args, **kwargs)
        unbound, _ = module.unbind()
        state = {name: c for name, c in variables.items() if name != "params"}
        rngs = {name: rng.as_jax_rng() for name, rng in module.scope.rngs.items()}
        mutable = module.scope.mutable

        def run(params: Params) -> tuple[Any, Any]:
            nonlocal marking
            marking = True
            bound = {**state, "params": params}
            result = unbound.apply(
                bound, *args, rngs=rngs, mutable=mutable, method=method, **kwargs
            )
            output, updates = (result, {}) if mutable is False else result
            _check_method(method, output)
            return output, updates

        try:
            output, updates = _mark(run, variables["params"])
        except Exception:
            # It does not stand alone, as it calls modules that belong to others, say;
            # what is wrong otherwise is so below.
            marking = False
            return next_fun(*args, **kwargs)
        for collection in updates.keys() - {"params"}:
            for name, value in updates[collection].items():
                module.put_variable(collection, name, value)
        return output

    return intercept


@contextlib.contextmanager
def _nnx_patched() -> Iterator[None]:
    """Has the modules of nnx, which know no interceptors, mark their calls."""
    originals = [
        (cls, name, method)
        for cls in _subclasses(nnx.Module)
        for name, method in vars(cls).items()
        if _is_entry(name) and (name == "__call__" or inspect.isfunction(method))
    ]
    for cls, name, method in originals:
        setattr(cls, name, _marking(name, method))
    try:
        yield
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method)


def _is_entry(method: str) -> bool:
    """Whether a method is one by which others use a module."""
    return method == "__call__" or not (method.startswith("_") or method == "setup")


def _check_method(method: str, output: Any) -> None:
    """Raises an error if a method tells about a module, and does not apply it."""
    leaves = jax.tree.leaves(output)
    if method != "__call__" and not all(isinstance(x, jax.Array) for x in leaves):
        raise TypeError("A method returns more than arrays.")


def _subclasses(cls: type) -> set[type]:
    direct = cls.__subclasses__()
    return set(direct).union(*(_subclasses(sub) for sub in direct))


def _marking(method: str, original: Any) -> Callable[..., Any]:
    def call(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        def plain(module: nnx.Module) -> Any:
            return original.__get__(module, type(module))(*args, **kwargs)

        graph, params, state = nnx.split(module, nnx.Param, ...)
        if not jax.tree.leaves(params):
            return plain(module)

        before = {id(array) for array in jax.tree.leaves(state)}

        def changed(_, variable: nnx.Variable) -> bool:
            return id(variable.get_raw_value()) not in before

        def run(params: Params) -> tuple[Any, Any]:
            copy = nnx.merge(graph, params, state, copy=True)
            output = plain(copy)
            _check_method(method, output)
            if method != "__call__" and nnx.graphdef(copy) != graph:
                raise TypeError("A method changes more than the values of a module.")
            return output, nnx.state(copy, nnx.All(nnx.Not(nnx.Param), changed))

        try:
            output, updates = _mark(run, params)
        except Exception:  # As above.
            return plain(module)
        nnx.update(module, updates)
        return output

    return call
