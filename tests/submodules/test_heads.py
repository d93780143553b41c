import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from networks import random, solve

from jaxmerge import submodule, submodule_merge
from jaxmerge.tree import named_leaves

HEADS = {
    r".*(query|key|value)/kernel": 1,
    r".*(query|key|value)/bias": 0,
    r".*out/kernel": 0,
}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)


def attention(params, x):
    return Attention().apply({"params": params}, x)


@pytest.fixture(scope="module")
def attentions():
    x = jnp.zeros((1, 3, 8))
    variables = [Attention().init(jax.random.key(seed), x) for seed in range(3)]
    base, *models = (
        jax.tree.map(lambda leaf: leaf + 0.1, v["params"]) for v in variables
    )
    samples = [random(2, 3, 8, seed=seed) for seed in range(2)]
    return base, models, samples


def head_slice(path, head):
    kind = "out/kernel" if path.endswith("out/kernel") else path.rpartition("/")[2]
    return {"out/kernel": (head,), "kernel": (slice(None), head), "bias": (head,)}[kind]


def test_heads_equal_a_loop_over_heads(attentions):
    base, models, samples = attentions
    layer = nn.MultiHeadDotProductAttention(num_heads=4)

    def outputs(leaves, x):
        params = flax.traverse_util.unflatten_dict(leaves, sep="/")["attention"]
        return layer.apply({"params": params}, x)

    start, *ends = (named_leaves(params) for params in (base, *models))
    want = []
    for head in range(4):
        changes = []
        for x in samples:
            of_task = []
            for end in ends:
                mixed = dict(start)
                for path in start.keys() - {"attention/out/bias"}:
                    own = head_slice(path, head)
                    mixed[path] = start[path].at[own].set(end[path][own])
                of_task.append(outputs(mixed, x) - outputs(start, x))
            changes.append(of_task)
        want.append(solve(changes))
    merged, found = submodule_merge(
        attention,
        base,
        models,
        samples,
        submodules="attention",
        heads=HEADS,
        info=True,
    )
    np.testing.assert_allclose(found["attention"], want, rtol=5e-3)
    alpha = found["attention"]
    for path, leaf in named_leaves(merged).items():
        taus = [end[path] - start[path] for end in ends]
        if path == "attention/out/bias":
            result = start[path] + sum(
                c * tau for c, tau in zip(alpha.mean(axis=0), taus, strict=True)
            )
        else:
            result = start[path]
            for head in range(4):
                own = head_slice(path, head)
                change = sum(
                    c * tau[own] for c, tau in zip(alpha[head], taus, strict=True)
                )
                result = result.at[own].add(change)
        np.testing.assert_allclose(leaf, result, atol=1e-5)


def test_heads_may_lie_side_by_side_and_share_keys():
    def grouped(params, x):
        """Four queries, two keys, with the heads of queries flattened."""

        def layer(p, x):
            queries = (x @ p["query"]).reshape(*x.shape[:-1], 4, 2)
            keys = jnp.repeat(jnp.einsum("bti,ihd->bthd", x, p["key"]), 2, axis=2)
            weights = jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", queries, keys))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, keys)
            return mixed.reshape(*x.shape[:-1], 8) @ p["out"]

        return submodule("layer", layer)(params["layer"], x)

    def params(seed):
        leaves = {"query": (8, 8), "key": (8, 2, 2), "out": (8, 8)}
        return {"layer": {n: 0.3 * random(*s, seed=seed) for n, s in leaves.items()}}

    base, *models = map(params, range(3))
    samples = [random(2, 3, 8, seed=seed) for seed in range(2)]
    run = functools.partial(
        submodule_merge, grouped, base, models, samples, submodules="layer", info=True
    )
    rules = {".*query": (1, 2), ".*key": 1, ".*out": (0, 2)}
    merged, found = run(heads=rules)
    assert found["layer"].shape == (2, 2)
    start, *ends = (p["layer"]["query"] for p in (base, *models))
    for group in range(2):
        own = slice(4 * group, 4 * group + 4)
        change = sum(
            c * (end - start)[:, own]
            for c, end in zip(found["layer"][group], ends, strict=True)
        )
        got = merged["layer"]["query"][:, own]
        np.testing.assert_allclose(got, start[:, own] + change, atol=1e-5)
    with pytest.raises(ValueError, match=r"submodule 'layer' have \[2, 4\] heads"):
        run(heads={**rules, ".*query": (1, 4)})
    with pytest.raises(ValueError, match="heads is 3 for leaf 'layer/query' of shape"):
        run(heads={".*query": 3})
    with pytest.raises(ValueError, match="no rule of heads matches a leaf"):
        run(heads={"query": 0})


def test_heads_of_layers_of_a_scan(attentions):
    base, models, samples = attentions

    def scanned(params, x):
        def step(x, layer):
            return attention(layer, x), None

        return jax.lax.scan(step, x, params)[0]

    base, *models = (
        jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), p) for p in (base, *models)
    )
    rules = {pattern: axis + 1 for pattern, axis in HEADS.items()}
    run = functools.partial(submodule_merge, submodules="attention", info=True)
    merged, found = run(scanned, base, models, samples, heads=rules)
    assert found["attention"].shape == (2, 4, 2)
    first = [jax.tree.map(lambda leaf: leaf[0], p) for p in (base, *models)]
    alone, want = run(attention, first[0], first[1:], samples, heads=HEADS)
    np.testing.assert_allclose(found["attention"][0], want["attention"], rtol=1e-3)
    for got, expect in zip(
        jax.tree.leaves(merged), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(got[0], expect, atol=1e-4)
