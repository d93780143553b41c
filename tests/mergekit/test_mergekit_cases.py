"""Every golden recipe of mergekit, run unchanged: the same numbers, or why not."""

from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, GOLDEN, below, carried_out, leaves_of

from jaxmerge.mergekit import parse_mergekit
from jaxmerge.mergekit.resolving import resolve
from jaxmerge.registry import methods


class Same(NamedTuple):
    """The numbers of mergekit.

    Attributes:
        why: the reason of the tolerance.
        rtol: relative.
        atol: absolute.
        ulps: instead of both, units in the last bfloat16 place of the result and of the
            inputs, whichever is larger.
    """

    why: str
    rtol: float = 1e-5
    atol: float = 1e-6
    ulps: int = 0


class Fails(NamedTuple):
    """An error, matching a regular expression."""

    match: str
    why: str


class Differs(NamedTuple):
    """Another result than mergekit's, which a function of (case, merged) checks."""

    check: object
    why: str


COPY = Same("values are copied", 0, 0)
SUMS = Same("float32 sums in another order")
ANGLE = Same("mergekit takes the arccos of a cosine near 1 in float32", atol=1e-5)
BF16 = Same(
    "mergekit rounds every step to bfloat16, this library once: two units in the last "
    "place of the operands",
    ulps=2,
)
ROUNDED = Same("both round once, of float32 sums in another order", ulps=1)
F16 = Same("mergekit rounds every step to float16", 2**-10, 1e-5)


def median_base(case, merged):
    """mergekit loses the deltas of leaves too small for an outlier; here they stay."""
    recipe = CASES["recipes"][case]
    gamma = 0.0 if "gamma" in recipe else 0.01
    base = leaves_of("base")
    lost = 0
    for name, got in merged.items():
        total = np.zeros(base[name].size)
        for model in ("ft1", "ft2", "ft3"):
            delta = np.float64(leaves_of(model)[name] - base[name]).ravel()
            order = np.argsort(-np.abs(delta))
            top = int(gamma * delta.size)
            kept = order[top : top + int(0.9 * delta.size)]
            total[kept] += 0.4 * delta[kept]
        want = base[name] + total.reshape(base[name].shape)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
        lost += np.array_equal(GOLDEN[f"{case}/{name}"], base[name])
    assert lost == (5 if gamma == 0 else 2)


def nothing(case, merged):
    for name, got in merged.items():
        np.testing.assert_allclose(got, 0, atol=1e-6, err_msg=name)
        assert np.abs(GOLDEN[f"{case}/{name}"]).max() > 0.1


def plain_difference(case, merged):
    first, second = leaves_of("ft1"), leaves_of("ft2")
    for name, got in merged.items():
        np.testing.assert_allclose(got, first[name] - second[name], atol=1e-6)
        assert not np.isfinite(GOLDEN[f"{case}/{name}"]).all()


def the_base(case, merged):
    for name, got in merged.items():
        np.testing.assert_allclose(got, leaves_of("base")[name], atol=1e-6)


def lerp_of_a_zero_vector(case, merged):
    """A zero vector is no direction here, and orthogonal to all others in mergekit."""
    base, moved, zeros = leaves_of("base"), leaves_of("ft1"), 0
    for name, got in merged.items():
        want = np.asarray(GOLDEN[f"{case}/{name}"])
        if np.array_equal(leaves_of("ft_zero")[name], base[name]):
            delta, zeros = moved[name] - base[name], zeros + 1
            np.testing.assert_allclose(want - base[name], delta / 2**0.5, atol=1e-6)
            want = base[name] + delta / 2
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
    assert zeros == 2


def without_leading_axis(case, merged):
    for name, got in merged.items():
        want = GOLDEN[f"{case}/{name}"]
        if want.ndim > got.ndim:
            np.testing.assert_array_equal(got, leaves_of("base")[name])
            want = want[0]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


def other_entries_near_the_fence(case, merged):
    """Entries come from one of the two models; few from another than in mergekit."""
    base = leaves_of("base")
    model = leaves_of("ft_zero" if "zero" in case else "ft1")
    differ = 0
    for name, got in merged.items():
        assert ((got == base[name]) | (got == model[name])).all()
        differ += (np.abs(got - GOLDEN[f"{case}/{name}"]) > 1e-6).sum()
    assert differ <= 2


