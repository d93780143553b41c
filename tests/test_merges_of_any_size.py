"""Merges in little memory, on meshes, by several processes, and after interruptions."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import hosts, merging
from jaxmerge.checkpoints import CheckpointError, LeafWriter, save
from jaxmerge.checkpoints.journal import Journal, completed
from jaxmerge.merging import MEMORY as DEFAULT_MEMORY
from jaxmerge.merging import identity, merge_checkpoints, resolve
from jaxmerge.planning import MergeError
from jaxmerge.recipe_files import load_recipe
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods

NAMES = ("math", "code", "law")
MEMORY = 20_000
"""Of the kernels below, some tenths fit at a time."""


def make_tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": rng.normal(size=(96, 8)).astype(np.float32)},
        "up": {
            "kernel": rng.normal(size=(64, 16)).astype(np.float32),
            "bias": rng.normal(size=16).astype(np.float32),
        },
        "gate": {"kernel": rng.normal(size=(64, 16)).astype(np.float32)},
        "steps": np.array(seed, np.int32),
        "temperature": np.array(seed / 7, np.float32),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(("base", *NAMES)):
        save(directory / name, make_tree(i))
    return directory


def recipe_for(runs, method, **fields):
    known = methods()[method]
    models = {name: runs / name for name in NAMES[: known.max_models]}
    base = runs / "base" if known.needs_base else None
    return Recipe(method, models, base=base, **fields)


def assert_same(directory, expected, **tolerances):
    tree = jaxmerge.load(directory)
    compare = np.testing.assert_allclose if tolerances else np.testing.assert_equal
    jax.tree.map(lambda a, b: compare(a, np.asarray(b), **tolerances), tree, expected)


STREAMED = ("average", "dare", "della", "sce", "ties", "tsv_merge")
"""One method of each way to depend on rows, on whole leaves and on chance."""

ROUNDED_ANEW = {"della", "sce"}
"""Methods whose last bit depends on what XLA fuses with sums and products."""


@pytest.mark.parametrize("name", STREAMED)
def test_by_rows_equals_at_once(runs, tmp_path, name):
    recipe = recipe_for(runs, name)
    merge_checkpoints(recipe, tmp_path / "whole")
    merge_checkpoints(recipe, tmp_path / "rows", memory=MEMORY)
    tolerances = {"rtol": 1e-5, "atol": 1e-6} if name in ROUNDED_ANEW else {}
    assert_same(tmp_path / "rows", jaxmerge.load(tmp_path / "whole"), **tolerances)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"scope": "model", "tie": "majority", "vote": "count"}),
        ("consensus", {"multi_task": "ties", "scope": "model"}),
        ("ram", {"boost": 0.2, "scope": "model"}),
    ],
)
def test_ranking_the_whole_model_in_passes(runs, tmp_path, name, options):
    recipe = recipe_for(runs, name, options=options)
    merge_checkpoints(recipe, tmp_path / "rows", memory=MEMORY)
    base, *models = map(make_tree, range(4))
    assert_same(tmp_path / "rows", methods()[name].function(base, models, **options))


def test_methods_that_hold_the_model_say_so_before_they_read(runs, tmp_path):
    with pytest.raises(MergeError, match="pcb with these options needs all leaves"):
        merge_checkpoints(recipe_for(runs, "pcb"), tmp_path / "out", memory=MEMORY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("dare", None),
        ("ties", None),
        ("ties", {".*kernel": P("model", "data")}),
        ("tsv_merge", None),
    ],
)
def test_on_a_mesh(runs, tmp_path, mesh, name, rules):
    recipe = recipe_for(runs, name)
    merge_checkpoints(recipe, tmp_path / "alone")
    merge_checkpoints(recipe, tmp_path / "mesh", mesh=mesh, rules=rules)
    expected = jaxmerge.load(tmp_path / "alone")
    assert_same(tmp_path / "mesh", expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [10**9, 2000])
def test_a_mesh_that_is_set_for_others(runs, tmp_path, mesh, memory):
    recipe = recipe_for(runs, "dare")
    merge_checkpoints(recipe, tmp_path / "beside", memory=memory)
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        merge_checkpoints(recipe, tmp_path / "alone", memory=memory)
    assert_same(tmp_path / "beside", jaxmerge.load(tmp_path / "alone"))


def test_rules_that_do_not_fit_a_leaf(runs, tmp_path, mesh):
    rules = {"temperature": P("data")}
    with pytest.raises(
        MergeError, match=r"'temperature' of shape .* cannot be sharded"
    ):
        merge_checkpoints(
            recipe_for(runs, "ties"), tmp_path / "out", mesh=mesh, rules=rules
        )
    assert not list(tmp_path.iterdir())


def run(script, *arguments, wait=True, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return process


# A slow disk makes sure that the merge is killed in its middle.
SLOW_MERGE = """
    import sys, time
    from jaxmerge.checkpoints import LeafWriter, journal
    from jaxmerge.merging import merge_checkpoints
    from jaxmerge.recipe_files import load_recipe

    journal.SECONDS_BETWEEN_SYNCS = 0
    write = LeafWriter.write

    def slowly(*arguments):
        time.sleep(0.5)
        write(*arguments)

    LeafWriter.write = slowly
    merge_checkpoints(load_recipe(sys.argv[1]), sys.argv[2], memory=int(sys.argv[3]))
