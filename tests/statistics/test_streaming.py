"""Batches, masks, groups, meshes: what is the same however the data comes."""

import contextlib
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hooks import close, gram, integers, normal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.statistics import Unknown, collect

PARAMS = {
    "embed": normal(0, 7, 4),
    "norm": {"scale": normal(1, 4), "bias": normal(2, 4)},
    "layers": {"up": normal(3, 2, 4, 8), "down": normal(4, 2, 8, 4)},
    "head": normal(5, 4, 3),
}


def apply(params, batch):
    x = params["embed"][batch["tokens"]]

    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    centred = x - x.mean(-1, keepdims=True)
    scale = params["norm"]["scale"].reshape(1, 1, 4)
    factor = jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * scale
    x = centred * factor + params["norm"]["bias"].reshape(1, 1, 4)
    return x @ params["head"]


def apply_small(params, batch):
    return jnp.tanh(params["embed"][batch["tokens"]]) @ params["head"]


SMALL = {"embed": PARAMS["embed"], "head": PARAMS["head"]}


def batch_of(examples, seed=0, length=6):
    tokens = integers(seed, 7, examples, length)
    lengths = jnp.where(integers(seed + 1, 2, examples) == 1, length, 4)
    return {"tokens": tokens, "mask": jnp.arange(length)[None] < lengths[:, None]}


EVERYTHING = {
    "what": ("gram", "output_gradient", "fisher", "fisher_block"),
    "labels": "sample",
    "key": 0,
    "mask": "mask",
}


def assert_alike(found, expected, rtol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: close(a, b, rtol), found, expected)


def test_padding_does_not_count():
    batch = batch_of(5)
    padded = collect(apply, PARAMS, [batch], mask="mask")
    alone = [
        {"tokens": batch["tokens"][i : i + 1, :n]}
        for i, n in enumerate(np.sum(batch["mask"], -1))
    ]
    total = [collect(apply, PARAMS, [example]) for example in alone]
    assert_alike(padded, sum(total[1:], total[0]))
    assert padded.tokens["head"] == np.sum(batch["mask"])
    by_function = collect(apply, PARAMS, [batch], mask=lambda batch: batch["mask"])
    assert_alike(by_function, padded)


def test_padding_does_not_count_in_gradients():
    batch = batch_of(3)

    def found(batch, **options):
        what = ("output_gradient", "fisher")
        return collect(apply_small, SMALL, [batch], what=what, **options)

    # What the padding holds must not matter: the model does not mix tokens.
    other = batch | {"tokens": jnp.where(batch["mask"], batch["tokens"], 3)}
    assert_alike(found(other, mask="mask"), found(batch, mask="mask"))
    unmasked, masked = found(batch), found(batch, mask="mask")
    assert not np.allclose(unmasked.fisher["head"], masked.fisher["head"])


def test_mask_on_tokens_in_one_axis():
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    x = normal(0, 2, 3, 4)
    statistics = collect(
        lambda p, b: b["x"].reshape(6, 4) @ p["w"],
        {"w": normal(1, 4, 2)},
        [{"x": x, "mask": mask}],
        mask="mask",
    )
    close(statistics.gram["w"], gram(x[mask == 1]))
    assert statistics.tokens["w"] == 3


def recurrent(params, batch):
    """A recurrent network, which gives the scores of tokens and those of examples."""

    def step(h, x):
        h = jnp.tanh(h @ params["again"] + x)
        return h, h

    x = params["embed"][batch["tokens"]]
    start = jnp.zeros((len(x), 4))
    _, h = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
    h = jnp.swapaxes(h, 0, 1)
    return h @ params["head"], h.mean(1) @ params["pooled"] + params["bias"][None]


RECURRENT = SMALL | {
    "again": normal(6, 4, 4),
    "pooled": normal(7, 4, 6),
    "bias": normal(8, 6),
}


def test_weights_whose_tokens_the_mask_does_not_know_are_unknown():
    batch = batch_of(5)
    statistics = collect(recurrent, RECURRENT, [batch], mask="mask")
    assert statistics.unknown == (
        Unknown("again", "dot_general", "the mask fits none of its axes"),
    )
    assert "again" not in statistics.tokens
    assert statistics.tokens["head"] == np.sum(batch["mask"])
    assert np.sum(statistics.diagonal["embed"][:, 0]) == np.sum(batch["mask"])
    # Each example is one token of what is pooled; there are as many outputs as tokens.
    assert statistics.tokens["pooled"] == 5
    assert statistics.diagonal["bias"].tolist() == [5.0] * 6


def test_examples_that_fill_up_a_batch_do_not_count():
    batch, mask = batch_of(5), np.array([1, 1, 1, 0, 0])
    padded = batch | {"mask": mask}
    cut = {"tokens": batch["tokens"][:3]}
    options = {"labels": "sample", "key": 0, "what": ("gram", "output_gradient")}

    def scores(params, batch):
        return recurrent(params, batch)[1]

    found = collect(scores, RECURRENT, [padded], mask="mask", **options)
    expected = collect(scores, RECURRENT, [cut], **options)
    assert_alike(dataclasses.replace(found, examples=expected.examples), expected)
    pooled = batch | {"mask": np.repeat(mask[:, None], 6, axis=1)}
    assert collect(scores, RECURRENT, [pooled], mask="mask").tokens["pooled"] == 3


def test_masks_must_fit_logits():
    with pytest.raises(ValueError, match=r"does not fit logits of shape \(5, 3, 3\)"):
        collect(
            lambda p, b: apply_small(p, b)[:, 1:4],
            SMALL,
            [batch_of(5)],
            mask="mask",
            what="fisher",
        )