def other_entries_near_the_threshold(case, merged):
    """Where no model's delta is near the threshold, the same within bfloat16."""
    base = leaves_of("base_bf16")
    for name, got in merged.items():
        clear = np.ones(got.shape, bool)
        for model in ("ft1_bf16", "ft2_bf16"):
            size = np.abs(np.float32(leaves_of(model)[name]) - np.float32(base[name]))
            threshold = np.sort(size, axis=None)[-(size.size // 2)]
            clear &= np.abs(size - threshold) > 2**-7 * threshold
        # Deltas of norms, whose entries are near 1, have few bits and tie often.
        assert clear.mean() > (0.75 if got.ndim > 1 else 0)
        near(case, {name: got}, BF16, clear)


def one_of_the_tokens_is_zero(case, merged):
    """What the README of mergekit promises, where it raises UnboundLocalError."""
    base, first, second = (
        leaves_of(model, vocabulary=True) for model in ("base", "ft1", "ft_vocab67")
    )
    for name, got in merged.items():
        want = np.zeros(second[name].shape)
        rows = slice(None) if got.ndim == 1 else slice(64)
        want[rows] = (first[name] + second[name][rows]) / 2
        if got.shape != base[name].shape:
            want[65:] = second[name][65:]  # The other tokens of that model alone.
            want[64] = second[name][64] / 2
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


def trimmed_to_one_entry(case, merged):
    """Of leaves where mergekit keeps none, the largest entry is kept."""
    base = leaves_of("base")["model.norm.weight"]
    deltas = [leaves_of(m)["model.norm.weight"] - base for m in ("ft1", "ft2", "ft3")]
    largest = {int(np.abs(delta).argmax()) for delta in deltas}
    moved = np.flatnonzero(merged["model.norm.weight"] - base)
    assert set(moved) == largest


def scalar_too(case, merged):
    base, first, second = (below(f"raw/{m}.safetensors") for m in ("m0", "m1", "m2"))
    deltas = [model["scalar"] - base["scalar"] for model in (first, second)]
    sign = np.sign(sum(deltas))
    want = base["scalar"] + np.mean([d for d in deltas if np.sign(d) == sign])
    np.testing.assert_allclose(merged["scalar"], want, rtol=1e-6)


def average_of_both(case, merged):
    first, second = (below(f"raw/{m}.safetensors") for m in ("m1", "m2"))
    for name, got in merged.items():
        np.testing.assert_allclose(got, (first[name] + second[name]) / 2, rtol=1e-6)


EXPECTED = {
    "arcee_fusion": Differs(
        other_entries_near_the_fence,
        "mergekit's divergence is rounding noise where the fence is",
    ),
    "arcee_fusion_zero_delta": Differs(other_entries_near_the_fence, "the same"),
    "breadcrumbs_d05_g01": SUMS,
    "breadcrumbs_d1": SUMS,
    "breadcrumbs_default_gamma": Differs(median_base, "deltas lost by an empty slice"),
    "breadcrumbs_gamma0": Differs(median_base, "deltas lost by an empty slice"),
    "breadcrumbs_ties_d09_g02": SUMS,
    "breadcrumbs_ties_d1": SUMS,
    "dare_linear_d1": SUMS,
    "dare_ties_d1": SUMS,
    "della_d0": SUMS,
    "della_d1": SUMS,
    "della_linear_d1": SUMS,
    "karcher": ANGLE,
    "karcher_bf16": BF16,
    "karcher_bf16_f32": ROUNDED,
    "karcher_identical": ANGLE,
    "karcher_opposite": Differs(
        nothing, "the mean of opposite models is zero, not one of the two"
    ),
    "karcher_orthogonal": ANGLE,
    "karcher_tight": ANGLE,
    "linear": SUMS,
    "linear_badshape": Fails(r"down_proj\.weight.* of different shapes", "as mergekit"),
    "linear_base_model_given": Fails(
        r"recipe:3: .*base needs the parameter 'weight': linear averages the base",
        "mergekit fails with a TypeError",
    ),
    "linear_bf16": BF16,
    "linear_bin_input": Fails(
        "pickle format, which can run code", "safetensors only, and how to convert"
    ),
    "linear_f16": F16,
    "linear_filter_first_match": SUMS,
    "linear_filters": SUMS,
    "linear_gradient": SUMS,
    "linear_gradient3": SUMS,
    "linear_identical": SUMS,
    "linear_missing_weight": Fails(
        r"recipe:2: .*ft1 needs the parameter 'weight'\n.*ft2 needs", "as mergekit"
    ),
    "linear_mixed_dtype": SUMS,
    "linear_nan_input": Same("not finite in the same entries, which is then refused"),
    "linear_negative": SUMS,
    "linear_normalize_false": SUMS,
    "linear_sharded_input": SUMS,
    "linear_sum_zero": Differs(plain_difference, "mergekit divides by zero"),
    "linear_sum_zero_nonorm": SUMS,
    "linear_tied": SUMS,
    "linear_unnormed_weights": SUMS,
    "linear_vocab_mismatch": SUMS,
    "lora_linear": SUMS,
    "model_stock": SUMS,
    "model_stock_2": SUMS,
    "model_stock_bf16": BF16,
    "model_stock_filter_wise": SUMS,
    "model_stock_identical": SUMS,
    "model_stock_opposite": Differs(the_base, "mergekit divides by zero"),
    "model_stock_zero_delta": SUMS,
    "modules_syntax": SUMS,
    "multi_chain": Fails(
        "recipe:8: a second recipe starts here", "one recipe per file; see below"
    ),
    "multislerp": SUMS,
    "multislerp_base": SUMS,
    "multislerp_base_unnormalized": SUMS,
    "multislerp_bf16": BF16,
    "multislerp_both_zero_delta": SUMS,
    "multislerp_unnormalized": SUMS,
    "multislerp_zero_delta": SUMS,
    "nearswap_3": Fails(
        "exactly 1 model besides the base_model, found 2", "as mergekit"
    ),
    "nuslerp_bf16_f32": ROUNDED,
    "nuslerp_cols": SUMS,
    "nuslerp_identical": SUMS,
    "nuslerp_orthogonal": SUMS,
    "nuslerp_rows": SUMS,
    "nuslerp_sum_zero": SUMS,
    "nuslerp_zero_delta": Differs(
        lerp_of_a_zero_vector, "mergekit makes the other one longer"
    ),
    "passthrough": COPY,
    "passthrough_scale": SUMS,
    "precedence": SUMS,
    "ram": SUMS,
    "ram_eps": SUMS,
    "ramplus_tl": SUMS,
    "ramplus_tl_r": SUMS,
    "raw_linear": SUMS,
    "raw_missing": Fails("not in m1.safetensors: only_in_3", "as mergekit"),
    "raw_no_parameters": Differs(
        average_of_both, "the global weight counts; mergekit-pytorch fails"
    ),
    "raw_noscalar_intersection": Fails(
        "not in m1.safetensors: only_in_3", "the flag -i is not part of the recipe"
    ),
    "raw_ties": Differs(scalar_too, "mergekit keeps no entry of a scalar, and fails"),
    "sce": SUMS,
    "sce_bf16_f32": ROUNDED,
    "sce_frozen": Differs(without_leading_axis, "mergekit adds an axis"),
    "sce_int8": SUMS,
    "sce_topk0": Fails("select_topk is 0, which selects nothing", "it adds an axis"),
    "sce_topk01": SUMS,
    "sce_zero_delta": SUMS,
    "slerp_bf16": ROUNDED,
    "slerp_far": ANGLE,
    "slerp_identical": ANGLE,
    "slerp_orthogonal": ANGLE,
    "slerp_t0": ANGLE,
    "slerp_t03": ANGLE,
    "slerp_t05": ANGLE,
    "slerp_t1": ANGLE,
    "slices_frankenmerge": COPY,
    "slices_linear": SUMS,
    "slices_uneven": Fails("recipe:4: sources of a slice have 3 and 4", "as mergekit"),
    "ta_badshape": Fails(
        r"down_proj\.weight.* of different shapes", "mergekit skips the model there"
    ),
    "ta_base_listed": SUMS,
    "ta_gradient_filter": SUMS,
    "ta_lambda": SUMS,
    "ta_mixed_dtype": SUMS,
    "ta_mixed_dtype_base_bf16": BF16,
    "ta_negative": SUMS,
    "ta_no_base": Fails("needs a base; add the key 'base_model'", "as mergekit"),
    "ta_normalize": SUMS,
    "ta_out_bf16": ROUNDED,
    "ta_vocab_mismatch": SUMS,
    "ta_zero_delta": SUMS,
    "task_arithmetic_bf16": BF16,
    "task_arithmetic_bf16_f32": ROUNDED,
    "ties_bf16_d05": Differs(
        other_entries_near_the_threshold, "which of equal entries stay is chance there"
    ),
    "ties_bf16_f32": ROUNDED,
    "ties_d0": Differs(the_base, "no model has an entry left; mergekit fails"),
    "ties_d02": SUMS,
    "ties_d05": SUMS,
    "ties_d08_w": SUMS,
    "ties_d1": SUMS,
    "ties_exact_ties_d1": SUMS,
    "ties_example_style": SUMS,
    "ties_identical": SUMS,
    "ties_int8_mask": SUMS,
    "ties_lambda": SUMS,
    "ties_negative_weight": SUMS,
    "ties_normalize_false": SUMS,
    "ties_rescale": SUMS,
    "ties_tiny_density": Differs(
        trimmed_to_one_entry, "one entry of each leaf stays; mergekit fails"
    ),
    "ties_zero_delta": SUMS,
    "tok_union": SUMS,
    "tok_union_ta": SUMS,
    "tok_zero": Differs(one_of_the_tokens_is_zero, "mergekit fails"),
}

WITH_VOCABULARY = (
    *("linear_tied", "linear_vocab_mismatch", "ta_vocab_mismatch"),
    *("tok_union", "tok_union_ta", "tok_zero"),
)


def test_all_cases_are_there():
    assert EXPECTED.keys() == CASES["recipes"].keys()
    assert len(EXPECTED) == 131


@pytest.mark.parametrize("case", EXPECTED)
def test_runs_unchanged(case, root, vocabulary_root):
    expected = EXPECTED[case]
    directory = vocabulary_root if case in WITH_VOCABULARY else root
    if case == "lora_linear":
        directory = root / "lora"

    def run():
        recipe = parse_mergekit(CASES["recipes"][case], directory=directory)
        return carried_out(resolve(recipe), below(case) or None)

    if isinstance(expected, Fails):
        with pytest.raises(ValueError, match=f"(?s){expected.match}"):
            run()
        return
    merged = run()
    if isinstance(expected, Differs):
        expected.check(case, merged)
        return
    assert merged.keys() == below(case).keys()
    near(case, merged, expected)


def near(case, merged, tolerance, where=True):
    for name, got in merged.items():
        want = GOLDEN[f"{case}/{name}"]
        assert str(got.dtype) == CASES["dtypes"][case]
        assert got.shape == want.shape
        got = np.float32(got)
        if tolerance.ulps:
            largest = np.max(np.abs([want, *operands(case, name)]), axis=0)
            last_place = 2.0 ** (np.floor(np.log2(largest)) - 7)
            close = np.abs(got - want) <= tolerance.ulps * last_place
            assert close[where].all(), name
        else:
            rtol, atol = tolerance.rtol, tolerance.atol
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


def operands(case, name):
    models = [
        m for m in ("base", "ft1", "ft2") if f"inputs/{m}" in CASES["recipes"][case]
    ]
    return [np.float32(leaves_of(model)[name]) for model in models]


def test_a_chain_is_run_one_after_another(root, tmp_path):
    first, second = CASES["recipes"]["multi_chain"].split("---\n")
    (tmp_path / "inputs").symlink_to(root / "inputs")
    merged = carried_out(resolve(parse_mergekit(first, directory=tmp_path)))
    cases.write_model(tmp_path / "first", merged)
    merged = carried_out(resolve(parse_mergekit(second, directory=tmp_path)))
    near("multi_chain", merged, SUMS)


@pytest.mark.parametrize("case", CASES["expect"])
def test_random_methods_have_mergekits_moments(case, root):
    plan = resolve(parse_mergekit(CASES["expect"][case], directory=root))
    names = below(f"expect/{case}/mean").keys()
    draws = 1000
    for part in plan.parts:
        mine = [name for name in part.steps if name in names]
        base = {name: part.inputs.base.read(name) for name in mine}
        models = [{n: m.read(n) for n in mine} for m in part.inputs.models.values()]
        function = methods()[part.recipe.method].function

        @jax.jit
        def moments(keys, base=base, models=models, function=function, part=part):
            merged = jax.lax.map(
                lambda key: function(base, models, key=key, **part.recipe.options),
                keys,
                batch_size=50,
            )
            return jax.tree.map(lambda x: (x.mean(0), x.std(0)), merged)

        drawn = moments(jax.random.split(jax.random.key(0), draws))
        for name, (mean, std) in drawn.items():
            want_mean, want_std = (
                GOLDEN[f"expect/{case}/{moment}/{name}"] for moment in ("mean", "std")
            )
            spread = want_std * np.sqrt(1 / draws + 1 / 4000) + 1e-7
            error = (mean - want_mean) / spread
            assert jnp.abs(error).max() < 5.5
            # Four standard errors of a mean of so many squares.
            assert abs(jnp.square(error).mean() - 1) < 4 * np.sqrt(2 / error.size)
            np.testing.assert_allclose(std.mean(), want_std.mean(), rtol=0.02)
