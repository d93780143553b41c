"""Equal matrices that are read from disk are merged together on a mesh."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import lazy, matrixwise
from jaxmerge.checkpoints import LeafWriter, save
from jaxmerge.merging import merge_checkpoints
from jaxmerge.recipes import Recipe

NAMES = ("math", "code")
LAYERS = 10
LEAF = 3 * 16 * 8 * 4
"""Bytes of one leaf of the base and two models."""


def make_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {f"layers.{i}.up.weight": (16, 8) for i in range(LAYERS)}
    shapes |= {f"layers.{i}.down.weight": (8, 16) for i in range(2)}
    shapes |= {"layers.0.norm.weight": (8,)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(("base", *NAMES)):
        save(runs / name, make_tree(i))
    return Recipe("iso_c", {n: runs / n for n in NAMES}, base=runs / "base")


@pytest.fixture
def groups(monkeypatch):
    """What is computed together, and after each leaf, how many results are kept."""
    made, kept = [], []
    start, take = lazy.Together.__init__, lazy.Together.take

    def noted(self, run, arguments, number):
        made.append(self)
        start(self, run, arguments, number)

    def counted(self, index):
        array = take(self, index)
        kept.append(sum(len(group._kept) for group in made))
        return array

    monkeypatch.setattr(lazy.Together, "__init__", noted)
    monkeypatch.setattr(lazy.Together, "take", counted)
    return made, kept


def sizes(groups):
    return sorted(len(group.arguments[0]) for group in groups)


def test_as_many_together_as_there_are_devices(recipe, tmp_path, mesh, groups):
    made, kept = groups
    merge_checkpoints(recipe, tmp_path / "alone")
    assert sizes(made) == [1] * (LAYERS + 2)
    assert set(kept) == {0}
    made.clear(), kept.clear()
    merge_checkpoints(recipe, tmp_path / "mesh", mesh=mesh)
    # Ten on eight devices are two rounds.
    assert sizes(made) == [2, 5, 5]
    # A group may begin before the last leaves of the one before are taken.
    assert 0 < max(kept) < 4 + 5
    assert kept[-1] == 0
    got, want = (jaxmerge.load(tmp_path / name) for name in ("mesh", "alone"))
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5)


def test_no_more_together_than_fit_into_memory(recipe, tmp_path, groups):
    mesh = jax.make_mesh((8,), ("x",))
    # Of the memory, each of three threads has a third.
    merge_checkpoints(recipe, tmp_path / "out", mesh=mesh, memory=3 * 4 * LEAF)
    assert sizes(groups[0]) == [2, 2, 4, 4]


def test_a_merge_that_was_interrupted_within_a_group_goes_on(
    recipe, tmp_path, monkeypatch, groups
):
    mesh = jax.make_mesh((8,), ("x",))
    complete, names = LeafWriter.complete, []

    def interrupted(self, name, note):
        complete(self, name, note)
        names.append(name)
        if sum("up" in name for name in names) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeafWriter, "complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(recipe, tmp_path / "out", mesh=mesh)
    before = set(names)
    made, _ = groups
    made.clear()
    written, write = set(), LeafWriter.write

    def noted(self, name, *arguments):
        written.add(name)
        write(self, name, *arguments)

    monkeypatch.setattr(LeafWriter, "write", noted)
    merge_checkpoints(recipe, tmp_path / "out", mesh=mesh)
    assert written == make_tree(0).keys() - before
    # The same leaves are together as before, and none waits for nobody.
    assert sizes(made) == [2, 5, 5]
    assert not any(group._kept for group in made)
    merge_checkpoints(recipe, tmp_path / "undisturbed", mesh=mesh)
    got, want = (jaxmerge.load(tmp_path / name) for name in ("out", "undisturbed"))
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf)


@pytest.mark.parametrize("spec", [P(("data", "model")), P("model", "data"), P()])
def test_matrices_move_to_their_devices_from_any_sharding(
    mesh, monkeypatch, spec, optimised
):
    """Without a gather, whatever the sharding, and one matrix per device."""
    calls, merge = [], matrixwise._merge_group

    def noted(*arguments, **options):
        calls.append((arguments, options))
        return merge(*arguments, **options)

    monkeypatch.setattr(matrixwise, "_merge_group", noted)
    matrices = {f"{i}.weight": (16, 8) for i in range(8)}
    trees = [
        jaxmerge.place(
            {k: np.full(s, i, np.float32) for k, s in matrices.items()},
            mesh,
            {".*": spec},
        )
        for i in range(3)
    ]
    jaxmerge.iso_c(trees[0], trees[1:])
    ((arguments, options),) = calls
    text = merge.lower(*arguments, **options).compile().as_text()
    factored = re.findall(r"= \(f32\[([\d,]+)\]\S* .*lapack_sge", text)
    assert factored
    assert all(shape.startswith("1,") for shape in factored)
    kinds = "all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = set(re.findall(rf" ({kinds}|all-gather)(?:-start)?\(", text))
    # Whoever holds copies gets the others' results for them.
    assert found <= ({"all-to-all"} if spec else {"all-to-all", "all-gather"})
