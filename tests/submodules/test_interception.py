import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from networks import (
    BASE,
    BLOCKS,
    MODELS,
    SAMPLES,
    WIDTH,
    Network,
    NnxBlock,
    block,
    dense,
    jitted,
    linen,
    linen_remat,
    linen_scan,
    nnx_scan,
    of_nnx,
    plain,
    plain_scan,
    random,
    solve,
    stacked,
    vmapped,
)

from jaxmerge import submodule, submodule_coefficients, submodule_merge
from jaxmerge.submodules.calls import visit_calls
from jaxmerge.tree import named_leaves


def float64(tree):
    return jax.tree.map(np.float64, tree)


def block64(params, x):
    hidden = np.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x + hidden @ params["down"]["kernel"] + params["down"]["bias"]


def expected():
    base, models = float64(BASE), [float64(m) for m in MODELS]
    inputs, result = float64(SAMPLES), {}
    for name in ("block_0", "block_1"):
        ends = [block64(base[name], x) for x in inputs]
        result[name] = solve(
            [
                [block64(model[name], x) - end for model in models]
                for x, end in zip(inputs, ends, strict=True)
            ]
        )
        inputs = ends
    return result


APPLIES = [plain, vmapped, linen, linen_remat, jitted, of_nnx]


@pytest.mark.parametrize("apply", APPLIES, ids=lambda f: getattr(f, "__name__", "jit"))
def test_finds_the_modules_of_any_model(apply):
    apply(BASE, SAMPLES[0])  # A jitted function is not traced again without need.
    found = submodule_coefficients(apply, BASE, MODELS, SAMPLES, submodules=r"block_\d")
    want = expected()
    assert found.keys() == want.keys()
    for path, coefficients in found.items():
        np.testing.assert_allclose(coefficients, want[path], rtol=2e-4)


def test_paths_are_where_the_parameters_are_in_the_tree():
    def wrapped(variables, x):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["half"])
        return Network().apply({"params": half["params"]}, x)

    base, *models = ({"half": {"params": params}} for params in [BASE, *MODELS])
    found = submodule_coefficients(
        wrapped, base, models, SAMPLES, submodules=[r".*/block_0/up", ".*/block_1"]
    )
    assert list(found) == [f"half/params/{p}" for p in ("block_0/up", "block_1")]


def test_nnx_states_need_no_pure_dict():
    states = [nnx.State(jax.tree.map(nnx.Param, params)) for params in (BASE, *MODELS)]
    base, *models = states
    merged = submodule_merge(of_nnx, base, models, SAMPLES, submodules=r"block_\d")
    want = submodule_merge(of_nnx, BASE, MODELS, SAMPLES, submodules=r"block_\d")
    assert isinstance(merged, nnx.State)
    for got, expect in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expect)


@pytest.mark.parametrize("apply", [plain_scan, linen_scan, nnx_scan])
def test_layers_of_a_scan_have_their_own_coefficients(apply):
    base, *models = map(stacked, [BASE, *MODELS])
    merged, found = submodule_merge(
        apply, base, models, SAMPLES, submodules="blocks", info=True
    )
    unrolled, want = submodule_merge(
        plain, BASE, MODELS, SAMPLES, submodules=r"block_\d", info=True
    )
    np.testing.assert_allclose(found["blocks"], np.stack([*want.values()]), rtol=1e-4)
    leaves = named_leaves(stacked(unrolled))
    for path, leaf in named_leaves(merged).items():
        np.testing.assert_allclose(leaf, leaves[path], atol=1e-4)


def test_a_module_that_is_called_twice_fits_both_calls():
    def twice(params, x):
        head = submodule("head", dense)
        return (
            head(params["head"], x)
            + jax.lax.scan(
                lambda carry, x: (carry, head(params["head"], x)), 0.0, x[None] + 1
            )[1][0]
        )

    def once(params, x):
        return submodule("head", dense)(params["head"], jnp.concatenate([x, x + 1]))

    got, want = (
        submodule_coefficients(f, BASE, MODELS, SAMPLES, submodules="head")["head"]
        for f in (twice, once)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


class Stateful(nn.Module):
    dropout: float

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=False)(x)
        self.sow("intermediates", "seen", x)
        return nn.Dense(WIDTH, name="up")(x)


