"""Stores from end to end: what comes out, what is read, and what damage does."""

import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.compression import (
    StoreError,
    add_task,
    binarise,
    create_store,
    debinarise,
    dequantise,
    open_store,
    predicted_bits,
    quantise,
)
from jaxmerge.compression import files as store_files
from jaxmerge.compression.reading import StoreFiles
from jaxmerge.methods.masking import apply_mask as keep_masked
from jaxmerge.methods.masking import tall_masks

TASKS = ("math", "code", "law")
KINDS = ("tall", "emr", "tsv", "tvq", "rtvq", "bitdelta")


def trees(seed=0, dtype=np.float32, width=24):
    """A base and three models: one leaf is frozen, one is changed by one task alone."""
    rng = np.random.default_rng(seed)

    def tree(scale):
        draw = {
            "block/kernel": (width, 16),
            "block/bias": (13,),
            "norm/scale": (),
            "frozen/kernel": (5, 3),
            "head/kernel": (16, 10),
            "steps": (2,),
        }
        return {n: scale * rng.normal(size=shape) for n, shape in draw.items()}

    base = tree(1.0)
    base["steps"] = np.array([1, 2])
    models = {}
    for task in TASKS:
        moves = tree(0.1)
        model = {n: base[n] + moves[n] for n in base}
        model |= {n: base[n] for n in ("frozen/kernel", "steps")}
        if task != "math":
            model["head/kernel"] = base["head/kernel"]
        models[task] = model
    models["law"]["steps"] = np.array([1, 7])

    def cast(tree):
        return {
            n: x.astype(np.int32 if n == "steps" else dtype) for n, x in tree.items()
        }

    return cast(base), {task: cast(model) for task, model in models.items()}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flat(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_trees_equal(a, b, **tolerance):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype, name
        if tolerance:
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def made(tmp_path):
    base, models = trees()
    create_store(tmp_path / "store", base, models)
    return tmp_path / "store", base, models


@pytest.mark.parametrize(
    ("multi_task", "scope"),
    [("task_arithmetic", "leaf"), ("ties", "leaf"), ("ties", "model")],
)
def test_tall_masks_are_those_of_the_method(tmp_path, multi_task, scope):
    base, models = trees()
    thresholds = {"math": 0.2, "code": 0.4, "law": 0.6}
    path, mixed = tmp_path / "store", {"multi_task": multi_task, "scope": scope}
    create_store(path, base, models, threshold=thresholds, **mixed)
    store = open_store(path)
    assert (store.kind, store.tasks) == ("tall", sorted(TASKS))
    floats = {n: x for n, x in base.items() if n != "steps"}
    of_floats = [{n: models[t][n] for n in floats} for t in TASKS]
    masks = tall_masks(floats, of_floats, threshold=list(thresholds.values()), **mixed)
    if multi_task == "ties":
        signs = {"vote": "mass", "tie": "majority", "aggregate": "sum"}
        merged = jaxmerge.ties(floats, of_floats, scope=scope, **signs)
    else:
        merged = jaxmerge.task_arithmetic(floats, of_floats)
    for task, mask in zip(TASKS, masks, strict=True):
        expected = keep_masked(floats, merged, mask) | {"steps": models[task]["steps"]}
        assert_trees_equal(store.params(task), nested(expected), rtol=1e-5, atol=1e-6)


def test_emr_is_that_of_the_paper(tmp_path):
    base = {"w": np.zeros(8)}  # 0.2 + 0.1 - 0.3 is positive in float64 alone.
    deltas = {
        "a": [1, -2, 0.5, 0, 3, -0.1, 0.2, -4],
        "b": [0.8, 1.5, -0.5, 0, -2, -0.3, 0.1, 0.4],
        "c": [-0.2, 1, 0.7, 0, 2.5, 0.6, -0.3, 0.5],
    }
    unified = np.array([1, 1.5, 0.7, 0, 3, 0.6, 0.2, -4])
    masks = {"a": "10101011", "b": "11000010", "c": "01101100"}
    scales = {"a": 1.213483, "b": 2.074074, "c": 1.0}
    models = {task: {"w": np.array(delta)} for task, delta in deltas.items()}
    create_store(tmp_path / "store", base, models, kind="emr")
    store = open_store(tmp_path / "store")
    for task, bits in masks.items():
        kept = unified * np.array([int(bit) for bit in bits])
        moved = store.params(task)["w"]
        np.testing.assert_allclose(moved, scales[task] * kept, rtol=1e-6)
        assert np.abs(moved).sum() == pytest.approx(np.abs(deltas[task]).sum())


def test_emr_scales_are_of_the_whole_model(tmp_path):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind="emr")
    params = flat(open_store(tmp_path / "store").params("code"))
    moved = sum(np.abs(params[n] - x).sum() for n, x in base.items() if n != "steps")
    norm = sum(np.abs(models["code"][n] - base[n]).sum() for n in base if n != "steps")
    assert moved == pytest.approx(norm, rel=1e-4)