"""


def write_recipe(runs, tmp_path, text="method: ties"):
    recipe = tmp_path / "recipe.yaml"
    models = [str(runs / name) for name in NAMES]
    recipe.write_text(f"{text}\nbase: {runs / 'base'}\nmodels: {json.dumps(models)}\n")
    return recipe


def killed(runs, tmp_path, text="method: ties"):
    """Kills a merge when one leaf or more are complete; the leaves that are."""
    recipe = write_recipe(runs, tmp_path, text)
    process = run(SLOW_MERGE, recipe, tmp_path / "out", MEMORY, wait=False)
    journal = tmp_path / ".out.partial/journal-0.jsonl"
    deadline = time.monotonic() + 120
    while not _names_in(journal) - {""} or "" not in _names_in(journal):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "out").exists()
    return _names_in(journal) - {""}


def _names_in(journal):
    return completed(journal) if journal.exists() else set()


@pytest.fixture
def written(monkeypatch):
    """The leaves that merges write in this process."""
    names, write = set(), LeafWriter.write

    def noted(self, name, *arguments):
        names.add(name)
        write(self, name, *arguments)

    monkeypatch.setattr(LeafWriter, "write", noted)
    return names


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_killed_merge_goes_on(runs, tmp_path, written, format):
    before = killed(runs, tmp_path, f"method: ties\nformat: {format}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    report = merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)
    assert before
    assert written == report["leaves"].keys() - before
    assert_undisturbed(recipe, tmp_path, report)


def assert_undisturbed(recipe, tmp_path, report):
    """A merge that was interrupted ended like one that was not."""
    undisturbed = tmp_path / "undisturbed"
    again = merge_checkpoints(recipe, undisturbed, memory=MEMORY)
    files = [
        {path.name for path in directory.iterdir()}
        for directory in (tmp_path / "out", undisturbed)
    ]
    assert files[0] == files[1]
    assert_same(tmp_path / "out", jaxmerge.load(undisturbed))
    assert report["leaves"] == again["leaves"]
    assert not list(tmp_path.glob(".out*"))


# As little is left to do as can be: further files are there, all is synced.
DYING_MERGE = """
    import os, sys
    from pathlib import Path
    from jaxmerge.checkpoints import LeafWriter
    from jaxmerge.merging import merge_checkpoints
    from jaxmerge.recipe_files import load_recipe

    owner = LeafWriter if sys.argv[4].startswith("_") else Path
    setattr(owner, sys.argv[4], lambda *arguments: os._exit(9))
    merge_checkpoints(load_recipe(sys.argv[1]), sys.argv[2], memory=int(sys.argv[3]))
"""


def dies_at(step, runs, tmp_path):
    recipe = write_recipe(runs, tmp_path, "method: task_arithmetic")
    process = run(DYING_MERGE, recipe, tmp_path / "out", MEMORY, step, wait=False)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 9, errors
    return load_recipe(recipe)


@pytest.mark.parametrize("step", ["_finish", "_publish", "rename"])
def test_a_merge_killed_near_its_end_goes_on(runs, tmp_path, written, step):
    recipe = dies_at(step, runs, tmp_path)
    assert (tmp_path / ".out.partial/README.md").exists()
    report = merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)
    if step != "_finish":  # From where on all leaves are known to be on disk.
        assert not written
    assert_undisturbed(recipe, tmp_path, report)


def test_a_merge_killed_after_its_end_is_complete(runs, tmp_path):
    recipe = dies_at("unlink", runs, tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)
    merge_checkpoints(recipe, tmp_path / "undisturbed", memory=MEMORY)
    assert_same(tmp_path / "out", jaxmerge.load(tmp_path / "undisturbed"))


def test_another_recipe_does_not_go_on(runs, tmp_path):
    killed(runs, tmp_path)
    other = load_recipe(
        write_recipe(runs, tmp_path, "method: ties\noptions: {density: 0.3}")
    )
    with pytest.raises(CheckpointError, match="the recipe changed since"):
        merge_checkpoints(other, tmp_path / "out", memory=MEMORY)
    same = load_recipe(write_recipe(runs, tmp_path))
    with pytest.raises(CheckpointError, match="the memory changed since"):
        merge_checkpoints(same, tmp_path / "out")
    assert (tmp_path / ".out.partial/model.safetensors").exists()


def test_another_input_does_not_go_on(runs, tmp_path, written):
    copies = shutil.copytree(runs, tmp_path / "copies")
    before = killed(copies, tmp_path)
    weights = copies / "code/model.safetensors"
    stamp = weights.stat()
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(CheckpointError, match="code is not what it was when the merge"):
        merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)

    changed[-1] ^= 1
    weights.write_bytes(changed)
    others = {"blake3": {str(copies / "base"): {"model.safetensors": "00"}}}
    with pytest.raises(CheckpointError, match="base is not what was merged then"):
        merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY, **others)

    merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)
    assert before.isdisjoint(written)


def test_a_merge_that_knew_no_hashes_starts_anew(runs, tmp_path, written):
    killed(runs, tmp_path)
    journal = tmp_path / ".out.partial/journal-0.jsonl"
    lines = journal.read_text().splitlines(True)
    journal.write_text("".join(x for x in lines if not x.startswith('["", ')))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    report = merge_checkpoints(recipe, tmp_path / "out", memory=MEMORY)
    assert written == report["leaves"].keys()
    assert_undisturbed(recipe, tmp_path, report)


def test_two_merges_into_one_place(runs, tmp_path):
    recipe = write_recipe(runs, tmp_path)
    process = run(SLOW_MERGE, recipe, tmp_path / "out", MEMORY, wait=False)
    while not (tmp_path / ".out.partial/journal-0.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    with pytest.raises(CheckpointError, match="is being written by another process"):
        merge_checkpoints(load_recipe(recipe), tmp_path / "out", memory=MEMORY)
    assert (tmp_path / ".out.partial").exists()
    process.kill()
    process.communicate()


ONE_OF_TWO = """
    import sys
    import jax
    from jaxmerge.cli import main

    # More pieces of code than there are: what is compiled need not be fast.
    jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(main(sys.argv[1:]))
