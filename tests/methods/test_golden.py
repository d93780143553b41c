"""The same numbers as mergekit, where both tools mean the same."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxmerge
from jaxmerge.registry import methods

GOLDEN = {
    name: array
    for file in sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
    for name, array in np.load(file).items()
}

# mergekit's conventions in TIES and its relatives.
SIGNS = {"tie": "positive", "divisor": "signed_weights"}
ELECT = {"elect": True, "aggregate": "sum"} | SIGNS


def by_substring(**values):
    """mergekit's filters are substrings; `default` is for all other leaves."""
    rules = {f".*{name}.*": v for name, v in values.items() if name != "default"}
    return rules | {".*": values["default"]}


def gradient(points, where=""):
    """mergekit's layer gradients, over the six layers of the deep models."""
    positions = np.linspace(0, len(points) - 1, 6)
    values = np.interp(positions, np.arange(len(points)), points)
    rules = {f".*layers.{i}.*{where}.*": v for i, v in enumerate(values)}
    return rules | {f".*{where}.*": points[0]}


THREE = ["ft1", "ft2", "ft3"]
SPARSE = ["ft_sparse1", "ft_sparse2", "ft_sparse3"]
HALF = {"density": 0.5, **SIGNS}
CASES = {
    "linear": ("average", THREE, {"weights": [0.5, 0.3, 0.2]}),
    "linear_unnormed_weights": ("average", THREE, {"weights": [1, 0.3, 0.5]}),
    "linear_normalize_false": (
        "average",
        THREE,
        {"weights": [1, 0.3, 0.5], "normalize": False},
    ),
    "linear_negative": ("average", ["ft1", "ft2"], {"weights": [1.5, -0.5]}),
    "linear_sum_zero_nonorm": (
        "average",
        ["ft1", "ft2"],
        {"weights": [1, -1], "normalize": False},
    ),
    "linear_identical": ("average", ["ft1", "ft1_copy"], {}),
    "linear_filters": (
        "average",
        ["ft1", "ft2"],
        {
            "weights": [
                by_substring(self_attn=0.9, mlp=0.2, default=0.5),
                by_substring(self_attn=0.1, mlp=0.8, default=0.5),
            ]
        },
    ),
    "linear_filter_first_match": (
        "average",
        ["ft1", "ft2"],
        {"weights": [by_substring(proj=0.25, q_proj=0.9, default=0.6), 0.5]},
    ),
    "linear_mixed_dtype": ("average", ["ft1", "ft2_bf16"], {}),
    "linear_f16": ("average", ["ft1_f16", "ft2_f16"], {}),
    "linear_bf16": ("average", ["ft1_bf16", "ft2_bf16"], {}),
    "linear_gradient": (
        "average",
        ["deep_ft1", "deep_ft2"],
        {"weights": [gradient([0, 1]), gradient([1, 0])]},
    ),
    "linear_gradient3": (
        "average",
        ["deep_ft1", "deep_ft2"],
        {"weights": [gradient([0.1, 0.9, 0.3]), gradient([1, 0.2, 0.6, 0.4])]},
    ),
    "ta_lambda": ("task_arithmetic", THREE, {"weights": [0.5, 0.3, 0.2], "scale": 0.4}),
    "ta_normalize": (
        "task_arithmetic",
        THREE,
        {"weights": [1, 0.5, 0.5], "normalize": True},
    ),
    "ta_negative": ("task_arithmetic", ["ft1", "ft2"], {"weights": [1, -0.5]}),
    "ta_zero_delta": ("task_arithmetic", ["ft_zero", "ft1"], {"weights": [0.7, 0.3]}),
    "ta_base_listed": ("task_arithmetic", ["ft1", "ft2"], {"weights": [0.6, 0.4]}),
    "ta_out_bf16": ("task_arithmetic", THREE, {"weights": [0.5, 0.3, 0.2]}),
    "ta_mixed_dtype": ("task_arithmetic", ["ft1_bf16", "ft2_bf16"], {"weights": 0.5}),
    "ta_gradient_filter": (
        "task_arithmetic",
        ["deep_ft1", "deep_ft2"],
        {
            "weights": [
                gradient([0, 1], "self_attn")
                | gradient([1, 0.5, 0], "mlp")
                | {".*": 0.25},
                0.3,
            ]
        },
    ),
    "task_arithmetic_bf16_f32": (
        "task_arithmetic",
        ["ft1_bf16", "ft2_bf16"],
        {"weights": 0.4},
    ),
    "ties_d05": ("ties", THREE, HALF),
    "ties_d02": ("ties", THREE, {"density": 0.2, **SIGNS}),
    "ties_d1": ("ties", THREE, {"density": 1.0, **SIGNS}),
    "ties_d08_w": (
        "ties",
        THREE,
        {"density": [0.8, 0.5, 0.3], "weights": [0.7, 0.3, 1.2], **SIGNS},
    ),
    "ties_normalize_false": (
        "ties",
        THREE,
        {**HALF, "weights": 0.5, "aggregate": "sum"},
    ),
    "ties_lambda": ("ties", THREE, {**HALF, "scale": 0.3}),
    "ties_rescale": ("ties", THREE, {**HALF, "rescale": "l1"}),
    "ties_negative_weight": ("ties", THREE, {**HALF, "weights": [1, -0.5, 1]}),
    "ties_zero_delta": ("ties", ["ft_zero", "ft1"], HALF),
    "ties_identical": ("ties", ["ft1", "ft1_copy"], HALF),
    "ties_exact_ties_d1": ("ties", ["ft_q1", "ft_q2"], {"density": 1.0, **SIGNS}),
    "ties_bf16_f32": (
        "ties",
        ["ft1_bf16", "ft2_bf16"],
        {"density": 1.0, "weights": 0.4, **SIGNS},
    ),
    "ties_example_style": (
        "ties",
        ["deep_ft1", "deep_ft2"],
        {
            "density": [gradient([1, 0.7, 0.1]), 0.33],
            "weights": [1.0, by_substring(mlp=0.5, default=0.0)],
            **SIGNS,
        },
    ),
    "dare_linear_d1": ("dare", THREE, {"density": 1.0, "weights": [0.5, 0.3, 0.2]}),
    "dare_ties_d1": (
        "dare",
        THREE,
        {"density": 1.0, "weights": [0.5, 0.3, 0.2], **ELECT},
    ),
    "della_d1": ("della", THREE, {"density": 1.0, "weights": [0.5, 0.3, 0.2], **SIGNS}),
    "della_linear_d1": (
        "della",
        THREE,
        {"density": 1.0, "weights": [0.5, 0.3, 0.2], "elect": False},
    ),
    "breadcrumbs_d05_g01": (
        "breadcrumbs",
        THREE,
        {"density": 0.5, "gamma": 0.1, "weights": 0.4},
    ),
    "breadcrumbs_d1": (
        "breadcrumbs",
        THREE,
        {"density": 1.0, "gamma": 0.1, "weights": 0.4},
    ),
    "breadcrumbs_ties_d09_g02": (
        "breadcrumbs",
        THREE,
        {"density": 0.9, "gamma": 0.2, "weights": 0.4, **ELECT},
    ),
    "breadcrumbs_ties_d1": (
        "breadcrumbs",
        THREE,
        {"density": 1.0, "weights": 0.4, **ELECT},
    ),
    "slerp_t0": ("slerp", ["ft1", "ft2"], {"t": 0}),
    "slerp_t03": ("slerp", ["ft1", "ft2"], {"t": 0.3}),
    "slerp_t05": ("slerp", ["ft1", "ft2"], {"t": 0.5}),
    "slerp_t1": ("slerp", ["ft1", "ft2"], {"t": 1}),
    "slerp_far": ("slerp", ["ft1", "ft1_minus"], {"t": 0.3}),
    "slerp_identical": ("slerp", ["ft1", "ft1_copy"], {"t": 0.4}),
    "slerp_orthogonal": ("slerp", ["deep_base", "deep_ortho"], {"t": 0.35}),
    "slerp_bf16": ("slerp", ["ft1_bf16", "ft2_bf16"], {"t": 0.4}),
    "nuslerp_cols": (
        "nuslerp",
        ["ft1", "ft2"],
        {"weights": [0.4, 0.6], "scope": "row"},
    ),
    "nuslerp_rows": (
        "nuslerp",
        ["ft1", "ft2"],
        {
            "weights": [0.4, 0.6],
            "scope": "row",
            "matrices": {".*proj.*": "io", ".*embed.*": "oe"},
        },
    ),
    "nuslerp_sum_zero": ("nuslerp", ["ft1", "ft2"], {"weights": [1, -1]}),
    "nuslerp_orthogonal": (
        "nuslerp",
        ["deep_base", "deep_ortho"],
        {"weights": [0.65, 0.35]},
    ),
    "nuslerp_identical": ("nuslerp", ["ft1", "ft1_copy"], {}),
    "nuslerp_bf16_f32": ("nuslerp", ["ft1_bf16", "ft2_bf16"], {}),
    "multislerp": ("multislerp", THREE, {"weights": [0.5, 0.3, 0.2]}),
    "multislerp_unnormalized": (
        "multislerp",
        THREE,
        {"weights": [1, 0.5, 0.5], "normalize": False},
    ),
    "multislerp_both_zero_delta": (
        "multislerp",
        ["ft_zero", "ft_zero2"],
        {"origin": "base"},
    ),
    "multislerp_bf16": ("multislerp", ["ft1_bf16", "ft2_bf16"], {}),
    "multislerp_base": (
        "multislerp",
        THREE,
        {"weights": [0.5, 0.3, 0.2], "origin": "base"},
    ),
    "multislerp_base_unnormalized": (
        "multislerp",
        THREE,
        {"weights": [1, 0.5, 0.5], "normalize": False, "origin": "base"},
    ),
    "multislerp_zero_delta": ("multislerp", ["ft_zero", "ft1"], {"origin": "base"}),
    "karcher": ("karcher", THREE, {}),
    "karcher_tight": ("karcher", THREE, {"max_steps": 100, "tolerance": 1e-9}),
    "karcher_orthogonal": ("karcher", ["deep_base", "deep_ortho", "deep_ft1"], {}),
    "karcher_identical": ("karcher", ["ft1", "ft1_copy"], {}),
    "karcher_bf16": ("karcher", ["ft1_bf16", "ft2_bf16"], {}),
    "karcher_bf16_f32": ("karcher", ["ft1_bf16", "ft2_bf16"], {}),
    "model_stock": ("model_stock", THREE, {"clip": False}),
    "model_stock_2": ("model_stock", ["ft1", "ft2"], {"clip": False}),
    "model_stock_filter_wise": (
        "model_stock",
        THREE,
        {"clip": False, "scope": "row"},
    ),
    "model_stock_identical": ("model_stock", ["ft1", "ft1_copy"], {}),
    "model_stock_zero_delta": ("model_stock", ["ft_zero", "ft1"], {"clip": False}),
    "sce": ("sce", THREE, {"density": 1.0}),
    "sce_topk01": ("sce", THREE, {"mask_values": True}),
    "sce_int8": ("sce", THREE, {"density": 0.5, "mask_values": True}),
    "sce_zero_delta": (
        "sce",
        ["ft_zero", "ft1"],
        {"density": 0.5, "mask_values": True},
    ),
    "sce_bf16_f32": ("sce", ["ft1_bf16", "ft2_bf16"], {"density": 1.0}),
    "ram": ("ram", SPARSE, {}),
    "ram_eps": ("ram", SPARSE, {"epsilon": 0.005}),
    "ramplus_tl": ("ram", SPARSE, {"boost": 0.1}),
    "ramplus_tl_r": ("ram", SPARSE, {"boost": 0.5, "limit": 1.0}),
    "model_stock_bf16": ("model_stock", ["ft1_bf16", "ft2_bf16"], {"clip": False}),
}