def test_tsv_is_that_of_tsv_compress(tmp_path):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind="tsv", rank=2)
    store = open_store(tmp_path / "store")
    floats = {n: x for n, x in base.items() if n != "steps"}
    of_floats = [{n: models[t][n] for n in floats} for t in TASKS]
    adapters = jaxmerge.tsv_compress(floats, of_floats, rank=2)
    for task, adapter in zip(TASKS, adapters, strict=True):
        expected = jaxmerge.apply_adapter(floats, adapter)
        expected["steps"] = models[task]["steps"]
        assert_trees_equal(store.params(task), nested(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tvq", "bitdelta"])
def test_quantised_kinds(tmp_path, kind):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind=kind)
    params = flat(open_store(tmp_path / "store").params("math"))
    for name, model in models["math"].items():
        delta = model - base[name]
        if name in ("frozen/kernel", "steps"):
            expected = model
        elif kind == "tvq":
            expected = base[name] + dequantise(quantise(delta, bits=4), delta.shape)
        elif delta.ndim == 2:
            expected = base[name] + debinarise(binarise(delta), delta.shape)
        else:
            expected = model
        np.testing.assert_allclose(params[name], expected, rtol=1e-6, err_msg=name)


def test_rtvq_codes_the_mean_and_what_is_left(tmp_path):
    base, models = trees()
    bits = {"bits": 3, "shared_bits": 4}
    create_store(tmp_path / "store", base, models, kind="rtvq", **bits)
    store = open_store(tmp_path / "store")
    for name, changed_by in (("block/kernel", TASKS), ("head/kernel", ["math"])):
        deltas = {task: models[task][name] - base[name] for task in changed_by}
        shape = base[name].shape
        mean = sum(deltas.values()) / len(deltas)
        offset = dequantise(quantise(mean, bits=4), shape)
        for task, delta in deltas.items():
            rest = dequantise(quantise(delta - offset, bits=3), shape)
            params = flat(store.params(task))[name]
            expected = base[name] + offset + rest
            np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_task_does_not_change_is_the_base(tmp_path, kind):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind=kind)
    store = open_store(tmp_path / "store")
    code, law = (flat(store.params(task)) for task in ("code", "law"))
    for name in ("frozen/kernel", "head/kernel"):
        np.testing.assert_array_equal(code[name], base[name])
        assert code[name] is law[name]
    np.testing.assert_array_equal(law["steps"], [1, 7])
    np.testing.assert_array_equal(code["steps"], [1, 2])
    assert "head/kernel" in store.files.task("math").entries
    assert "head/kernel" not in store.files.task("code").entries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_dtypes_come_back(tmp_path, kind, dtype):
    base, models = trees(dtype=dtype)
    create_store(tmp_path / "store", base, models, kind=kind)
    store = open_store(tmp_path / "store")
    store.extract("math", tmp_path / "out")
    out = flat(jaxmerge.load(tmp_path / "out"))
    for name, leaf in out.items():
        assert leaf.dtype == base[name].dtype
        error = np.abs(leaf.astype(float) - models["math"][name].astype(float))
        assert error.max() < 1.0
    narrow = np.float32 if dtype == np.float64 else dtype
    for name, leaf in flat(store.params("math")).items():
        assert leaf.dtype == (np.int32 if name == "steps" else narrow)
        np.testing.assert_allclose(
            leaf.astype(np.float32), out[name].astype(np.float32), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("kind", KINDS)
def test_extracted_checkpoints_are_the_parameters(tmp_path, kind):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind=kind)
    store = open_store(tmp_path / "store")
    seen = []
    store.extract("law", tmp_path / "out", progress=lambda *told: seen.append(told))
    assert_trees_equal(jaxmerge.load(tmp_path / "out"), store.params("law"))
    assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in base.values())
    report = json.loads((tmp_path / "out/jaxmerge_report.json").read_text())
    assert (report["kind"], report["task"]["name"]) == (kind, "law")
    with pytest.raises(FileExistsError):
        store.extract("law", tmp_path / "out")