class StatefulNetwork(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        for i in range(BLOCKS):
            x = Stateful(self.dropout, name=f"block_{i}")(x)
        return x


def marked(apply, params, x):
    """The results of a model of which all submodules are marked."""
    results = []

    def visit(call):
        if call.path == "":
            results.append(call.run(call.base))
            return results[0], ()
        return None

    visit_calls(apply, params, [], x, visit)
    return results[0]


def test_state_of_linen_reaches_modules_and_comes_back():
    variables = StatefulNetwork().init(jax.random.key(0), SAMPLES[0])

    def apply(params, x, dropout=0.0):
        return StatefulNetwork(dropout).apply(
            {**variables, "params": params},
            x,
            rngs={"dropout": jax.random.key(1)},
            mutable=["intermediates", "batch_stats"],
        )

    params, x = variables["params"], SAMPLES[0]
    want = apply(params, x)
    assert want[1]["intermediates"]["block_1"]["seen"][0].shape == x.shape
    results = marked(apply, params, x)
    for got, expect in zip(results, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expect, atol=1e-5)
    model = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = submodule_coefficients(
        lambda p, x: apply(p, x, dropout=0.5)[0],
        params,
        [model],
        [x],
        submodules=r"block_\d/(up|norm)",
    )
    assert len(found) == 2 * BLOCKS
    np.testing.assert_allclose([*found.values()], 1, rtol=1e-6)


class Tied(nn.Module):
    embed: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.embed.attend(nn.Dense(WIDTH, name="up")(x))


class TiedNetwork(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, WIDTH, name="embed")
        return Tied(embed, name="decoder")(embed(tokens))


def test_modules_may_hold_modules_of_others():
    network, tokens = TiedNetwork(), np.arange(7)
    params = network.init(jax.random.key(0), tokens)["params"]
    model = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = submodule_coefficients(
        lambda p, x: network.apply({"params": p}, x),
        params,
        [model],
        [tokens],
        submodules=["decoder/up", "embed"],
    )
    np.testing.assert_allclose([*found.values()], 1, rtol=1e-6)


class LinenEncoder(nn.Module):
    def setup(self):
        self.up = nn.Dense(WIDTH)

    def encode(self, x):
        return self.up(x)

    def number(self):
        return 1

    def __call__(self, x):
        for _ in range(self.number()):
            x = self.encode(x)
        return x


class LinenTied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(7, WIDTH)
        self.encoder = LinenEncoder()

    def __call__(self, tokens):
        encoder = self.encoder
        x = self.embed(tokens)
        x = encoder.encode(x) + encoder(jnp.sin(x))
        return self.embed.attend(jnp.tanh(x))


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.calls = 0

    def encode(self, x):
        return self.up(x)

    def count(self):
        self.calls += 1

    def __call__(self, x):
        return self.encode(x)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.encoder = NnxEncoder(rngs)

    def __call__(self, tokens):
        encoder = self.encoder
        x = self.embed(tokens)
        x = encoder.encode(x) + encoder(jnp.sin(x))
        encoder.count()
        assert encoder.calls == 1
        return self.embed.attend(jnp.tanh(x))


class LinenHelper(nn.Module):
    """A method that only works inside of another one."""

    @nn.compact
    def __call__(self, x):
        return self.help(x)

    def help(self, x):
        bias = self.param("bias", nn.initializers.zeros, (WIDTH,))
        return nn.Dense(WIDTH)(x) + bias[None]


def test_methods_that_do_not_stand_alone():
    params = LinenHelper().init(jax.random.key(0), SAMPLES[0])["params"]
    model = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = submodule_coefficients(
        lambda p, x: LinenHelper().apply({"params": p}, x),
        params,
        [model],
        [SAMPLES[0]],
        submodules="Dense_0",
    )
    np.testing.assert_allclose(found["Dense_0"], [1], rtol=1e-6)


def linen_tied(params, tokens):
    return LinenTied().apply({"params": params}, tokens)


TIED = nnx.split(nnx.eval_shape(lambda: NnxTied(nnx.Rngs(0))))[0]


def nnx_tied(params, tokens):
    return nnx.merge(TIED, params)(tokens)


def declared_tied(params, tokens):
    look_up = submodule("embed", lambda p, t: p["embedding"][t])
    attend = submodule("embed", lambda p, x: x @ p["embedding"].T)
    encode = submodule("encoder", lambda p, x: dense(p["up"], x))
    x = look_up(params["embed"], tokens)
    x = encode(params["encoder"], x) + encode(params["encoder"], jnp.sin(x))
    return attend(params["embed"], jnp.tanh(x))


@pytest.mark.parametrize("apply", [linen_tied, nnx_tied])
@pytest.mark.parametrize("path", ["embed", "encoder"])
def test_modules_are_used_by_any_method(apply, path):
    tokens = [np.arange(7), np.array([1, 2, 2])]
    base, *models = (
        {
            "embed": {"embedding": random(7, WIDTH, seed=seed)},
            "encoder": {
                "up": {
                    "kernel": random(WIDTH, WIDTH, seed=seed + 1),
                    "bias": random(WIDTH, seed=seed + 2),
                }
            },
        }
        for seed in (0, 10, 20)
    )
    got, want = (
        submodule_coefficients(f, base, models, tokens, submodules=path)[path]
        for f in (apply, declared_tied)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_parameters_that_are_handed_on_are_still_leaves():
    def apply(params, x):
        x, own = jax.lax.optimization_barrier((x, params["head"]))
        return submodule("head", dense)(jax.lax.stop_gradient(own), x)

    got, want = (
        submodule_coefficients(f, BASE, MODELS, SAMPLES, submodules="head")["head"]
        for f in (apply, lambda p, x: submodule("head", dense)(p["head"], x))
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


class NnxStateful(nnx.Module):
    def __init__(self, rngs):
        self.block = NnxBlock(rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.block(x)))


def test_state_of_nnx_reaches_modules_and_comes_back():
    graph, state, rest = nnx.split(NnxStateful(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, x):
        network = nnx.merge(graph, params, rest, copy=True)
        return network(x), network.norm.mean[...], network.dropout.rngs.count[...]

    params = nnx.to_pure_dict(state)
    want = apply(params, SAMPLES[0])
    assert int(want[2]) == 1
    assert np.any(np.abs(want[1]) > 1e-3)
    for got, expect in zip(marked(apply, params, SAMPLES[0]), want, strict=True):
        np.testing.assert_allclose(got, expect, atol=1e-5)


def test_classes_of_nnx_are_left_as_they_were():
    original = nnx.Linear.__call__
    during = []

    def apply(params, x):
        during.append(nnx.Linear.__call__)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        submodule_coefficients(apply, BASE, MODELS, SAMPLES, submodules="block")
    assert during[0] is not original
    assert nnx.Linear.__call__ is original


def test_modules_may_have_functions_among_their_leaves():
    def apply(params, x):
        module = {**params["head"], "activation": jnp.tanh}
        layer = submodule("head", lambda p, x: p["activation"](dense(p, x)))
        return layer(module, x)

    found = submodule_coefficients(
        apply, BASE, MODELS[:1], SAMPLES[:1], submodules="head"
    )
    np.testing.assert_allclose(found["head"], [1], rtol=1e-6)


def test_a_declared_submodule_does_what_its_function_does():
    def scaled(params, x, *, by=1, name="none"):
        return {"by": by, "name": name, "x": params["w"] * x}

    params = {"w": jnp.ones(2), "activation": jnp.tanh}
    result = submodule("any", scaled)(params, 3.0, by=2, name="some")
    assert (result["by"], result["name"], result["x"].tolist()) == (2, "some", [3, 3])


def opaque(params, x):
    return linen(jax.tree.map(lambda leaf: 2 * leaf, params), x)


def partly_opaque(params, x):
    own = {**params["head"], "bias": params["head"]["bias"] + 1}
    return submodule("head", dense)(own, x)


def all_opaque(params, x):
    own = jax.tree.map(lambda leaf: 2 * leaf, params["head"])
    return submodule("head", dense)(own, x)


def sliced(params, x):
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, params)
    return submodule("head", dense)(jax.tree.map(lambda x: x[0], layers)["head"], x)


def in_a_branch(params, x):
    head = submodule("head", dense)
    return jax.lax.cond(
        jnp.sum(x) > 0,
        lambda x: jax.jit(head)(params["head"], x),
        lambda x: head(params["head"], 2 * x),
        x,
    )


def partly_stacked(params, x):
    def step(x, kernel):
        own = {"kernel": kernel, "bias": params["head"]["bias"]}
        return x, submodule("block", lambda p: p["kernel"] + p["bias"])(own)

    return jax.lax.scan(step, x, params["head"]["kernel"])


def same_name(params, x):
    for i in range(BLOCKS):
        x = submodule("block", block)(params[f"block_{i}"], x)
    return x


@pytest.mark.parametrize(
    ("apply", "submodules", "message"),
    [
        (
            plain,
            "blok",
            "'blok' matches. Those found are: 'block_0', 'block_1', 'head'",
        ),
        (plain, ["head", "x"], "no submodule has a path that 'x' matches"),
        (plain, "(", r"'\(' is no valid regular expression"),
        (opaque, "head", "Those found are: none"),
        (partly_opaque, "head", "'head' gets parameters that are computed from leaves"),
        (all_opaque, "head", "'head' gets parameters that are computed from leaves"),
        (sliced, "head", "'head' gets parameters that are .* or are parts of them"),
        (in_a_branch, "head", "'head' is called inside of a branch"),
        (same_name, "block", "'block' is the name of several"),
        (partly_stacked, "block", "'block' is in a scan over some of its leaves"),
        (
            linen,
            r"block_0.*",
            "'block_0' and 'block_0/up' share leaf 'block_0/up/b",
        ),
    ],
)
def test_errors_name_the_submodule(apply, submodules, message):
    with pytest.raises(ValueError, match=message):
        submodule_coefficients(apply, BASE, MODELS, SAMPLES, submodules=submodules)