def dtype_of(model):
    suffix = model.rpartition("_")[2]
    return {"bf16": jnp.bfloat16, "f16": jnp.float16}.get(suffix, jnp.float32)


def tree(model, dtype=None):
    prefix = f"inputs/{model}/"
    names = [name for name in GOLDEN if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): jnp.asarray(GOLDEN[name], dtype or dtype_of(model))
        for name in names
    }


def base_of(models):
    first = models[0]
    if first.startswith("deep"):
        return "deep_base"
    return {"ft_q1": "base_q", "ft1_bf16": "base_bf16"}.get(first, "base")


def call(method, base, models, **options):
    registered = methods()[method]
    if registered.needs_key:
        options = {"key": 0} | options
    inputs = (base, models) if registered.needs_base else (models,)
    return registered.function(*inputs, **options)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case):
    method, models, options = CASES[case]
    base = "base" if case == "ta_mixed_dtype" else base_of(models)
    if "origin" in options:
        options = options | {"origin": tree(options["origin"])}
    merged = call(method, tree(base), [tree(m) for m in models], **options)
    rtol, atol = 1e-5, 1e-6
    if case.startswith(("slerp", "karcher")):
        atol = 1e-5  # mergekit takes the arccos of a cosine near 1
    if case.endswith("_bf16") and case != "ta_out_bf16":
        rtol, atol = 2**-7, 1e-3  # mergekit computes in bfloat16 here
        rtol *= 2 if method in ("karcher", "multislerp") else 1  # in more steps
    if case == "linear_f16":
        rtol, atol = 2**-10, 1e-5  # and in float16 here
    for name, got in merged.items():
        want = jnp.asarray(GOLDEN[f"{case}/{name}"])
        if case.endswith(("bf16_f32", "out_bf16")):
            got, want = got.astype(jnp.bfloat16), want.astype(jnp.bfloat16)
            # One unit in the last place, which is worth more in low mantissas.
            rtol = 2**-7 if method == "karcher" else 2**-8
        np.testing.assert_allclose(
            np.asarray(got, np.float32),
            np.asarray(want, np.float32),
            rtol=rtol,
            atol=atol,
            err_msg=name,
        )