def test_checkpoints_go_in_with_their_sidecars(tmp_path):
    base, models = trees()
    jaxmerge.save(tmp_path / "base", nested(base))
    (tmp_path / "base/config.json").write_text("{}")
    for task, model in models.items():
        jaxmerge.save(tmp_path / task, nested(model))
    paths = {task: tmp_path / task for task in models}
    create_store(tmp_path / "store", tmp_path / "base", paths)
    create_store(tmp_path / "same", base, models)
    store = open_store(tmp_path / "store")
    for task in models:
        same = open_store(tmp_path / "same").params(task)
        assert_trees_equal(store.params(task), same)
    store.extract("math", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == "{}"
    made = store.files.task("math").document["made"]
    assert made["from"] == str(tmp_path / "math")
    assert made["blake3"] == jaxmerge.open_checkpoint(tmp_path / "math").digest()
    assert_trees_equal(jaxmerge.load(tmp_path / "store/base"), nested(base))
    vector = flat(jaxmerge.load(tmp_path / "store/shared.safetensors"))
    assert sorted(vector) == ["block/bias", "block/kernel", "head/kernel", "norm/scale"]


def test_identical_disjoint_and_single_tasks(tmp_path):
    base = {"w": np.zeros(6, np.float32)}
    single = {"a": {"w": np.array([1, 0, 2, 0, -3, 0], np.float32)}}
    disjoint = single | {"b": {"w": np.array([0, 5, 0, 6, 0, 0], np.float32)}}
    identical = {str(i): single["a"] for i in range(7)}
    for kind in ("tall", "emr"):
        for name, models in (("single", single), ("disjoint", disjoint)):
            create_store(tmp_path / kind / name, base, models, kind=kind)
            store = open_store(tmp_path / kind / name)
            for task in models:
                assert_trees_equal(store.params(task), models[task])
        create_store(tmp_path / kind / "same", base, identical, kind=kind)
        params = open_store(tmp_path / kind / "same").params("3")["w"]
        # TALL-masks of identical tasks are empty; EMR keeps them exactly.
        expected = base if kind == "tall" else single["a"]
        np.testing.assert_array_equal(params, expected["w"])


def test_models_equal_to_the_base(tmp_path):
    base, _ = trees()
    create_store(tmp_path / "store", base, {"same": base})
    store = open_store(tmp_path / "store")
    assert_trees_equal(store.params("same"), nested(base))
    store.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_stores(tmp_path, mesh, kind):
    base, models = trees(width=32)
    create_store(tmp_path / "store", base, models, kind=kind)
    rules = {"block/kernel": P("data", "model"), "head/kernel": P("model"), ".*": P()}
    whole = open_store(tmp_path / "store")
    store = open_store(tmp_path / "store", mesh, rules)
    for task in TASKS[::2]:
        params = store.params(task)
        kernel = params["block"]["kernel"]
        assert kernel.sharding.spec == P("data", "model")
        assert_trees_equal(params, whole.params(task), rtol=1e-5, atol=1e-6)
    if kind in ("tall", "emr"):
        seal = store.files.task("math").document["seal"]
        bits = store._parts[seal]["block/kernel"]["bits"]
        assert (bits.dtype, bits.shape) == (np.uint8, (32, 2))
        assert bits.sharding.spec == P("data", "model")


def test_rules_without_a_mesh(made):
    with pytest.raises(ValueError, match="no effect without a mesh"):
        open_store(made[0], rules={".*": P()})


def test_switching_reads_no_base_again(made, monkeypatch):
    path, _, _ = made
    store = open_store(path)
    read, names = StoreFiles.read_base, []

    def counted(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(StoreFiles, "read_base", counted)
    first = store.params("math")
    assert sorted(names) == sorted(store.files.leaves)
    shutil.rmtree(path / "base")
    (path / "shared.safetensors").unlink()
    store.params("code")
    (path / "tasks/math/leaves.bin").unlink()
    assert_trees_equal(store.params("math"), first)
    assert len(names) == len(store.files.leaves)


def test_memory_does_not_change_with_the_files(made):
    path, _, _ = made
    store = open_store(path)
    before = jax.tree.map(np.array, store.params("math"))
    for file in path.rglob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(-600, 2)
            opened.write(bytes(600))
    assert_trees_equal(store.params("math"), before)


def test_switching_compiles_nothing(made, compilations):
    store = open_store(made[0])
    store.params("math")
    store.params("code")
    before = len(compilations)
    store.params("law")
    store.params("math")
    assert len(compilations) == before


def damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_every_flipped_byte_is_noticed(made):
    path, _, _ = made
    place = path / "tasks/math/leaves.bin"
    whole = place.read_bytes()
    for offset in range(0, len(whole), 7):
        damage(place, offset)
        with pytest.raises(StoreError, match=r"task 'math' is damaged at leaf '\w"):
            open_store(path).params("math")
        place.write_bytes(whole)


@pytest.mark.parametrize("file", ["base/model.safetensors", "shared.safetensors"])
def test_flipped_bytes_of_what_tasks_share(made, tmp_path, file):
    path, _, _ = made
    size = (path / file).stat().st_size
    part = "the base" if file[0] == "b" else "the shared vector"
    damage(path / file, size - 100)
    for use in (
        lambda store: store.params("math"),
        lambda store: store.extract("math", tmp_path / "out"),
        lambda store: store.verify(),
    ):
        with pytest.raises(StoreError, match=f"{part} is damaged at leaf '"):
            use(open_store(path))
    assert not (tmp_path / "out").exists()
    damage(path / file, size - 100)
    open_store(path).verify()


@pytest.mark.parametrize("kind", ["tall", "rtvq"])
def test_no_flipped_byte_of_any_file_goes_unnoticed(tmp_path, kind):
    base, models = trees(width=8)
    path = tmp_path / "store"
    create_store(path, base, models, kind=kind)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert len(files) == 3 + 2 * len(models)
    leaves = {leaf: np.asarray(x) for leaf, x in base.items()}
    for file in files:
        whole = file.read_bytes()
        for offset in range(0, len(whole), 29):
            damage(file, offset)
            try:
                open_store(path).verify()
            except StoreError as error:
                # In values, the leaf; in lists and headers, at least the file.
                told = str(error)
                assert any(f"leaf '{leaf}'" in told for leaf in leaves) or (
                    file.name in told or "the base is damaged" in told
                )
            else:  # The format's own metadata, which no value depends on.
                header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
                start = header.index(b'"__metadata__"')
                assert start <= offset - 8 < header.index(b"}", start)
            file.write_bytes(whole)


def test_damaged_files_beside_the_base(tmp_path):
    base, models = trees()
    jaxmerge.save(tmp_path / "base", nested(base))
    (tmp_path / "base/config.json").write_text('{"width": 16}')
    path = tmp_path / "store"
    create_store(path, tmp_path / "base", models)
    damage(path / "base/config.json", 11)
    store = open_store(path)
    for use in (store.verify, lambda: store.extract("law", tmp_path / "out")):
        with pytest.raises(StoreError, match=r"config\.json is missing or damaged"):
            use()
    assert not (tmp_path / "out").exists()


def test_renamed_and_reshaped_leaves_of_the_base_are_noticed(made):
    path, _, _ = made
    file = path / "base/model.safetensors"
    whole = file.read_bytes()
    for old, new in (
        (b"block/bias", b"black/bias"),
        (b"[24,16]", b"[16,24]"),
        (b'"I32"', b'"F32"'),
    ):
        assert whole.count(old) == 1
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(StoreError, match="names, shapes or dtypes of leaves"):
            open_store(path)


def test_headers_that_lie(made):
    path, _, _ = made
    file = path / "base/model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(StoreError, match="damaged"):
        open_store(path).params("math")


@pytest.mark.parametrize("left", [0, 1, 40])
def test_truncated_tasks(made, left):
    path, _, _ = made
    place = path / "tasks/code/leaves.bin"
    place.write_bytes(place.read_bytes()[:left])
    with pytest.raises(StoreError, match=r"task 'code' .* leaf '.*truncated"):
        open_store(path).params("code")
    open_store(path).params("math")


@pytest.mark.parametrize("file", ["shared.safetensors", "base/model.safetensors"])
def test_truncated_vectors(made, file):
    path, _, _ = made
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:-5])
    with pytest.raises(StoreError, match=r"damaged.*leaf '.*' ends at byte"):
        open_store(path).params("math")


