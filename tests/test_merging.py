"""Merging checkpoints: equal to the method in memory, and every refusal."""

import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3

import jaxmerge
from jaxmerge.checkpoints import CheckpointError, open_checkpoint, save, writer
from jaxmerge.merging import merge_checkpoints
from jaxmerge.planning import MergeError
from jaxmerge.recipes import Recipe, RecipeError
from jaxmerge.registry import methods

NAMES = ("math", "code")


def make_tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"kernel": rng.normal(size=(12, 4)).astype(dtype)},
        "layer_0": {
            "kernel": rng.normal(size=(4, 6)).astype(dtype),
            "bias": rng.normal(size=6).astype(dtype),
        },
        "layer_1": {
            "kernel": rng.normal(size=(4, 6)).astype(dtype),
            "bias": rng.normal(size=6).astype(dtype),
        },
        "steps": np.array(seed, np.int32),
    }


@pytest.fixture
def trees():
    return {name: make_tree(i) for i, name in enumerate(("base", *NAMES))}


@pytest.fixture
def runs(tmp_path, trees):
    for name, tree in trees.items():
        save(tmp_path / name, tree)
    return tmp_path


def recipe_for(runs, method="task_arithmetic", models=NAMES, **fields):
    base = runs / "base" if methods()[method].needs_base else None
    return Recipe(method, {name: runs / name for name in models}, base=base, **fields)


def replace(runs, name, tree):
    (runs / name / "model.safetensors").unlink()
    (runs / name).rmdir()
    save(runs / name, tree)


def assert_nothing_left(runs):
    assert not [path for path in runs.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {"weights": [1, 3]}),
        ("task_arithmetic", {"scale": {".*bias": 0.0, "layer_0.*": 0.5, ".*": 2.0}}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "scope": "model"}),
        ("dare", {"density": 0.5}),
    ],
)
def test_equals_the_method_in_memory(runs, trees, method, options):
    recipe = recipe_for(runs, method, options=options)
    merge_checkpoints(recipe, runs / "out")
    base, *models = trees.values()
    if methods()[method].needs_key:
        options = options | {"key": 0, "names": list(NAMES)}
    arguments = (base, models) if methods()[method].needs_base else (models,)
    expected = methods()[method].function(*arguments, **options)
    jax.tree.map(np.testing.assert_array_equal, jaxmerge.load(runs / "out"), expected)


def test_random_draws_depend_on_names_and_seed_alone(runs, trees):
    options = {"density": 0.5}

    def merged(out, **fields):
        merge_checkpoints(recipe_for(runs, "dare", options=options, **fields), out)
        return jaxmerge.load(out)["embed"]["kernel"]

    first = merged(runs / "out1", seed=7)
    other_seed = merged(runs / "out2", seed=8)
    for name, tree in trees.items():
        replace(runs, name, dict(reversed(tree.items())))
    other_order = merged(runs / "out3", seed=7, models=NAMES[::-1])
    np.testing.assert_allclose(other_order, first, rtol=1e-5, atol=1e-6)
    assert not np.allclose(other_seed, first)


def test_output_dtype_is_rounded_to_once(runs, trees):
    for name in trees:
        replace(runs, name, make_tree(len(name), ml_dtypes.bfloat16))
    merge_checkpoints(recipe_for(runs, "average", dtype="float32"), runs / "out")
    out = jaxmerge.load(runs / "out")
    math, code = (jaxmerge.load(runs / name)["embed"]["kernel"] for name in NAMES)
    expected = (math.astype(np.float32) + code.astype(np.float32)) / 2
    np.testing.assert_array_equal(out["embed"]["kernel"], expected)
    assert out["steps"].dtype == np.int32