def test_sce_keeps_the_shape_of_leaves_that_no_model_has_changed():
    base, models = tree("base"), [tree("ft_zero"), tree("ft_zero3")]
    merged = jaxmerge.sce(base, models, density=0.5, mask_values=True)
    frozen = []
    for name, got in merged.items():
        want = GOLDEN[f"sce_frozen/{name}"]
        if want.shape != got.shape:  # mergekit returns one copy per model.
            frozen.append(name)
            np.testing.assert_array_equal(want, np.stack([got] * len(models)))
            np.testing.assert_array_equal(got, base[name])
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert len(frozen) == 2


def test_opposite_models_have_no_mean_direction_and_mergekit_takes_any():
    models = [tree("ft1"), tree("ft1_minus")]
    for name, got in jaxmerge.karcher(models).items():
        np.testing.assert_allclose(got, 0, atol=1e-6)
        want = GOLDEN[f"karcher_opposite/{name}"]
        length = np.linalg.norm(models[0][name])
        assert np.linalg.norm(want) == pytest.approx(length, rel=1e-3)


def test_nuslerp_takes_zero_for_no_direction_and_mergekit_for_an_orthogonal_one():
    base, models = tree("base"), [tree("ft_zero"), tree("ft1")]
    merged = jaxmerge.nuslerp(models, origin=base)
    frozen = []
    for name, got in merged.items():
        want = np.asarray(GOLDEN[f"nuslerp_zero_delta/{name}"])
        if np.array_equal(models[0][name], base[name]):
            frozen.append(name)
            delta = models[1][name] - base[name]
            got, want = delta / 2, (want - base[name]) / np.sqrt(2)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
        if name in frozen:
            np.testing.assert_allclose(merged[name] - base[name], got, atol=1e-6)
    assert len(frozen) == 2