"""


def two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = f"--coordinator=localhost:{port}", "--processes=2"
    processes = [
        run(
            *(ONE_OF_TWO, *arguments, *cluster, f"--process={i}"),
            wait=False,
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
        )
        for i in range(2)
    ]
    return [(p.communicate(timeout=300)[1], p.returncode) for p in processes]


@pytest.mark.parametrize("method", ["ties", "tsv_merge"])
def test_two_processes_with_four_devices_each(runs, tmp_path, method):
    recipe = write_recipe(runs, tmp_path, f"method: {method}")
    for errors, status in two_processes(
        "merge", recipe, tmp_path / "out", "--mesh=data=2,model=4"
    ):
        assert status == 0, errors
    merge_checkpoints(load_recipe(recipe), tmp_path / "alone")
    assert_same(
        tmp_path / "out", jaxmerge.load(tmp_path / "alone"), rtol=1e-5, atol=1e-6
    )
    reports = [
        json.loads((tmp_path / name / "jaxmerge_report.json").read_text())
        for name in ("out", "alone")
    ]
    for key in ("parts", "blake3"):
        assert reports[0][key] == reports[1][key]
    norms = [report["totals"]["task_vector_norm"] for report in reports]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_error_in_one_of_two_processes(runs, tmp_path):
    copies = shutil.copytree(runs, tmp_path / "copies")
    broken = make_tree(1)
    broken["embed"]["embedding"][-1, -1] = np.nan
    shutil.rmtree(copies / "math")
    save(copies / "math", broken)
    recipe = write_recipe(copies, tmp_path)
    first, second = two_processes("merge", recipe, tmp_path / "out", "--mesh=data=8")
    assert (first[1], second[1]) == (1, 1)
    assert "process 1 failed" in first[0]
    assert "(math) has 1 NaN" in second[0]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        *((merging, step) for step in ("resolve", "open_writer", "merge_report")),
        *((LeafWriter, step) for step in ("write", "complete", "add_file")),
    ],
)
def test_other_processes_are_told_of_an_error(runs, tmp_path, monkeypatch, owner, step):
    told, error = [], OSError(f"{step} fails")

    def fail(*arguments, **options):
        raise error

    def agree(raised=None):
        told.append(raised)
        if raised is not None:
            raise raised

    monkeypatch.setattr(owner, step, fail)
    monkeypatch.setattr(hosts, "agree", agree)
    with pytest.raises(OSError, match=f"{step} fails"):
        merge_checkpoints(recipe_for(runs, "average"), tmp_path / "out")
    assert told[-1] is error
    assert not list(tmp_path.iterdir())


def test_an_input_that_changed_for_one_of_two_processes(runs, tmp_path):
    recipe = write_recipe(runs, tmp_path)
    plan = resolve(load_recipe(recipe))
    mesh = jax.make_mesh((8,), ("data",))
    whole = identity(plan, DEFAULT_MEMORY, mesh) | {"the number of processes": 2}
    digests = [(str(each.path), each.digest()) for each in plan.stored()]
    digests[1] = digests[1][0], {"model.safetensors": "00"}
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for number in range(2):
        path = partial / f"journal-{number}.jsonl"
        journal = Journal(path, whole, lambda: None)
        journal.add("", dict(digests[number::2]))
        journal.flush()
        journal.close()
    before = {path: path.read_text() for path in partial.iterdir()}
    first, second = two_processes("merge", recipe, tmp_path / "out", "--mesh=data=8")
    assert (first[1], second[1]) == (1, 1)
    assert "process 1 failed" in first[0]
    assert "is not what it was when the merge" in second[0]
    assert {path: path.read_text() for path in partial.iterdir()} == before