def test_bfloat16_output_in_shards(runs, trees):
    recipe = recipe_for(runs, "average", dtype="bfloat16", max_shard_bytes=100)
    report = merge_checkpoints(recipe, runs / "out")
    assert len(list((runs / "out").glob("model-*-of-*.safetensors"))) > 1
    out = open_checkpoint(runs / "out")
    assert out.leaves["embed/kernel"].dtype == ml_dtypes.bfloat16
    expected = jaxmerge.average([trees["math"], trees["code"]])["embed"]["kernel"]
    np.testing.assert_array_equal(
        out.read("embed/kernel"), np.asarray(expected).astype(ml_dtypes.bfloat16)
    )
    assert report["leaves"]["embed/kernel"]["dtype_out"] == "bfloat16"
    assert report["leaves"]["embed/kernel"]["dtype_in"] == "float32"


def test_report(runs, trees):
    recipe = recipe_for(runs, options={"weights": [1.0, 0.0]}, take={"embed.*": "base"})
    report = merge_checkpoints(recipe, runs / "out")
    assert json.loads((runs / "out/jaxmerge_report.json").read_text()) == report
    (part,) = report["parts"]
    assert part["method"] == "task_arithmetic"
    effective = {"weights": [1.0, 0.0], "scale": 1.0, "normalize": False}
    assert part["options"] == effective
    assert report["versions"]["jax"] == jax.__version__
    assert report["versions"]["jaxmerge"] == jaxmerge.__version__
    content = (runs / "code/model.safetensors").read_bytes()
    assert list(part["models"]) == list(NAMES)
    assert part["models"]["code"] == str((runs / "code").resolve())
    assert report["blake3"][str((runs / "code").resolve())] == {
        "model.safetensors": blake3(content).hexdigest()
    }
    assert report["totals"]["treatments"] == {
        "merged": 4,
        "taken: base": 1,
        "copied: integer": 1,
    }
    leaf = report["leaves"]["layer_0/kernel"]
    base = trees["base"]["layer_0"]["kernel"].astype(np.float64)
    delta = trees["math"]["layer_0"]["kernel"] - base
    assert leaf["treatment"] == "merged"
    assert leaf["base_norm"] == pytest.approx(np.linalg.norm(base), rel=1e-6)
    assert leaf["task_vector_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert report["leaves"]["embed/kernel"]["task_vector_norm"] is None
    merged = [x for x in report["leaves"].values() if x["treatment"] == "merged"]
    assert report["totals"]["task_vector_norm"] == pytest.approx(
        np.linalg.norm([x["task_vector_norm"] for x in merged])
    )


def test_report_of_leaves_that_a_matrix_method_treats_by_policy(runs, trees):
    options = {"others": "task_arithmetic", "fused": {"layer_0/kernel": 2}}
    recipe = recipe_for(runs, method="tsv_merge", options=options)
    report = merge_checkpoints(recipe, runs / "out")
    by_path = {name: leaf["treatment"] for name, leaf in report["leaves"].items()}
    assert by_path["layer_0/kernel"] == "merged"
    assert by_path["embed/kernel"] == "merged"
    assert by_path["layer_0/bias"] == "no matrix: task_arithmetic"


def test_sidecars_come_from_the_base_with_the_new_dtype(runs):
    (runs / "base/config.json").write_text('{"torch_dtype": "float32", "layers": 2}')
    (runs / "base/tokenizer.json").write_text("{}")
    (runs / "math/config.json").write_text('{"layers": 3}')
    merge_checkpoints(recipe_for(runs, dtype="float16"), runs / "out")
    config = json.loads((runs / "out/config.json").read_text())
    assert config == {"torch_dtype": "float16", "layers": 2}
    assert (runs / "out/tokenizer.json").read_text() == "{}"
    merge_checkpoints(recipe_for(runs), runs / "out2")
    same = (runs / "base/config.json").read_bytes()
    assert (runs / "out2/config.json").read_bytes() == same


def test_progress_ends_at_the_size_of_the_output(runs):
    calls = []
    merge_checkpoints(
        recipe_for(runs), runs / "out", progress=lambda *a: calls.append(a)
    )
    out = open_checkpoint(runs / "out")
    size = sum(info.nbytes for info in out.leaves.values())
    assert {total for _, total, _ in calls} == {size}
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == size
    assert {name for _, _, name in calls} == out.leaves.keys()


def test_take_rules(runs, trees):
    trees["base"]["head"] = {"kernel": np.full((2, 2), 1, np.float32)}
    trees["code"]["head"] = {"kernel": np.full((3, 2), 2, np.float32)}
    trees["code"]["extra"] = np.full(2, 3, np.float32)
    trees["math"]["scratch"] = np.ones(2, np.float32)
    for name, tree in trees.items():
        replace(runs, name, tree)
    take = {
        "head/.*": "base",
        "extra": "first",
        "scratch": "skip",
        "layer_1/bias": "first",
        ".*/bias": "base",
    }
    report = merge_checkpoints(recipe_for(runs, take=take), runs / "out")
    out = jaxmerge.load(runs / "out")
    np.testing.assert_array_equal(out["head"]["kernel"], np.full((2, 2), 1))
    np.testing.assert_array_equal(out["extra"], [3, 3])
    assert "scratch" not in out
    assert report["leaves"]["scratch"]["treatment"] == "skipped"
    for layer, source in (("layer_0", "base"), ("layer_1", "math")):
        expected = trees[source][layer]["bias"]
        np.testing.assert_array_equal(out[layer]["bias"], expected)


def test_leaves_that_differ_are_listed_with_rules_to_paste(runs, trees):
    trees["math"]["embed"]["kernel"] = np.zeros((13, 4), np.float32)
    del trees["code"]["layer_0"], trees["code"]["layer_1"]
    trees["code"]["head.v2"] = np.zeros(3, np.float32)
    for name, tree in trees.items():
        replace(runs, name, tree)
    with pytest.raises(MergeError) as caught:
        merge_checkpoints(recipe_for(runs), runs / "out")
    message = str(caught.value)
    assert "recipe: 6 of 7 leaves cannot be merged" in message
    assert (
        "  of different shapes: base [12, 4], models[0] (math) [13, 4], "
        "models[1] (code) [12, 4]:\n    embed/kernel\n"
    ) in message
    assert "  in base, models[0] (math), but not in models[1] (code):\n" in message
    rules = message.partition("take:\n")[2].splitlines()
    assert set(rules) == {
        r"  'embed/kernel': base",
        r"  'layer_\d+/kernel': base",
        r"  'layer_\d+/bias': base",
        r"  'head\.v\d+': first",
    }
    take = dict(rule.strip().replace("'", "").split(": ") for rule in rules)
    assert_nothing_left(runs)
    with pytest.raises(MergeError, match="no floating-point leaf is left to merge"):
        merge_checkpoints(recipe_for(runs, take=take), runs / "out")


def test_suggested_rules_spare_leaves_that_can_be_merged(runs, trees):
    trees["math"]["layer_1"]["bias"] = np.zeros(7, np.float32)
    replace(runs, "math", trees["math"])
    with pytest.raises(MergeError, match=r"take:\n  'layer_1/bias': base$"):
        merge_checkpoints(recipe_for(runs), runs / "out")


def test_a_long_list_is_cut(runs, trees):
    extra = {chr(97 + i) * 3: np.zeros(1, np.float32) for i in range(25)}
    replace(runs, "math", trees["math"] | extra)
    with pytest.raises(MergeError, match=r"(?s)25 of .*    ttt\n  and 5 more\n"):
        merge_checkpoints(recipe_for(runs), runs / "out")


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (np.zeros(6, np.int32), "of different kinds: base float32"),
        (np.zeros(6, ml_dtypes.float8_e4m3fn), "float8, which is meaningless without"),
        (np.zeros(6, np.complex64), "different kinds"),
    ],
)
def test_leaves_of_kinds_that_are_not_merged(runs, trees, leaf, reason):
    trees["math"]["layer_0"]["bias"] = leaf
    replace(runs, "math", trees["math"])
    with pytest.raises(MergeError, match=reason):
        merge_checkpoints(recipe_for(runs), runs / "out")