@pytest.mark.parametrize("name", ["store.json", "tasks/law/task.json"])
def test_edited_lists(made, name):
    path, _, _ = made
    text = (path / name).read_text()
    (path / name).write_text(text.replace("0.4", "0.5"))
    with pytest.raises(StoreError, match=f"{Path(name).name} is damaged or was edited"):
        open_store(path).params("law")
    (path / name).write_text(text[:-9])
    with pytest.raises(StoreError, match="no JSON"):
        open_store(path).params("law")
    (path / name).unlink()
    with pytest.raises(StoreError):
        open_store(path).params("law")


def test_verify_lists_all_damage(made):
    path, _, _ = made
    open_store(path).verify()
    damage(path / "tasks/math/leaves.bin", 2)
    damage(path / "base/model.safetensors", -3)
    (path / "tasks/law/task.json").write_text("[]")
    with pytest.raises(StoreError) as caught:
        open_store(path).verify()
    assert len(str(caught.value).splitlines()) == 3
    for text in ("the base", "'math'", "law"):
        assert text in str(caught.value)


def test_tasks_of_other_stores_are_refused(made, tmp_path):
    path, base, models = made
    create_store(tmp_path / "other", base, {"new": models["law"]})
    shutil.copytree(tmp_path / "other/tasks/new", path / "tasks/new")
    with pytest.raises(StoreError, match="made for another store"):
        open_store(path).params("new")


