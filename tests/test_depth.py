"""Scaling by depth, after a merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.depth import block_depths


def transformer(seed, layers=4):
    draw = np.random.default_rng(seed).standard_normal
    block = lambda: {  # noqa: E731
        "attn": {"kernel": draw((4, 4))},
        "mlp": {"fc1": draw((4, 6)), "fc2": draw((6, 4))},
    }
    tree = {
        "embed": draw((8, 4)),
        "blocks": {str(i): block() for i in range(layers)},
        "norm": draw(4),
    }
    return jax.tree.map(np.float32, tree)


def added(base, merged):
    return jax.tree.map(lambda b, m: np.asarray(m - b), base, merged)


def stacked(tree):
    blocks = jax.tree.map(lambda *xs: np.stack(xs), *tree["blocks"].values())
    return tree | {"blocks": blocks}


def assert_close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=3e-6), got, want)


def test_scales_grow_from_alpha_by_beta():
    base, merged = transformer(0), transformer(1)
    alpha, beta = 0.25, 0.6
    got = added(base, jm.lines(base, merged, alpha=alpha, beta=beta))
    want = added(base, merged)
    for name in ("embed", "norm"):
        np.testing.assert_allclose(got[name], alpha * want[name], atol=1e-6)
    for i in range(4):
        scale = alpha + beta * i / 3
        block = jax.tree.map(lambda x: scale * x, want["blocks"][str(i)])  # noqa: B023
        assert_close(got["blocks"][str(i)], block)


def test_nothing_changes_at_full_strength_and_all_leaves_are_alike_without_slope():
    base, merged = transformer(0), transformer(1)
    same = jm.lines(base, merged, alpha=1.0, beta=0.0)
    jax.tree.map(np.testing.assert_array_equal, same, merged)
    half = jm.lines(base, merged, alpha=0.5, beta=0.0)
    assert_close(half, jax.tree.map(lambda b, m: (b + m) / 2, base, merged))


def test_scanned_layers_are_blocks():
    base, merged = transformer(0), transformer(1)
    options = {"alpha": 0.2, "beta": 0.8}
    want = stacked(jm.lines(base, merged, **options))
    axes = {"blocks/.*": 1, ".*": 0}
    got = jm.lines(stacked(base), stacked(merged), stack_axes=axes, **options)
    assert_close(got, want)
    # One block has no depth.
    one = {"blocks": jnp.zeros((1, 3))}, {"blocks": jnp.ones((1, 3))}
    got = jm.lines(*one, stack_axes=1, **options)["blocks"]
    np.testing.assert_allclose(got, 0.2)


def test_rules_say_where_leaves_are():
    base, merged = {"a1": jnp.zeros(1), "b": jnp.zeros(1)}, {"a1": jnp.ones(1)}
    merged["b"] = jnp.ones(1)
    depth = {"a.": 0.5, ".*": 1.0}
    got = jm.lines(base, merged, alpha=0.0, beta=1.0, depth=depth)
    assert [x.item() for x in got.values()] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["h.0.w", "h.2.w", "h.1.w", "h.10.w"], [0, 2 / 3, 1 / 3, 1]),
        (["layer_1/w", "layer_2/w", "head"], [0, 1, None]),
        (["layer1/0/w", "layer1/1/w", "layer2/0/w", "conv1"], [0, 0, 1, None]),
        # The number of a model, or of parts of a block, is no depth.
        (["vit_b32/h/0/w", "vit_b32/h/1/fc1", "vit_b32/h/1/fc2"], [0, 1, 1]),
        # Towers of different heights.
        (["enc.0", "enc.1", "enc.2", "dec.0", "dec.1"], [0, 0.5, 1, 0, 1]),
        (["a/w", "b/w"], [None, None]),
    ],
)
def test_blocks_are_found_by_their_numbers(paths, want):
    assert [block_depths(paths).get(path) for path in paths] == want


def test_the_balanced_alpha_is_that_of_the_paper():
    base = transformer(0)
    models = [transformer(i) for i in (1, 2, 3)]
    summed = jm.task_arithmetic(base, models)
    want = jm.lines(base, summed, alpha=1 / 3, beta=0.5)
    assert_close(jm.lines(base, summed, models=models, beta=0.5), want)

    trimmed = jm.ties(base, models)
    total, kept = (
        sum(np.abs(x).sum() for x in jax.tree.leaves(added(base, m)))
        for m in (summed, trimmed)
    )
    assert total > kept
    want = jm.lines(base, trimmed, alpha=total / kept / 3, beta=0.5)
    assert_close(jm.lines(base, trimmed, models=models, beta=0.5), want)
    assert_close(jm.lines(base, base, models=[base], beta=0.5), base)


def test_under_jit_and_swept():
    base, merged = transformer(0), transformer(1)
    call = jax.jit(lambda b, m, beta: jm.lines(b, m, alpha=0.5, beta=beta))
    assert_close(call(base, merged, 0.3), jm.lines(base, merged, alpha=0.5, beta=0.3))
    betas = jnp.array([0.1, 0.5])
    swept = jax.vmap(lambda b: jm.lines(base, merged, alpha=0.5, beta=b))(betas)
    one = jm.lines(base, merged, alpha=0.5, beta=0.5)
    assert_close(jax.tree.map(lambda x: x[1], swept), one)


def test_dtypes_shardings_and_other_leaves_are_kept(mesh):
    base, merged = ({"w_0": jnp.zeros((4, 8)), "w_1": jnp.ones((4, 8))},) * 2
    merged = {k: jnp.full_like(x, 2, jnp.bfloat16) for k, x in merged.items()}
    merged = jm.place(merged, mesh, {".*": P("data", "model")})
    base["steps"], merged["steps"] = jnp.array(1), jnp.array(5)
    got = jm.lines(base, merged, alpha=0.5, beta=0.5)
    assert got["steps"] == 5
    assert got["w_0"].dtype == jnp.bfloat16
    assert got["w_0"].sharding.is_equivalent_to(merged["w_0"].sharding, 2)
    assert (np.asarray(got["w_0"], np.float32) == 1).all()
    assert (np.asarray(got["w_1"], np.float32) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "lines: give alpha, or the models that were merged"),
        ({"beta": 0.5, "alpha": 0.5, "models": []}, "models has no effect"),
        ({"beta": float("nan"), "alpha": 0.5}, "beta is nan"),
        ({"beta": 0.5, "alpha": [1.0]}, "alpha is .* one number"),
        ({"beta": 0.5, "alpha": 0.5, "depth": 2.0}, r"must be in \[0, 1\]"),
        ({"beta": 0.5, "models": []}, "lines: needs at least one model"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jm.lines(transformer(0), transformer(1), **options)


def test_trees_without_blocks_are_refused():
    tree = {"w": jnp.ones(2), "head1": jnp.ones(2)}
    with pytest.raises(ValueError, match="lines: no blocks found"):
        jm.lines(tree, tree, alpha=0.5, beta=0.5)
    with pytest.raises(ValueError, match=r"lines: .*only base has leaf 'w'"):
        jm.lines(tree, {"head1": jnp.ones(2)}, alpha=0.5, beta=0.5)