def test_batches_that_use_other_leaves_are_refused():
    def whole_or_part(params, tokens):
        place = params["place"]
        place = place if tokens.shape[1] == 6 else place[: tokens.shape[1]]
        return params["embed"][tokens] @ params["head"] + place[None]

    params = SMALL | {"place": normal(0, 6, 3)}
    batches = [batch_of(2)["tokens"], batch_of(2, length=4)["tokens"]]
    message = r"shapes \[\(2, 4\)\], the model uses leaf 'place' in another way"
    with pytest.raises(ValueError, match=message):
        collect(whole_or_part, params, batches)


def test_functions_that_have_no_hash():
    class Model:
        __hash__ = None  # as that of a dataclass that is not frozen

        def __call__(self, params, batch):
            return apply_small(params, batch)

    with pytest.raises(ValueError, match="apply is a Model, which Python cannot hash"):
        collect(Model(), SMALL, [batch_of(2)])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda b: b["mask"].T, r"mask has shape \(6, 5\) in a batch of 5 examples"),
        (
            lambda b: b["mask"][:, 1:],
            r"no use of a leaf has tokens of the mask's shape \(5, 5\)",
        ),
    ],
)
def test_masks_that_fit_nothing(mask, message):
    with pytest.raises(ValueError, match=message):
        collect(apply, PARAMS, [batch_of(5)], mask=mask)


def test_batches_add_up_and_compile_once():
    batches = [batch_of(4, seed) for seed in range(3)] + [batch_of(2, 9)]
    traced = chex.assert_max_traces(lambda p, b: apply_small(p, b), n=4)
    chex.clear_trace_counter()
    # One trace to plan, and one for each of the two shapes of batches; another model
    # is only planned.
    together = collect(traced, SMALL, iter(batches), mask="mask")
    collect(traced, jax.tree.map(jnp.sin, SMALL), batches, mask="mask")
    apart = [collect(apply_small, SMALL, [batch], mask="mask") for batch in batches]
    assert_alike(sum(apart[1:], apart[0]), together)
    assert together.examples == 14


def test_groups_hold_a_part_at_a_time():
    batches = [batch_of(4), batch_of(4, 1)]
    whole = collect(apply_small, SMALL, batches, **EVERYTHING)
    parts = collect(apply_small, SMALL, batches, groups=3, **EVERYTHING)
    assert_alike(parts, whole)
    assert isinstance(parts.gram["head"], np.ndarray)


def test_groups_need_batches_that_can_be_iterated_again():
    with pytest.raises(ValueError, match="groups=2 passes over the batches need"):
        collect(apply, PARAMS, iter([batch_of(4)]), groups=2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (batch_of(2), "looks like a single batch"),
        ([batch_of(2), batch_of(0)], "a batch has no examples"),
        ([batch_of(2) | {"step": 1}], r"shapes .*; all must have the examples along"),
    ],
)
def test_batches_are_checked(batches, message):
    with pytest.raises(ValueError, match=message):
        collect(apply, PARAMS, batches)


def test_what_is_too_large_is_listed():
    statistics = collect(
        apply,
        PARAMS,
        [batch_of(3)],
        max_size=4,
        what=("gram", "output_gradient"),
        labels="sample",
        key=0,
    )
    assert set(statistics.gram) == {"layers/up", "head"}
    assert set(statistics.output_gradient) == {"layers/down", "head"}
    assert {use[:2] for use in statistics.unknown} == {
        ("layers/down", "gram"),
        ("layers/up", "output_gradient"),
    }


@pytest.fixture(scope="module")
def on_one_device():
    return jax.device_get(collect(apply, PARAMS, [batch_of(8)], **EVERYTHING))


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("within", [True, False], ids=["set_mesh", "arrays"])
def test_sharded_batches_give_the_same_sums(axis_type, within, on_one_device):
    axis_type = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = jax.tree.map(lambda _: P(), PARAMS)
    if axis_type == jax.sharding.AxisType.Auto:
        specs["embed"] = P(None, "model")
        specs["layers"] = {"up": P(None, None, "model"), "down": P(None, "model", None)}
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), PARAMS, specs
    )
    sharded = jax.device_put(batch_of(8), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        found = collect(apply, params, [sharded], **EVERYTHING | {"chunk": 4})
    assert_alike(jax.device_get(found), on_one_device)


@pytest.mark.parametrize("within", [True, False], ids=["set_mesh", "arrays"])
def test_models_that_say_how_they_are_sharded(within):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    params = {
        "layers": normal(0, 3, 4, 8),
        "shared": normal(1, 8, 4),
        "bias": normal(2, 4),
        "either": normal(3, 4, 4),
        "again": normal(4, 4, 4),
    }
    specs = {"layers": P(None, None, "model"), "shared": P("model")}
    x = normal(5, 8, 4)

    def apply(params, x, split=None):
        def layer(x, w):
            y = jnp.tanh(x @ w)
            if split:
                y = jnp.matmul(y, params["shared"], out_sharding=split)
            else:
                y = y @ params["shared"]
            return y + params["bias"].reshape(1, 4), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        x = jax.lax.cond(True, lambda x: x @ params["either"], lambda x: x, x)
        return jax.lax.fori_loop(0, 2, lambda _, x: jnp.sin(x @ params["again"]), x)

    kinds = {"what": ("gram", "output_gradient"), "labels": "sample", "key": 0}
    expected = jax.device_get(collect(apply, params, [x], **kinds))
    sharded = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))
        for name, leaf in params.items()
    }
    split = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        found = collect(
            functools.partial(apply, split=split),
            sharded,
            [jax.device_put(x, split)],
            **kinds,
        )
    assert_alike(jax.device_get(found), expected)