def test_unknown_tasks(made):
    with pytest.raises(StoreError, match=r"no task 'maths'\. Did you mean 'math'"):
        open_store(made[0]).params("maths")


def test_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match=r"is no store: no store\.json"):
        open_store(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_add(tmp_path, kind):
    base, models = trees()
    law = models.pop("law")
    create_store(tmp_path / "store", base, models, kind=kind)
    store = open_store(tmp_path / "store")
    before = store.params("math")
    add_task(tmp_path / "store", "law", law)
    assert store.tasks == ["code", "law", "math"]
    params = flat(store.params("law"))
    for name in ("steps", "frozen/kernel"):
        np.testing.assert_array_equal(params[name], law[name])
    assert_trees_equal(open_store(tmp_path / "store").params("math"), before)
    store.verify()
    if kind in ("tvq", "bitdelta"):  # Tasks share nothing.
        create_store(tmp_path / "all", base, models | {"law": law}, kind=kind)
        together = open_store(tmp_path / "all")
        assert_trees_equal(store.params("law"), together.params("law"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_added_again_comes_out_the_same(tmp_path, kind):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind=kind)
    add_task(tmp_path / "store", "again", models["math"])
    store = open_store(tmp_path / "store")
    assert_trees_equal(store.params("again"), store.params("math"))


def test_added_masks_are_on_the_vector_that_is_there(tmp_path):
    base = {"w": np.zeros(4, np.float32), "v": np.zeros(2, np.float32)}
    first = {"w": np.array([1, 2, 0, -4], np.float32), "v": base["v"]}
    new = {"w": np.array([1, -9, 5, -3], np.float32), "v": np.ones(2, np.float32)}
    create_store(tmp_path / "store", base, {"first": first}, threshold=0.5)
    add_task(tmp_path / "store", "new", new)
    params = open_store(tmp_path / "store").params("new")
    # |tau| > 0.5 |vector - tau|: the second holds too, with the wrong sign.
    np.testing.assert_array_equal(params["w"], [1, 2, 0, -4])
    np.testing.assert_array_equal(params["v"], new["v"])  # no vector: kept whole
    add_task(tmp_path / "store", "strict", new, threshold=2)
    params = open_store(tmp_path / "store").params("strict")
    np.testing.assert_array_equal(params["w"], [1, 0, 0, -4])


def test_a_task_that_was_replaced(made):
    path, _, models = made
    store = open_store(path)
    law = store.params("law")
    shutil.rmtree(path / "tasks/math")
    add_task(path, "math", models["law"])
    assert_trees_equal(store.params("math"), law)


def test_a_failed_addition_leaves_nothing(made, monkeypatch):
    path, _, models = made
    before = sorted(path.rglob("*"))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_files.LeafFile, "write", full)
        with pytest.raises(OSError, match="No space"):
            add_task(path, "new", models["math"])
    assert sorted(path.rglob("*")) == before
    add_task(path, "new", models["math"])
    with pytest.raises(StoreError, match="has a task 'new' already"):
        add_task(path, "new", models["math"])
    new = open_store(path).params("new")
    assert_trees_equal(new, open_store(path).params("math"))


KILLED = """
import os, signal, sys
import numpy as np
from jaxmerge.compression import add_task, files

write, leaves = files.LeafFile.write, []

def killed(self, name, data):
    write(self, name, data)
    leaves.append(name)
    if len(leaves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

files.LeafFile.write = killed
add_task(sys.argv[1], "new", dict(np.load(sys.argv[2])))
"""


def test_a_process_killed_in_an_addition_leaves_the_store_as_it_was(made, tmp_path):
    path, _, models = made
    np.savez(tmp_path / "model.npz", **models["math"])
    words = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "model.npz")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert len(list((path / "tasks").glob(".new.*"))) == 1
    store = open_store(path)
    assert store.tasks == sorted(TASKS)
    store.verify()
    with pytest.raises(StoreError, match="no task 'new'"):
        store.params("new")
    add_task(path, "new", models["math"])
    assert_trees_equal(open_store(path).params("new"), store.params("math"))