@pytest.mark.parametrize(
    ("owner", "action", "message"),
    [
        ("math", "base", "to be taken from the base, which has not got it"),
        ("base", "first", "to be taken from the first model that has it, but none has"),
    ],
)
def test_taking_from_where_it_is_not(runs, trees, owner, action, message):
    replace(runs, owner, trees[owner] | {"head": np.zeros(2, np.float32)})
    with pytest.raises(MergeError, match=message):
        merge_checkpoints(recipe_for(runs, take={"head": action}), runs / "out")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"take": {"layer_9.*": "base"}}, "take"),
        ({"options": {"scale": {"layer_9.*": 1, ".*": 2}}}, "option scale"),
    ],
)
def test_a_rule_that_matches_no_leaf(runs, fields, where):
    with pytest.raises(
        MergeError, match=rf"{where}: the rule 'layer_9\.\*' matches no leaf.*such as"
    ):
        merge_checkpoints(recipe_for(runs, **fields), runs / "out")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": 1.5}, r"ties: density.* is 1.5; it must be in \(0, 1\]"),
        (
            "task_arithmetic",
            {"scale": {"embed.*": 1}},
            "no rule matches the whole path",
        ),
    ],
)
def test_bad_options_are_found_before_a_value_is_read(
    runs, monkeypatch, method, options, message
):
    def refuse(*arguments):
        raise AssertionError("a value was read")

    monkeypatch.setattr(
        "jaxmerge.checkpoints.huggingface.HuggingFaceDirectory.read", refuse
    )
    with pytest.raises(MergeError, match=message):
        merge_checkpoints(recipe_for(runs, method, options=options), runs / "out")
    assert_nothing_left(runs)


