"""A small network in every style that JAX models are written in, on the same tree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxmerge import submodule

WIDTH, HIDDEN, CLASSES, BLOCKS, TASKS = 4, 6, 3, 2, 3


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(seed, base=None, size=0.3):
    """Parameters of residual MLPs and a head: random ones, or `base` and a change."""

    def dense(inputs, outputs, seed):
        return {
            "kernel": random(inputs, outputs, seed=seed) / np.sqrt(inputs),
            "bias": 0.1 * random(outputs, seed=seed + 1),
        }

    params = {
        f"block_{i}": {
            "up": dense(WIDTH, HIDDEN, seed + 10 * i),
            "down": dense(HIDDEN, WIDTH, seed + 10 * i + 2),
        }
        for i in range(BLOCKS)
    }
    params["head"] = dense(WIDTH, CLASSES, seed + 100)
    if base is None:
        return params
    return jax.tree.map(lambda b, change: b + np.float32(size) * change, base, params)


BASE = network(1)
MODELS = [network(1000 * (t + 1), BASE) for t in range(TASKS)]
SAMPLES = [(1 + t) * random(5, WIDTH, seed=t + 50) for t in range(TASKS)]


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def block(params, x):
    return x + dense(params["down"], jnp.tanh(dense(params["up"], x)))


def plain(params, x):
    for i in range(BLOCKS):
        x = submodule(f"block_{i}", block)(params[f"block_{i}"], x)
    return submodule("head", dense)(params["head"], x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(HIDDEN, name="up")(x))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class Network(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        for i in range(BLOCKS):
            x = self.block(name=f"block_{i}")(x)
        return nn.Dense(CLASSES, name="head")(x)


def linen(params, x):
    return Network().apply({"params": params}, x)


def linen_remat(params, x):
    return Network(nn.remat(Block)).apply({"params": params}, x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.block_0 = NnxBlock(rngs)
        self.block_1 = NnxBlock(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block_1(self.block_0(x)))


GRAPH, STATE = nnx.split(nnx.eval_shape(lambda: NnxNetwork(nnx.Rngs(0))))


def of_nnx(params, x):
    return nnx.merge(GRAPH, params)(x)


def vmapped(params, x):
    return jax.vmap(lambda row: plain(params, row[None])[0])(x)


jitted = jax.jit(linen)


def solve(changes):
    """The coefficients in float64 from changes of outputs, [task][model]."""
    count = len(changes)
    flat = [[np.ravel(np.float64(c)) for c in of_task] for of_task in changes]
    a = np.zeros((count, count))
    b = np.zeros(count)
    for t, k in itertools.product(range(count), range(count)):
        b[k] += flat[t][k] @ flat[t][t]
        for m in range(count):
            a[k, m] += flat[t][k] @ flat[t][m]
    return np.linalg.solve(a, b)


def stacked(params):
    blocks = [params[f"block_{i}"] for i in range(BLOCKS)]
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {"blocks": layers, "head": params["head"]}


def plain_scan(params, x):
    def step(x, layer):
        return submodule("blocks", block)(layer, x), None

    return dense(params["head"], jax.lax.scan(step, x, params["blocks"])[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(HIDDEN, name="up")(x))
        return x + nn.Dense(WIDTH, name="down")(hidden), None


class ScanNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=BLOCKS,
        )
        return nn.Dense(CLASSES, name="head")(layers(name="blocks")(x)[0])


def linen_scan(params, x):
    return ScanNetwork().apply({"params": params}, x)


def nnx_scan(params, x):
    blocks = nnx.split(nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))))[0]

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    x = run(nnx.merge(blocks, params["blocks"]), x)
    return dense(params["head"], x)


def linear(params, x):
    return submodule("linear", lambda p, x: x @ p["kernel"])(params["linear"], x)


def kernels(*seeds):
    return [{"linear": {"kernel": random(6, 5, seed=seed)}} for seed in seeds]