def test_a_failed_creation_leaves_nothing(tmp_path):
    base, models = trees()
    models["law"]["norm/scale"] = np.float32(np.nan)
    with pytest.raises(StoreError, match=r"leaf 'norm/scale' of models\['law'\].*NaN"):
        create_store(tmp_path / "store", base, models)
    assert not list(tmp_path.iterdir())


def test_infinities_that_are_the_same_in_all(tmp_path):
    base, models = trees()
    mask = {"mask": np.array([0, -np.inf, np.nan], np.float32), "none": np.ones((0, 2))}
    models = {task: model | mask for task, model in models.items()}
    create_store(tmp_path / "store", base | mask, models)
    params = open_store(tmp_path / "store").params("law")
    np.testing.assert_array_equal(params["mask"], mask["mask"])
    assert params["none"].shape == (0, 2)


@pytest.mark.parametrize("kind", ["tsv", "tvq", "rtvq", "bitdelta"])
def test_stacked_layers_are_coded_one_by_one(tmp_path, kind):
    rng = np.random.default_rng(0)
    base = {"kernel": rng.normal(size=(3, 8, 6)).astype(np.float32)}
    model = {"kernel": base["kernel"] + rng.normal(size=(3, 8, 6)).astype(np.float32)}
    model["kernel"][1] *= 50
    options = {"kind": kind} | ({"rank": 2} if kind == "tsv" else {})
    create_store(tmp_path / "all", base, {"task": model}, stack_axes=1, **options)
    together = open_store(tmp_path / "all").params("task")["kernel"]
    for layer in range(3):
        one, moved = ({"kernel": tree["kernel"][layer]} for tree in (base, model))
        path = tmp_path / str(layer)
        create_store(path, one, {"task": moved}, **options)
        alone = open_store(path).params("task")["kernel"]
        np.testing.assert_allclose(together[layer], alone, rtol=1e-4, atol=1e-5)