@pytest.mark.parametrize("case", ["arcee_fusion", "arcee_fusion_zero_delta"])
def test_arcee_fusion_differs_from_mergekit_where_its_divergence_is_rounded(case):
    base, model = tree("base"), tree("ft_zero" if "zero" in case else "ft1")
    merged = jaxmerge.arcee_fusion(base, [model])
    differ = 0
    for name, got in merged.items():
        want = np.asarray(GOLDEN[f"{case}/{name}"])
        other = np.abs(got - want) > 1e-6
        # Rows are the last axis here, as in PyTorch.
        exact = oracles.arcee_fusion(base[name], model[name])
        np.testing.assert_array_equal(got[other], np.float32(exact)[other])
        differ += other.sum()
    assert differ <= 2


RANDOM_CASES = {
    "dare_linear_d05": ("dare", {"density": 0.5, "rescale": "l1"}),
    "dare_linear_d01": ("dare", {"density": 0.1, "rescale": "l1"}),
    "dare_linear_d05_norescale": ("dare", {"density": 0.5, "rescale": None}),
    "dare_ties_d05": ("dare", {"density": 0.5, "rescale": "l1", **ELECT}),
    "della_d05": (
        "della",
        {"density": 0.5, "half_width": 0.2, "rescale": "l1", **SIGNS},
    ),
    "della_linear_d05": (
        "della",
        {"density": 0.5, "half_width": 0.2, "rescale": "l1", "elect": False},
    ),
    "della_linear_d05_norescale": (
        "della",
        {"density": 0.5, "half_width": 0.2, "rescale": None, "elect": False},
    ),
}


@pytest.mark.parametrize("case", RANDOM_CASES)
def test_random_methods_have_mergekits_moments(case):
    method, options = RANDOM_CASES[case]
    prefix = f"expect/{case}/mean/"
    names = [n.removeprefix(prefix) for n in GOLDEN if n.startswith(prefix)]
    base, *models = ({n: tree(m)[n] for n in names} for m in ("base", *THREE))
    draws = 1000

    @jax.jit
    def moments(keys):
        weights = [0.5, 0.3, 0.2]
        merged = jax.lax.map(
            lambda key: call(method, base, models, key=key, weights=weights, **options),
            keys,
            batch_size=50,
        )
        return jax.tree.map(lambda x: (x.mean(0), x.std(0)), merged)

    for name, (mean, std) in moments(
        jax.random.split(jax.random.key(0), draws)
    ).items():
        want_mean, want_std = (
            GOLDEN[f"expect/{case}/{m}/{name}"] for m in ("mean", "std")
        )
        error = (mean - want_mean) / (want_std * np.sqrt(1 / draws + 1 / 4000) + 1e-7)
        assert np.abs(error).max() < 5.5
        assert abs(np.square(error).mean() - 1) < 0.25
        np.testing.assert_allclose(std.mean(), want_std.mean(), rtol=0.02)