def test_a_missing_checkpoint(runs):
    with pytest.raises(CheckpointError, match="physics does not exist"):
        merge_checkpoints(recipe_for(runs, models=["math", "physics"]), runs / "out")


def test_a_truncated_file(runs):
    path = runs / "code/model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"code/model.safetensors is truncated"):
        merge_checkpoints(recipe_for(runs), runs / "out")


def test_an_input_that_is_not_finite(runs, trees):
    kernel = trees["code"]["layer_1"]["kernel"]
    kernel[0, :3] = np.nan
    kernel[1, 0] = -np.inf
    replace(runs, "code", trees["code"])
    with pytest.raises(
        MergeError,
        match=r"leaf 'layer_1/kernel' comes out not finite: "
        r"models\[1\] \(code\) has 3 NaN, 1 inf\. Repair",
    ):
        merge_checkpoints(recipe_for(runs), runs / "out")
    assert_nothing_left(runs)


EVERY_METHOD = [m for m in methods().values() if not m.needs_statistics]


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.name)
@pytest.mark.parametrize("where", [0, slice(None)], ids=["one", "all"])
def test_no_method_lets_a_nan_disappear(runs, trees, method, where):
    trees["math"]["layer_1"]["kernel"].reshape(-1)[where] = np.nan
    replace(runs, "math", trees["math"])
    models = NAMES[: method.max_models]
    with pytest.raises(MergeError, match=r"'layer_1/kernel'.*\(math\) has \d+ NaN"):
        merge_checkpoints(recipe_for(runs, method.name, models), runs / "out")
    assert_nothing_left(runs)