def test_sums_too_large_for_float16(tmp_path):
    base = {"w": np.zeros(2, np.float16)}
    models = {str(i): {"w": np.array([5e4, 1], np.float16)} for i in range(2)}
    with pytest.raises(StoreError, match="further than float16 reaches"):
        create_store(tmp_path / "store", base, models)


def wrong(leaf, value):
    base, models = trees()
    models["code"] = {**models["code"], leaf: value}
    return base, models


@pytest.mark.parametrize(
    ("base_and_models", "options", "message"),
    [
        (
            wrong("block/bias", np.ones(2, np.float32)),
            {},
            r"models\['code'\] leaf 'blo",
        ),
        (wrong("more", np.ones(2, np.float32)), {}, "has leaf 'more'"),
        (wrong("steps", np.ones(2, np.int8)), {}, "'steps' is int8, base has int32"),
        (wrong("norm/scale", 1.0), {}, "is a float, not an array"),
        (trees(), {"kind": "zip"}, "kind is 'zip'; it must be one of 'tall'"),
        (trees(), {"bits": 4}, "'tall' has no option 'bits'"),
        (trees(), {"kind": "tvq", "bits": 9}, "bits is 9"),
        (trees(), {"kind": "tsv", "rank": 0}, "rank is 0"),
        (trees(), {"threshold": -1.0}, "threshold is -1"),
        (trees(), {"threshold": {"math": 1.0}}, "give one for each task"),
        (trees(), {"kind": "rtvq", "shared_bits": 0}, "shared_bits is 0"),
        (trees(), {"multi_task": "mean"}, "multi_task is 'mean'"),
        (trees(), {"multi_task": "ties", "scope": "row"}, "scope is 'row'"),
        (trees(), {"scope": "model"}, "scope has no effect without multi_task='ties'"),
        ((trees()[0], {}), {}, "at least one model"),
        ((trees()[0], {"a/b": trees()[0]}), {}, "'a/b' is no name for a task"),
        (
            ({"odd": np.ones((2, 2, 2), np.float32)},) * 1
            + ({"a": {"odd": np.zeros((2, 2, 2), np.float32)}},),
            {"kind": "bitdelta"},
            "No rule says which axes of leaf 'odd'",
        ),
    ],
)
def test_errors_before_work(tmp_path, base_and_models, options, message):
    with pytest.raises(StoreError, match=message) as caught:
        create_store(tmp_path / "store", *base_and_models, **options)
    assert str(caught.value).startswith("create_store: ")
    assert not list(tmp_path.iterdir())


