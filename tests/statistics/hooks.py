"""What statistics should be, from models that are hooked or written out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape, scale=0.4):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return jnp.asarray(values, jnp.float32)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(high, size=shape))


def init(model, *args, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), *args)


def gram(x, features=1):
    """The second moments of `x` over all but its last axes, in float64."""
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, int(np.prod(x.shape[x.ndim - features :])))
    return x.T @ x


def close(found, expected, rtol=1e-5):
    """Whether two arrays agree, in norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


def linen_inputs(model, params, *args, kinds=(nn.Dense, nn.DenseGeneral)):
    """The input of every dense layer of a linen model, by path."""

    @jax.jit
    def run(params, *args):
        inputs = {}

        def intercept(call, args, kwargs, context):
            if isinstance(context.module, kinds) and context.method_name == "__call__":
                inputs["/".join(context.module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply(params, *args)
        return inputs

    return run(params, *args)


def linen_output_gradients(model, params, loss, *args, kinds=(nn.Dense,)):
    """The gradient of a loss by the output of every dense layer of a linen model."""

    def run(shifts, shapes):
        def intercept(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if isinstance(context.module, kinds) and context.method_name == "__call__":
                path = "/".join(context.module.path)
                shapes[path] = result.shape
                return result + shifts[path] if shifts else result
            return result

        with nn.intercept_methods(intercept):
            return loss(model.apply(params, *args))

    shapes = {}
    jax.eval_shape(lambda: run({}, shapes))
    shifts = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    return jax.jit(jax.grad(lambda shifts: run(shifts, {})))(shifts)
