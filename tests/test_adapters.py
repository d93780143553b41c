"""Models stored as adapters, and adapters merged in the space of their factors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge import LowRank, adapters, apply_adapter, core_space, tsv_compress
from jaxmerge.matrices import MatrixAxes, leaf_axes


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def low_rank(outputs, inputs, rank, stack=(), seed=0):
    return LowRank(
        draw(*stack, outputs, rank, seed=seed), draw(*stack, rank, inputs, seed=seed)
    )


def product(update):
    return np.float64(update.left) @ np.float64(update.right)


def assert_close(got, want, rtol=1e-5):
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        scale = max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(got[path], leaf, atol=rtol * scale, err_msg=path)


BASE = {
    "q/query/kernel": draw(6, 2, 4),
    "mlp.weight": draw(5, 7),
    "layers/kernel": draw(2, 6, 4),
    "embed/embedding": draw(9, 4),
    "norm/scale": draw(6),
    "head/bias": draw(3),
}
STACKED = {"layers/.*": 1, ".*": 0}


def adapters_of_many_ranks():
    """Other leaves and ranks in each; in some leaves the sum of ranks exceeds sides."""
    return [
        {
            "q/query/kernel": low_rank(8, 6, rank=2, seed=1),
            "mlp.weight": low_rank(5, 7, rank=3, seed=1),
            "layers/kernel": low_rank(4, 6, rank=1, stack=(2,), seed=1),
            "norm/scale": draw(6, seed=1),
        },
        {
            "q/query/kernel": low_rank(8, 6, rank=1, seed=2),
            "mlp.weight": low_rank(5, 7, rank=4, seed=2),
            "layers/kernel": low_rank(4, 6, rank=2, stack=(2,), seed=2),
            "embed/embedding": low_rank(4, 9, rank=2, seed=2),
        },
        {
            "q/query/kernel": low_rank(8, 6, rank=1, seed=3),
            "norm/scale": draw(6, seed=3),
        },
    ]


def dense_models(adapters, base=BASE, **options):
    return [apply_adapter(base, adapter, **options) for adapter in adapters]


@pytest.mark.parametrize("others", ["average", "task_arithmetic", "base"])
def test_a_sum_of_cores_is_the_sum_of_whole_updates(others):
    adapters = adapters_of_many_ranks()
    got = core_space(
        BASE,
        adapters,
        merge=jm.task_arithmetic,
        scale={"mlp.*": 0.5, ".*": 2.0},
        others=others,
        stack_axes=STACKED,
    )
    models = dense_models(adapters, stack_axes=STACKED)
    share = {"average": 1 / 3, "task_arithmetic": 1.0, "base": 0.0}[others]
    scale = {"norm/scale": 2 * share, "mlp.weight": 0.5, ".*": 2.0}
    assert_close(got, jm.task_arithmetic(BASE, models, scale=scale))
    np.testing.assert_array_equal(got["head/bias"], BASE["head/bias"])


def test_methods_that_know_no_bases_give_the_same_as_on_whole_models():
    base = {
        "q/query/kernel": draw(24, 4, 8),
        "mlp.weight": draw(40, 30),
        "layers/kernel": draw(2, 30, 20),
        "bias": draw(4),
    }
    adapters = [
        {
            "q/query/kernel": low_rank(32, 24, rank=3, seed=t),
            "mlp.weight": low_rank(40, 30, rank=3, seed=t),
            "layers/kernel": low_rank(20, 30, rank=3, stack=(2,), seed=t),
            "bias": draw(4, seed=t),
        }
        for t in (1, 2, 3)
    ]
    options = {"stack_axes": STACKED}
    models = dense_models(adapters, base, **options)
    merge = functools.partial(jm.tsv_merge, rank=3)
    got = core_space(base, adapters, merge=merge, **options)
    assert_close(got, merge(base, models, **options), rtol=1e-4)


def test_methods_that_rank_entries_rank_those_of_all_cores_together():
    adapters = [
        {
            f"{name}.weight": low_rank(5, 7, 2, seed=10 * t + i)
            for i, name in enumerate("ab")
        }
        for t in (1, 2)
    ]
    adapters = [
        a | {"b.weight": a["b.weight"]._replace(left=20 * a["b.weight"].left)}
        for a in adapters
    ]
    base = {"a.weight": draw(5, 7), "b.weight": draw(5, 7)}
    merge = functools.partial(jm.ties, density=0.1, scope="model")
    got = core_space(base, adapters, merge=merge)
    np.testing.assert_array_equal(got["a.weight"], base["a.weight"])
    assert np.abs(got["b.weight"] - base["b.weight"]).max() > 1


def test_cores_in_singular_bases_do_not_depend_on_the_order_of_adapters():
    adapters = adapters_of_many_ranks()
    merge = functools.partial(jm.ties, density=0.5)
    options = {"merge": merge, "stack_axes": STACKED}
    got = core_space(BASE, adapters[::-1], **options)
    assert_close(got, core_space(BASE, adapters, **options), rtol=1e-4)


def test_one_adapter_and_equal_adapters_come_back():
    adapter = adapters_of_many_ranks()[0]
    want = apply_adapter(BASE, adapter, stack_axes=STACKED)
    for count in (1, 3):
        merge = functools.partial(jm.ties, density=1.0)
        got = core_space(BASE, [adapter] * count, merge=merge, stack_axes=STACKED)
        assert_close(got, want)


@pytest.mark.parametrize("kind", ["zero", "rank 0"])
def test_updates_of_nothing_change_nothing(kind):
    rank = 0 if kind == "rank 0" else 2
    nothing = LowRank(np.zeros((5, rank), np.float32), draw(rank, 7))
    adapters = [{"mlp.weight": nothing}] * 2
    for merge in (jm.ties, jm.tsv_merge, jm.iso_c):
        got = core_space(BASE, adapters, merge=merge)
        np.testing.assert_array_equal(got["mlp.weight"], BASE["mlp.weight"])


def test_layouts_of_flax_and_of_pytorch_give_the_same():
    adapters = [{"up": low_rank(4, 6, 2, seed=t)} for t in (1, 2)]
    kernel, merge = draw(6, 4), functools.partial(jm.ties, density=0.5)
    merged = []
    for path, leaf in {"up/kernel": kernel, "up.weight": kernel.T}.items():
        named = [{path: adapter["up"]} for adapter in adapters]
        merged.append(core_space({path: leaf}, named, merge=merge)[path])
    np.testing.assert_allclose(merged[0], merged[1].T, atol=1e-5)


def test_jit_and_traced_scale():
    adapters = adapters_of_many_ranks()

    def merge(base, adapters, scale):
        return core_space(
            base, adapters, merge=jm.tsv_merge, scale=scale, stack_axes=STACKED
        )

    assert_close(
        jax.jit(merge)(BASE, adapters, 0.5), merge(BASE, adapters, 0.5), rtol=1e-4
    )


def test_a_bfloat16_base_comes_back_in_bfloat16():
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), BASE)
    base["steps"] = jnp.array(3)
    adapters = adapters_of_many_ranks()
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters)
    options = {"merge": jm.task_arithmetic, "stack_axes": STACKED}
    got = core_space(base, adapters, **options)
    assert all(got[path].dtype == leaf.dtype for path, leaf in base.items())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    want = core_space(wide, adapters, **options)
    for path in BASE:
        np.testing.assert_array_equal(got[path], want[path].astype(jnp.bfloat16))


SPECS = {
    "q/query/kernel": P("model"),
    "layers/kernel": P(None, "model", "data"),
    "embed/.*": P(None, "data"),
    "norm/scale": P("model"),
    ".*": P(),
}


@pytest.mark.parametrize("merge", [jm.magmax, jm.tsv_merge])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_a_base_on_a_mesh_keeps_its_shardings(mesh, as_array, merge):
    adapters = adapters_of_many_ranks()
    options = {"merge": merge, "stack_axes": STACKED}
    want = core_space(BASE, adapters, **options)
    placed = jm.place(BASE, mesh, SPECS)
    got = core_space(placed, jax.tree.map(as_array, adapters), **options)
    assert_close(jax.device_get(got), want, rtol=1e-4)
    for path, leaf in placed.items():
        assert got[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize(
    "path",
    [
        "mlp.weight",
        "block/query/kernel",
        "decoder.embed_tokens.weight",
        "wte.weight",
        "h.0.attn.c_attn.weight",
        "patch_embed.conv.weight",
        "embed/pos_embedding",
        "position_embeddings",
        "cls_token",
        "attn.in_proj_weight",
        "layer/lora/kernel/value",
        "bias",
        "odd name [0]/x",
        "",
    ],
)
@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_cores_are_known_as_matrices_whatever_their_leaf_is_called(path, stack):
    seen = {}

    def merge(base, models):
        for name, core in base.items():
            assert name.startswith(path)
            seen[name] = leaf_axes(name, core.shape)
        return jm.tsv_merge(base, models)

    base = {path: draw(*stack, 4, 3)}
    adapters = [{path: low_rank(4, 3, 1, stack, seed=t)} for t in (1, 2)]
    core_space(
        base, adapters, merge=merge, matrices={".*": "oi"}, stack_axes=len(stack)
    )
    assert len(seen) == np.prod(stack)
    assert set(seen.values()) == {MatrixAxes(stack=(), inputs=(1,), outputs=(0,))}


W = low_rank(5, 7, 2)


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        ([], {}, "needs a list of at least one adapter"),
        ({"mlp.weight": W}, {}, "needs a list of at least one adapter"),
        ([{"mlp.weight": W}, "runs/a"], {}, r"adapters\[1\]: adapter is a str"),
        ([{"mlp.wieght": W}], {}, r"adapters\[0\]: .*Did you mean 'mlp.weight'\?"),
        ([{"mlp.weight": low_rank(7, 5, 2)}], {}, r"factors \(7, 2\) and \(2, 5\)"),
        ([{"norm/scale": draw(5)}], {}, r"has shape \(6,\) in base"),
        (
            [{"mlp.weight": W}, {"mlp.weight": draw(5, 7)}],
            {},
            r"'mlp.weight' is a LowRank in some.*array in others, .*adapters\[1\]",
        ),
        ([{"mlp.weight": W}], {"scale": "big"}, "scale of leaf 'mlp.weight' is 'big'"),
        ([{"mlp.weight": W}], {"others": "mean"}, "others is 'mean'"),
    ],
)
def test_errors_come_before_any_merging(adapters, options, message):
    def never(base, models):
        raise AssertionError

    with pytest.raises(ValueError, match=message) as caught:
        core_space(BASE, adapters, merge=never, **options)
    assert str(caught.value).startswith("core_space: ")


def test_a_merge_that_returns_something_else_is_refused():
    with pytest.raises(ValueError, match=r"core_space: merge: .*'mlp.weight.core"):
        core_space(BASE, [{"mlp.weight": W}], merge=lambda base, models: {})


SMALL = {"a/kernel": (12, 8), "b.weight": (6, 9), "norm/scale": (4,), "same": (3,)}


def random_models(count, shapes=SMALL):
    base = {path: draw(*shape) for path, shape in shapes.items()}
    moved = [
        {path: leaf + draw(*leaf.shape, seed=t + 1) for path, leaf in base.items()}
        for t in range(count)
    ]
    return base, [model | {"same": base["same"]} for model in moved]


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_compression_keeps_the_nearest_matrix_of_its_rank(rank):
    base, models = random_models(3)
    adapters = tsv_compress(base, models, rank=rank)
    for model, adapter in zip(models, adapters, strict=True):
        rebuilt = apply_adapter(base, adapter)
        for path, full in {"a/kernel": 8, "b.weight": 6}.items():
            kept = rank or full // 3
            spectrum = np.linalg.svd(model[path] - base[path], compute_uv=False)
            lost = np.linalg.norm(model[path] - rebuilt[path])
            assert lost == pytest.approx(np.linalg.norm(spectrum[kept:]), rel=1e-4)
        np.testing.assert_allclose(
            rebuilt["norm/scale"], model["norm/scale"], rtol=1e-6
        )
        assert rebuilt["same"] is base["same"]


def test_a_single_model_or_the_full_rank_comes_back():
    base, models = random_models(3)
    for chosen, rank in ((models[:1], None), (models, 99)):
        adapters = tsv_compress(base, chosen, rank=rank)
        for model, adapter in zip(chosen, adapters, strict=True):
            assert_close(apply_adapter(base, adapter), model)


def test_all_compressed_models_are_about_as_large_as_two():
    shapes = {"w.weight": (64, 64), "same": (3,)}
    for count in (2, 4, 8):
        base, models = random_models(count, shapes)
        adapters = tsv_compress(base, models)
        assert [list(adapter) for adapter in adapters] == [["w.weight"]] * count
        stored = sum(leaf.size for leaf in jax.tree.leaves(adapters))
        assert stored == 2 * base["w.weight"].size


def test_more_models_than_rank_keep_one_triplet_each():
    base, models = random_models(5, {"w.weight": (3, 4), "same": (3,)})
    for adapter in tsv_compress(base, models):
        assert adapter["w.weight"].left.shape == (3, 1)


def test_compressed_layers_of_a_stack_equal_a_loop():
    base, models = random_models(2, {"layers/kernel": (3, 6, 4), "same": (3,)})
    adapters = tsv_compress(base, models, stack_axes=STACKED)
    for model, adapter in zip(models, adapters, strict=True):
        got = apply_adapter(base, adapter, stack_axes=STACKED)["layers/kernel"]
        for i in range(3):
            layers = [{"kernel": m["layers/kernel"][i]} for m in (base, model)]
            (alone,) = tsv_compress(layers[0], layers[1:], rank=2)
            want = apply_adapter(layers[0], alone)["kernel"]
            np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_compression_under_jit_keeps_leaves_that_are_equal():
    base, models = random_models(2)
    adapters = jax.jit(tsv_compress)(base, models)
    for adapter, eager in zip(adapters, tsv_compress(base, models), strict=True):
        assert not adapter.pop("same").any()
        assert adapter.keys() == eager.keys()
        assert_close(apply_adapter(base, adapter), apply_adapter(base, eager))


def test_compression_on_a_mesh(mesh):
    shapes = {f"{i}/kernel": (16, 8) for i in range(3)}
    base, models = random_models(2, shapes | {"norm/scale": (8,), "same": (4,)})
    want = [apply_adapter(base, a) for a in tsv_compress(base, models)]
    specs = {".*kernel": P("data", "model"), ".*": P("model")}
    placed, *others = [jm.place(tree, mesh, specs) for tree in (base, *models)]
    for adapter, model in zip(tsv_compress(placed, others), want, strict=True):
        assert_close(jax.device_get(apply_adapter(placed, adapter)), model)


def test_compressed_models_can_be_merged_in_core_space():
    base, models = random_models(3)
    adapters = tsv_compress(base, models, rank=2)
    merge = functools.partial(jm.tsv_merge, rank=2)
    got = core_space(base, adapters, merge=merge)
    want = jm.tsv_merge(base, models, rank=2)
    assert_close(got, want, rtol=1e-4)


def test_bad_options_of_compression_are_refused():
    base, models = random_models(1)
    with pytest.raises(ValueError, match="tsv_compress: rank is 0"):
        tsv_compress(base, models, rank=0)
    with pytest.raises(ValueError, match="tsv_compress: needs at least one model"):
        tsv_compress(base, [])


def test_nothing_of_the_size_of_the_leaf_is_formed_before_the_end():
    updates = [low_rank(37, 41, 2, seed=i) for i in range(3)]
    merge = functools.partial(adapters._merge_low, count=3, merge=jm.tsv_merge)
    text = str(jax.make_jaxpr(merge)({"kernel": updates}))
    assert "[37,6]" in text
    assert not re.search(r"\[(\d+,)*(37,41|41,37)\]", text)