def test_options_that_a_kind_has_not_got(tmp_path):
    base, models = trees()
    create_store(tmp_path / "store", base, models, kind="emr")
    message = "add_task: a store of kind 'emr' has no option 'threshold'"
    with pytest.raises(StoreError, match=message):
        add_task(tmp_path / "store", "new", models["law"], threshold=0.3)


def test_no_space(tmp_path, monkeypatch):
    base, models = trees()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(StoreError, match="has only 0 free"):
        create_store(tmp_path / "store", base, models)


@pytest.mark.parametrize("kind", ["tall", "emr", "tvq", "rtvq", "bitdelta"])
def test_files_are_as_large_as_predicted(tmp_path, monkeypatch, kind):
    if kind == "rtvq":  # What compression saves on its codes is not predicted.
        monkeypatch.setattr(store_files, "_WORTHWHILE", 0)
    rng = np.random.default_rng(0)

    def tree(scale):
        shapes = {"up/kernel": (512, 200), "down/kernel": (200, 512), "up/bias": (200,)}
        return {n: scale * rng.normal(size=s) for n, s in shapes.items()}

    base = {n: x.astype(np.float32) for n, x in tree(1).items()}
    frozen = {"text/kernel": rng.normal(size=(100, 400)).astype(np.float32)}
    models = {
        f"task {i}": {n: base[n] + x.astype(np.float32) for n, x in tree(0.1).items()}
        | frozen
        for i in range(8)
    }
    path = tmp_path / "store"
    create_store(path, base | frozen, models, kind=kind)
    trained = sum(x.size for x in base.values())
    bits = predicted_bits(trained + frozen["text/kernel"].size, trained, 8, kind)
    sizes = open_store(path).sizes()
    assert sizes.store == pytest.approx(bits / 8, rel=0.02)
    assert sizes.store >= bits / 8
    apart = predicted_bits(
        trained + frozen["text/kernel"].size, trained, 8, "individual"
    )
    assert sizes.apart == apart / 8


def test_masks_are_compressed_where_it_pays(tmp_path):
    rng = np.random.default_rng(0)
    base = {"rows": np.zeros((64, 512), np.float32)}
    models = {
        task: {"rows": rng.normal(size=(64, 512)).astype(np.float32)}
        for task in ("a", "b", "one row")
    }
    models["one row"]["rows"][1:] = 0
    create_store(tmp_path / "store", base, models, threshold=1.0)
    store = open_store(tmp_path / "store")
    entries = [store.files.task(task).entries["rows"] for task in models]
    assert entries[0].nbytes is entries[1].nbytes is None
    assert entries[2].nbytes < 4096 / 8
    rows = store.params("one row")["rows"]
    np.testing.assert_array_equal(rows[1:], 0)
    assert np.asarray(rows[0]).any()
    store.verify()


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_no_model_is_in_memory_as_a_whole(tmp_path, scope):
    rng = np.random.default_rng(0)
    shape, layers = (128, 512), 48
    leaf_bytes = 4 * 128 * 512

    def tree():
        draws = (rng.normal(size=shape).astype(np.float32) for _ in range(layers))
        return {f"layers.{i}.weight": draw for i, draw in enumerate(draws)}

    for name in ("base", "math", "code"):
        jaxmerge.save(tmp_path / name, tree())
    paths = {task: tmp_path / task for task in ("math", "code")}

    def peak(run, *args, **options):
        run(*args, **options)  # What compiles is not counted.
        shutil.rmtree(tmp_path / "out")
        tracemalloc.start()
        run(*args, **options)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    sources = tmp_path / "out", tmp_path / "base", paths
    created = peak(create_store, *sources, multi_task="ties", scope=scope)
    # To rank a model, a digit is counted 65536 times for each task.
    digits = 2 * 8 * 2**16 if scope == "model" else 0
    assert created < 5 * leaf_bytes + 3 * digits
    (tmp_path / "out").rename(tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert peak(store.extract, "math", tmp_path / "out") < 5 * leaf_bytes
