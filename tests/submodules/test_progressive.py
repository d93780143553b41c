"""RegMean layer by layer, against the same in float64 with the features at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from networks import (
    MODELS,
    SAMPLES,
    WIDTH,
    dense,
    kernels,
    linear,
    linen,
    plain,
    plain_scan,
    random,
    stacked,
)

import jaxmerge as jm
from jaxmerge.tree import named_leaves

LAYERS = [r"block_0/.*", r"block_1/.*", r"head/.*"]
EXACT = {"shrinkage": 1.0, "ridge": 0.0}
DATA = [random(40, WIDTH, seed=t) * np.exp(random(WIDTH, seed=t + 9)) for t in range(3)]


def assert_same(got, want, atol=1e-5):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=atol, err_msg=path)


def differ(a, b):
    return [p for p, x in named_leaves(a).items() if np.abs(x - b[p]).max() > 1e-2]


def test_a_model_of_one_layer_is_merged_as_by_regmean():
    models = kernels(1, 2, 3)
    samples = [random(40, 6, seed=t + 5) for t in range(3)]
    known = [
        jm.collect(linear, model, [x]) for model, x in zip(models, samples, strict=True)
    ]
    for options in ({}, {"weights": [1, 2, 0.5], "normalize": "none", **EXACT}):
        got = jm.regmean_plus_plus(
            linear, models, samples, layers="linear/.*", **options
        )
        assert_same(got, jm.regmean(models, known, **options), atol=0)


def test_equal_models_come_back():
    got = jm.regmean_plus_plus(linen, [MODELS[0]] * 3, SAMPLES, layers=LAYERS)
    assert_same(got, MODELS[0], atol=1e-6)


def by_hand(models, samples, layers):
    """RegMean++ of residual MLPs and a head in float64; features of merged layers."""
    models = [jax.tree.map(np.float64, model) for model in models]
    samples = [np.float64(x) for x in samples]
    merged = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *models)

    def run(layer, x):
        hidden = np.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"])
        return hidden, x + hidden @ layer["down"]["kernel"] + layer["down"]["bias"]

    def regmean(weights, inputs):
        grams = [x.T @ x / len(x) for x in inputs]
        pairs = zip(grams, weights, strict=True)
        return np.linalg.solve(sum(grams), sum(g @ w for g, w in pairs))

    for name in layers:
        own = [model[name] for model in models]
        if name == "head":
            merged[name]["kernel"] = regmean([p["kernel"] for p in own], samples)
            continue
        hidden = [run(p, x)[0] for p, x in zip(own, samples, strict=True)]
        for part, inputs in (("up", samples), ("down", hidden)):
            kernels = [p[part]["kernel"] for p in own]
            merged[name][part]["kernel"] = regmean(kernels, inputs)
        samples = [run(merged[name], x)[1] for x in samples]
    return merged


def test_layers_meet_the_features_of_merged_ones():
    with jax.numpy_rank_promotion("allow"):
        want = by_hand(MODELS, DATA, ["block_0", "block_1", "head"])
    got = jm.regmean_plus_plus(plain, MODELS, DATA, layers=LAYERS, **EXACT)
    assert_same(got, want, atol=2e-4)
    batches = [[x[:20], x[20:]] for x in DATA]
    parts = jm.regmean_plus_plus(plain, MODELS, batches, layers=LAYERS, **EXACT)
    assert_same(parts, want, atol=2e-4)
    models = [jax.tree.map(np.float32, model) for model in MODELS]
    known = [jm.collect(plain, m, [x]) for m, x in zip(models, DATA, strict=True)]
    at_once = named_leaves(jm.regmean(models, known, **EXACT))
    later = {"block_1/up/kernel", "block_1/down/kernel", "head/kernel"}
    assert set(differ(got, at_once)) == later


def test_leaves_outside_of_layers_are_averaged_first():
    with jax.numpy_rank_promotion("allow"):
        want = by_hand(MODELS, DATA, ["block_1"])
        before = [named_leaves(jm.average(MODELS))[f"block_0/{p}"] for p in PARTS]
        merged = {"up": dict(zip(("kernel", "bias"), before[:2], strict=True))}
        merged["down"] = dict(zip(("kernel", "bias"), before[2:], strict=True))
        inputs = [
            np.float64(x)
            + np.tanh(x @ np.float64(merged["up"]["kernel"]) + merged["up"]["bias"])
            @ np.float64(merged["down"]["kernel"])
            + merged["down"]["bias"]
            for x in DATA
        ]
        want["block_1"] = by_hand(MODELS, inputs, ["block_1"])["block_1"]
    got = jm.regmean_plus_plus(plain, MODELS, DATA, layers=r"block_1/.*", **EXACT)
    assert_same(got, want, atol=2e-4)


PARTS = ["up/kernel", "up/bias", "down/kernel", "down/bias"]


@pytest.mark.parametrize("others", ["average", "diagonal"])
def test_layers_of_a_scan_are_merged_in_their_order(others):
    options = {"others": others, "weights": [1, 2, 3]}
    want = jm.regmean_plus_plus(plain, MODELS, DATA, layers=LAYERS, **options)
    models = [stacked(model) for model in MODELS]
    layers = [r"blocks/.*", r"head/.*"]
    got = jm.regmean_plus_plus(plain_scan, models, DATA, layers=layers, **options)
    assert_same(got, stacked(jax.device_get(want)))


def test_stacks_along_another_axis_and_numbers_that_are_not_merged():
    models = [stacked(model) for model in MODELS]
    layers = [r"blocks/.*", r"head/.*"]
    want = jm.regmean_plus_plus(plain_scan, models, DATA, layers=layers)

    def moved(params):
        blocks = jax.tree.map(lambda x: np.moveaxis(x, 0, -1), params["blocks"])
        return {**params, "blocks": blocks, "steps": np.array(7)}

    def apply(params, x):
        blocks = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), params["blocks"])
        return plain_scan({"blocks": blocks, "head": params["head"]}, x)

    others = [moved(model) for model in models]
    got = jm.regmean_plus_plus(apply, others, DATA, layers=layers)
    assert_same(got, moved(jax.device_get(want)))


def norms(params, x):
    def step(x, layer):
        x = x * layer["scale"][None]
        return x + dense(layer["mlp"], x), None

    return jax.lax.scan(step, x, params["blocks"])[0]


def normed(seed):
    mlp = {"kernel": random(3, 4, 4, seed=seed), "bias": random(3, 4, seed=seed + 1)}
    return {"blocks": {"scale": 1 + 0.1 * random(3, 4, seed=seed + 2), "mlp": mlp}}


def test_a_layer_without_weights():
    models, data = [normed(1), normed(9)], DATA[:2]
    for others in ("average", "diagonal"):
        got = jm.regmean_plus_plus(
            norms, models, data, layers=r"blocks/scale", others=others
        )
        plainly = jm.average(models)["blocks"]
        np.testing.assert_allclose(
            got["blocks"]["mlp"]["kernel"], plainly["mlp"]["kernel"]
        )
        same = np.allclose(got["blocks"]["scale"], plainly["scale"], atol=1e-5)
        assert same == (others == "average")


def test_what_compiles_does_not_depend_on_the_number_of_layers(compilations):
    counts = []
    for count in (2, 5):
        blocks = [f"block_{i}" for i in range(count)]

        def apply(params, x, blocks=blocks):
            for name in blocks:
                x = x + dense(params[name], x)
            return x

        draw = lambda t: {  # noqa: E731
            name: {"kernel": random(4, 4, seed=t + i), "bias": random(4, seed=t)}
            for i, name in enumerate(blocks)  # noqa: B023
        }
        jax.clear_caches()
        compilations.clear()
        layers = [f"{name}/.*" for name in blocks]
        jm.regmean_plus_plus(apply, [draw(0), draw(9)], DATA[:2], layers=layers)
        unrolled = len(compilations)
        models = [
            {"blocks": jax.tree.map(lambda *x: np.stack(x), *draw(t).values())}
            for t in (0, 9)
        ]

        def scan(params, x):
            step = lambda x, layer: (x + dense(layer, x), None)  # noqa: E731
            return jax.lax.scan(step, x, params["blocks"])[0]

        jax.clear_caches()
        compilations.clear()
        jm.regmean_plus_plus(scan, models, DATA[:2], layers="blocks/.*")
        counts.append((unrolled, len(compilations)))
    assert counts[0] == counts[1]


def test_inputs_are_left_alone_and_dtypes_kept():
    models = [jax.tree.map(jnp.bfloat16, model) for model in MODELS]
    models[1] = jax.tree.map(jnp.float32, models[1])
    before = jax.device_get(models)
    got = jm.regmean_plus_plus(plain, models, DATA, layers=LAYERS)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(models), before)
    want = jm.regmean_plus_plus(
        plain,
        [jax.tree.map(np.float32, model) for model in before],
        DATA,
        layers=LAYERS,
    )
    assert_same(jax.tree.map(jnp.float32, got), want, atol=0.05)


def test_tokens_that_do_not_count():
    def apply(params, batch):
        return plain(params, batch["x"].reshape(-1, WIDTH))

    mask = np.arange(8)[None] < np.array([3, 8, 5, 6, 2])[:, None]
    whole = [{"x": x.reshape(5, 8, WIDTH), "mask": mask} for x in DATA]
    garbage = [{**b, "x": np.where(mask[..., None], b["x"], 9)} for b in whole]
    a, b = (
        jm.regmean_plus_plus(apply, MODELS, data, layers=LAYERS, mask="mask")
        for data in (whole, garbage)
    )
    assert_same(a, b)
    unmasked = jm.regmean_plus_plus(apply, MODELS, garbage, layers=LAYERS)
    assert differ(unmasked, named_leaves(a))


@pytest.mark.parametrize("spec", [P(), P("model")], ids=["replicated", "by layer"])
def test_models_on_a_mesh(spec, mesh):
    models = [stacked(model) for model in MODELS]
    layers = [r"blocks/.*", r"head/.*"]
    want = jm.regmean_plus_plus(plain_scan, models, DATA, layers=layers)
    rules = {"blocks/.*": spec, ".*": P()}
    placed = [jm.place(model, mesh, rules) for model in models]
    got = jm.regmean_plus_plus(plain_scan, placed, DATA, layers=layers)
    assert_same(jax.device_get(got), want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(placed[0]), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


def refused(
    message, apply=plain, models=MODELS, samples=SAMPLES, layers=None, **options
):
    def never(params, x):
        raise AssertionError("this is work")

    with pytest.raises(ValueError, match=message):
        jm.regmean_plus_plus(
            apply or never, models, samples, layers=layers or LAYERS, **options
        )


def test_errors_come_before_work():
    refused("^regmean_plus_plus: needs at least one model", None, [])
    refused(
        "^regmean_plus_plus: samples must be .*: 3 entries", None, samples=SAMPLES[:2]
    )
    refused("samples is a list without batches", None, samples=[[], [], []])
    refused("^regmean_plus_plus: ridge is -1", None, ridge=-1.0)
    refused("^regmean_plus_plus: shrinkage is 2", None, shrinkage=2.0)
    refused("^regmean_plus_plus: normalize is 'sum'", None, normalize="sum")
    refused("^regmean_plus_plus: others is 'base'", None, others="base")
    refused("weights of leaf '.*' has 2 values for 3 models", None, weights=[1, 2])
    refused(
        r"no leaf has a path that 'block_7/\.\*' of layers matches.* 'block_0/down",
        layers=[*LAYERS, r"block_7/.*"],
    )
    refused(r"'\*' is no valid regular expression", layers=["*"])
    refused(
        r"leaf 'block_0/down/bias' is in two of layers, 'block_0/\.\*' and '\.\*/bias'",
        layers=[r"block_0/.*", r".*/bias"],
    )
    scanned = [stacked(model) for model in MODELS]
    refused(
        r"layers '\.\*' are those of a scan, which does not stack leaf 'head/bias'",
        plain_scan,
        scanned,
        layers=[".*"],
    )


def test_experts_are_one_layer():
    def apply(params, x):
        x = jnp.tanh(x @ params["router"])
        slots = jnp.stack([x, x * x, x[:, ::-1]])
        return jnp.einsum("eti,eio->eto", slots, params["experts"])

    models = [
        {"router": random(4, 4, seed=t), "experts": random(3, 4, 2, seed=t + 5)}
        for t in range(2)
    ]
    one, apart = (
        jm.regmean_plus_plus(apply, models, DATA[:2], layers=layers, **EXACT)
        for layers in ([".*"], ["router", "experts"])
    )
    known = [jm.collect(apply, m, [x]) for m, x in zip(models, DATA[:2], strict=True)]
    assert_same(one, jm.regmean(models, known, **EXACT))
    assert differ(apart, one) == ["experts"]