def test_leaves_that_are_taken_must_be_finite_too(runs, trees):
    trees["math"]["layer_1"]["kernel"][0, 0] = np.nan
    replace(runs, "math", trees["math"])
    take = {"layer_1/kernel": "first"}
    with pytest.raises(MergeError, match=r"\(math\) has 1 NaN"):
        merge_checkpoints(recipe_for(runs, take=take), runs / "out")
    assert_nothing_left(runs)
    merge_checkpoints(recipe_for(runs, take={"layer_1/kernel": "base"}), runs / "out")


def test_float64_checkpoints_are_merged_in_float64(runs, trees):
    for name in trees:
        trees[name] = jax.tree.map(np.float64, trees[name])
    trees["math"]["layer_0"]["bias"] += 1e-12
    for name, tree in trees.items():
        replace(runs, name, tree)
    recipe = recipe_for(runs, "average", options={"weights": [1, 3]})
    merge_checkpoints(recipe, runs / "out")
    want = (trees["math"]["layer_0"]["bias"] + 3 * trees["code"]["layer_0"]["bias"]) / 4
    got = jaxmerge.load(runs / "out")["layer_0"]["bias"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_rules_of_each_model_are_checked(runs):
    weights = [{".*": 1.0}, {"layer_9.*": 0.5, ".*": 1.0}]
    recipe = recipe_for(runs, options={"weights": weights})
    with pytest.raises(
        MergeError, match=r"option weights: the rule 'layer_9\.\*' matches"
    ):
        merge_checkpoints(recipe, runs / "out")
    with pytest.raises(RecipeError, match="no valid regular expression"):
        recipe_for(runs, options={"weights": [{"(": 1.0}, 1.0]})


def test_options_that_overflow(runs):
    recipe = recipe_for(runs, options={"scale": 1e38, "weights": 10.0})
    with pytest.raises(
        MergeError, match="all inputs are finite, so the options of task"
    ):
        merge_checkpoints(recipe, runs / "out")
    assert_nothing_left(runs)


@pytest.mark.parametrize("take", [{}, {"layer_0/bias": "first"}])
def test_a_dtype_that_is_too_small(runs, trees, take):
    for name in NAMES:
        trees[name]["layer_0"]["bias"][:] = 1e5
        replace(runs, name, trees[name])
    recipe = recipe_for(runs, "average", dtype="float16", take=take)
    with pytest.raises(
        MergeError,
        match="'layer_0/bias' has entries up to 100000, too large for float16",
    ):
        merge_checkpoints(recipe, runs / "out")
    assert_nothing_left(runs)


def test_an_existing_output_is_refused_before_the_inputs(runs):
    (runs / "out").mkdir()
    recipe = recipe_for(runs, models=["physics"])
    with pytest.raises(FileExistsError, match="out exists already; remove it"):
        merge_checkpoints(recipe, runs / "out")


def test_a_full_disk_leaves_nothing_behind(runs, monkeypatch):
    writes = []

    def full(*arguments):
        writes.append(arguments)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_at", full)
    with pytest.raises(OSError, match="No space left on device"):
        merge_checkpoints(recipe_for(runs), runs / "out")
    assert len(writes) >= 3
    assert_nothing_left(runs)


def test_a_config_that_is_no_json(runs):
    (runs / "base/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        merge_checkpoints(recipe_for(runs, dtype="float16"), runs / "out")
    assert_nothing_left(runs)


def test_no_more_than_one_leaf_is_read_at_a_time(runs, monkeypatch):
    """Bounded memory: a leaf of every input is read before the next one, not all."""
    from jaxmerge.checkpoints.huggingface import HuggingFaceDirectory

    read, log = HuggingFaceDirectory.read, []

    def logged(self, name, *index):
        log.append(name)
        return read(self, name, *index)

    monkeypatch.setattr(HuggingFaceDirectory, "read", logged)
    monkeypatch.setattr("jaxmerge.streaming.WORKERS", 1)
    merge_checkpoints(recipe_for(runs), runs / "out")
    changes = [a for a, b in zip(log, [*log[1:], ""], strict=True) if a != b]
    assert len(changes) == len(set(log))
